"""How often a program waits for its device: counted by CUDA itself, or on a CPU by the operations that would."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

READS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal")


class Synchronisations:
    """`count` of them while it is on, and what asked for them."""

    def __init__(self, device: str) -> None:
        self.device, self.causes = device, list[str]()

    @property
    def count(self) -> int:
        return len(self.causes)

    def __enter__(self) -> Synchronisations:
        if self.device == "cuda":
            torch.cuda.synchronize()
            self._caught = warnings.catch_warnings(record=True)
            self._warned = self._caught.__enter__()
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
        else:
            self._mode = _Reads(self.causes)
            self._mode.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        if self.device == "cuda":
            torch.cuda.set_sync_debug_mode("default")
            self._caught.__exit__(*error)
            waits = [each for each in self._warned if "synchronizing" in str(each.message)]
            self.causes += [f"{each.filename}:{each.lineno}" for each in waits]
        else:
            self._mode.__exit__(*error)


class _Reads(TorchDispatchMode):
    def __init__(self, causes: list[str]) -> None:
        super().__init__()
        self.causes = causes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        masked = name.startswith("aten::index") and any(
            isinstance(each, torch.Tensor) and each.dtype == torch.bool
            for given in args[1:2]
            if isinstance(given, list | tuple)
            for each in given
        )
        if name in READS or masked:
            self.causes.append(name)
        return func(*args, **(kwargs or {}))
