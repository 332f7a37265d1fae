"""A process of its own for work on what strangers send: its memory is limited, it can be killed, and where it is sealed
it has no network and nothing of this process' environment.

This module is also the child's program, so it imports nothing before it has sealed itself.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import logging
import os
import platform
import resource
import struct
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

logger = logging.getLogger("ray.serve")
KEPT = ("PATH", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "TMPDIR", "LD_LIBRARY_PATH", "OMP_NUM_THREADS")
"""What a sealed child has of the environment: no key, token or address."""
_NO_NEW_PRIVILEGES, _SECCOMP, _FILTER = 38, 22, 2  # of prctl(2)
_LOAD, _IS, _IS_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06  # of the kernel's packet filters
_CALL, _ARCHITECTURE = 0, 4  # where they stand in what a filter sees
_ALLOWED, _REFUSED = 0x7FFF0000, 0x00050001  # EPERM
_SOCKETS = {"x86_64": (0xC000003E, 41), "aarch64": (0xC00000B7, 198)}  # the architecture, its number of socket(2)
_IO_URING_SETUP, _X32 = 425, 0x40000000


class Child:
    """One process that answers requests, one after the other, by the function that `answers` names (`module:name`)."""

    def __init__(self, answers: str, memory: int, sealed: bool) -> None:
        ours, theirs = Pipe()
        environment = {name: value for name, value in os.environ.items() if not sealed or name in KEPT}
        command = [sys.executable, "-m", __name__, str(theirs.fileno()), answers, str(memory), str(int(sealed))]
        self.process = subprocess.Popen(
            command,
            env={**environment, "PYTHONPATH": os.pathsep.join(sys.path)},
            stdin=subprocess.PIPE,  # held open; its end is this process' end
            pass_fds=[theirs.fileno()],
        )
        theirs.close()
        self._connection = ours
        try:
            if sealed and not ours.recv():
                _tell()
        except EOFError:
            self.end()
            raise

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def ask(self, request: Any, seconds: float) -> Any:
        """The answer. Raises TimeoutError where it takes longer, EOFError or OSError where the process died."""
        self._connection.send(request)
        if not self._connection.poll(max(0.0, seconds)):
            raise TimeoutError
        return self._connection.recv()

    def kill(self) -> None:
        self.process.kill()

    def end(self) -> None:
        """Kills it and waits until it is gone."""
        self.kill()
        self.process.wait()
        self._connection.close()
        assert self.process.stdin is not None
        self.process.stdin.close()


@functools.cache
def _tell() -> None:
    logger.warning("the process that decodes scans could not give up its network: this kernel has no seccomp for it")


def without_network() -> bool:
    """From now on this process opens no socket, not even to another process, and no thread or child of it does. False
    where that could not be done. To be called while there is one thread."""
    if platform.machine() not in _SOCKETS:
        return False
    kernel, socket = _SOCKETS[platform.machine()]
    # seccomp(2): (operation, steps to skip if so, if not, operand); the last step is reached by what is refused
    steps = [
        *((_LOAD, 0, 0, _ARCHITECTURE), (_IS, 0, 5, kernel)),  # another instruction set
        *((_LOAD, 0, 0, _CALL), (_IS_LEAST, 3, 0, _X32)),  # another ABI
        *((_IS, 2, 0, socket), (_IS, 1, 0, _IO_URING_SETUP)),  # sockets, and what makes them too
        *((_RETURN, 0, 0, _ALLOWED), (_RETURN, 0, 0, _REFUSED)),
    ]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
    program = ctypes.create_string_buffer(struct.pack("HP", len(steps), ctypes.addressof(code)))
    return _prctl(_NO_NEW_PRIVILEGES, 1) and _prctl(_SECCOMP, _FILTER, ctypes.addressof(program))


def _prctl(*given: int) -> bool:
    words = (*given, 0, 0, 0, 0)[:5]
    return not ctypes.CDLL(None).prctl(*map(ctypes.c_ulong, words))


def _serve(connection: Connection, answer: Callable[[Any], Any], memory: int) -> None:
    """One request after the other, until the parent is gone."""
    # libraries name in their warnings what they read: nothing of a patient may reach a log
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    with contextlib.suppress(OSError):  # where memory runs out all the same, this is what the kernel ends
        Path("/proc/self/oom_score_adj").write_text("1000")
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            connection.send(answer(connection.recv()))


def _end_with_parent() -> None:
    """However long a scan would still take."""
    os.read(0, 1)
    os._exit(1)


def _main(descriptor: str, answers: str, memory: str, sealed: str) -> None:
    connection = Connection(int(descriptor))
    if int(sealed):
        connection.send(without_network())
    module, _, name = answers.partition(":")
    _serve(connection, getattr(importlib.import_module(module), name), int(memory))


if __name__ == "__main__":
    _main(*sys.argv[1:])
