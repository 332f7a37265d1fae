"""S3 as a pyarrow filesystem that never writes folder markers.

pyarrow puts an empty object `folder/` where it deletes or makes something below it. Servers that keep objects as
files (rclone) take that for a file of the folder's name, and lose sight of what is in it. Objects need no folders:
here none is made, and objects are deleted by boto3.

A client takes 25 ms of CPU to make and has connections of its own, so each process keeps its clients: by all `AWS_…`
variables of the environment (endpoint, region, keys, profile), so that rotated keys are noticed, and by its process
id, so that one that went through a fork is not used.

Buckets that are open to all are read without keys, at AWS whatever other server the environment names, or at a copy of
them on the server that `MU2LLM_PUBLIC_S3` names.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator
from typing import Any

import pyarrow.fs as pafs

Environment = tuple[tuple[str, str], ...]
"""The `AWS_…` variables, sorted."""
PUBLIC = ("idc-open-data", "idc-open-data-two", "idc-open-data-cr")
"""The buckets of NCI's Imaging Data Commons (registry.opendata.aws/nci-imaging-data-commons)."""
PUBLIC_REGION = "us-east-1"  # of all three
PUBLIC_SERVER = "MU2LLM_PUBLIC_S3"


def is_public(path: str) -> bool:
    """Whether `bucket/key` lies in a bucket that is read without keys."""
    return path.partition("/")[0] in PUBLIC


def public(attempts: int) -> pafs.PyFileSystem:
    """S3 without keys, for the public buckets."""
    return _filesystem((), os.getpid(), attempts, os.environ.get(PUBLIC_SERVER), True)


def s3(attempts: int) -> pafs.PyFileSystem:
    """S3 as the environment says; a request is tried `attempts` times before it fails."""
    if _endpoint(dict(_environment())):
        # other servers than AWS's often refuse its newer trailing checksums (rclone answers 411)
        os.environ.setdefault("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
    return _filesystem(_environment(), os.getpid(), attempts, _endpoint(dict(_environment())))


def _environment() -> Environment:
    return tuple(sorted((name, value) for name, value in os.environ.items() if name.startswith("AWS_")))


def _endpoint(environment: dict[str, str]) -> str | None:
    return environment.get("AWS_ENDPOINT_URL_S3") or environment.get("AWS_ENDPOINT_URL")


@functools.lru_cache(maxsize=8)
def _filesystem(
    environment: Environment, process: int, attempts: int, endpoint: str | None, anonymous: bool = False
) -> pafs.PyFileSystem:
    names = dict(environment)
    region = names.get("AWS_REGION") or names.get("AWS_DEFAULT_REGION")
    options: dict[str, Any] = {"region": PUBLIC_REGION, "anonymous": True} if anonymous else {"region": region}
    if endpoint:
        scheme, _, host = endpoint.rpartition("://")
        options |= {
            "endpoint_override": host,
            "scheme": scheme or "https",
            "region": options["region"] or "us-east-1",
            "allow_bucket_creation": not anonymous,
        }
    inner = pafs.S3FileSystem(**options, retry_strategy=pafs.AwsStandardS3RetryStrategy(max_attempts=attempts))
    return pafs.PyFileSystem(S3Handler(inner, attempts))


class S3Handler(pafs.FileSystemHandler):
    """pyarrow's `S3FileSystem` but for the making of folders and deleting. Paths are `bucket/key`."""

    def __init__(self, inner: pafs.S3FileSystem, attempts: int) -> None:
        self.inner, self.attempts = inner, attempts

    def __eq__(self, other: object) -> bool:
        return isinstance(other, S3Handler) and self.inner.equals(other.inner)

    __hash__ = None  # type: ignore[assignment]

    def get_type_name(self) -> str:
        return "s3"

    def normalize_path(self, path: str) -> str:
        return str(self.inner.normalize_path(path))

    def get_file_info(self, paths: list[str]) -> list[pafs.FileInfo]:
        return list(self.inner.get_file_info(paths))

    def get_file_info_selector(self, selector: pafs.FileSelector) -> list[pafs.FileInfo]:
        return list(self.inner.get_file_info(selector))

    def create_dir(self, path: str, recursive: bool) -> None:
        """Makes the bucket, where the path is one; below it there is nothing to make."""
        if "/" not in path.strip("/"):
            self.inner.create_dir(path, recursive=recursive)

    def delete_file(self, path: str) -> None:
        if self.inner.get_file_info(path).type == pafs.FileType.NotFound:
            raise FileNotFoundError(path)
        bucket, _, key = path.partition("/")
        self._delete(bucket, [key])

    def delete_dir(self, path: str) -> None:
        bucket, _, key = path.strip("/").partition("/")
        if not key:
            raise OSError(f"{bucket} is a bucket: it is not deleted from here")
        self._delete_below(bucket, f"{key}/")

    def delete_dir_contents(self, path: str, missing_dir_ok: bool = False) -> None:
        bucket, _, key = path.strip("/").partition("/")
        self._delete_below(bucket, f"{key}/" if key else "")

    def delete_root_dir_contents(self) -> None:
        raise OSError("buckets are not deleted from here")

    def move(self, src: str, dest: str) -> None:
        self.inner.copy_file(src, dest)
        self.delete_file(src)

    def copy_file(self, src: str, dest: str) -> None:
        self.inner.copy_file(src, dest)

    def open_input_stream(self, path: str) -> Any:
        return self.inner.open_input_stream(path, compression=None)

    def open_input_file(self, path: str) -> Any:
        return self.inner.open_input_file(path)

    def open_output_stream(self, path: str, metadata: dict[str, str]) -> Any:
        return self.inner.open_output_stream(path, compression=None, metadata=metadata)

    def open_append_stream(self, path: str, metadata: dict[str, str]) -> Any:
        return self.inner.open_append_stream(path, compression=None, metadata=metadata)

    def _delete_below(self, bucket: str, prefix: str) -> None:
        with _as_os_error():
            pages = self._client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
            for page in pages:
                self._delete(bucket, [item["Key"] for item in page.get("Contents", [])])

    def _delete(self, bucket: str, keys: list[str]) -> None:
        if not keys:
            return
        with _as_os_error():
            answer = self._client().delete_objects(
                Bucket=bucket, Delete={"Objects": [{"Key": key} for key in keys], "Quiet": True}
            )
        if failed := answer.get("Errors"):
            raise OSError(f"{bucket}/{failed[0]['Key']} was not deleted: {failed[0].get('Message')}")

    def _client(self) -> Any:
        return _client(_environment(), os.getpid(), self.inner.region, self.attempts)


@functools.lru_cache(maxsize=8)
def _client(environment: Environment, process: int, region: str, attempts: int) -> Any:
    import boto3  # half a second: only where something is deleted
    from botocore.config import Config

    endpoint = _endpoint(dict(environment))
    style = {"addressing_style": "path"} if endpoint else {}
    retries: Any = {"total_max_attempts": attempts, "mode": "standard"}
    session = boto3.session.Session()  # the default one keeps the keys that it was first used with
    return session.client("s3", endpoint_url=endpoint, region_name=region, config=Config(s3=style, retries=retries))


@contextlib.contextmanager
def _as_os_error() -> Iterator[None]:
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except (BotoCoreError, ClientError) as error:
        raise OSError(str(error)) from error
