"""Local copies that the processes of a node share: who comes first makes one, who leaves last removes it.

Each copy is a folder with a lock file beside it. Whoever uses it holds the lock shared, whoever makes or removes it
exclusively; the kernel lets go of the locks of a process that dies, so what it left is removed by the next one.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

FOLDER = "mu2llm-copies-{user}"
"""Below the temporary folder."""


@contextlib.contextmanager
def shared(key: str, make: Callable[[Path], None]) -> Iterator[Path]:
    """The folder of a key, filled by `make` unless another process of this user on this node has it already."""
    root = Path(tempfile.gettempdir(), FOLDER.format(user=os.getuid()))
    root.mkdir(mode=0o700, exist_ok=True)
    place = root / key
    lock = _used(place, make)
    try:
        yield place
    finally:
        os.close(lock)
        _remove_unused(root)


def _used(place: Path, make: Callable[[Path], None]) -> int:
    """The place's lock, held shared, once the place is whole."""
    path = place.with_suffix(".lock")
    while True:
        lock = os.open(path, os.O_CREAT | os.O_RDWR)
        try:
            fcntl.flock(lock, fcntl.LOCK_SH)
            if place.exists() and _is(lock, path):
                return lock
            fcntl.flock(lock, fcntl.LOCK_EX)
            if _is(lock, path) and not place.exists():
                with tempfile.TemporaryDirectory(
                    dir=place.parent, prefix="partial-", ignore_cleanup_errors=True
                ) as new:
                    make(Path(new, "whole"))
                    Path(new, "whole").rename(place)
        except BaseException:
            os.close(lock)
            raise
        os.close(lock)


def _is(lock: int, path: Path) -> bool:
    """Whether the open file is still the one at the path: who removes a copy removes its lock file too."""
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(lock), path.stat())
    return False


def _remove_unused(root: Path) -> None:
    for path in root.glob("*.lock"):
        with contextlib.suppress(FileNotFoundError, BlockingIOError):
            lock = os.open(path, os.O_RDWR)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _is(lock, path):
                    shutil.rmtree(path.with_suffix(""), ignore_errors=True)
                    path.unlink()
            finally:
                os.close(lock)
