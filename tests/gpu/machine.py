"""Where the check runs and how large; times and rates of its device."""

from __future__ import annotations

import contextlib
import datetime
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

PEAKS = {"L4": 121, "A10G": 70, "A100": 312, "H100": 989, "H200": 989}
"""Dense bf16 TFLOP/s of a data sheet, by what torch calls the card."""


@dataclass(frozen=True)
class Machine:
    """`small` takes sizes that a CPU does in seconds; each stage learns for `seconds`; `scratch` is a folder."""

    device: str
    small: bool
    seconds: float
    scratch: Path

    @property
    def cuda(self) -> bool:
        return self.device == "cuda"

    @property
    def name(self) -> str:
        return torch.cuda.get_device_name(0) if self.cuda else "CPU"

    def about(self) -> dict[str, str]:
        memory = torch.cuda.get_device_properties(0).total_memory / 2**30 if self.cuda else 0
        return {
            "device": f"{self.name}, {memory:.0f} GiB" if self.cuda else self.name,
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "size": "small" if self.small else "the paper's",
            "torch": torch.__version__,
        }

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def timed(self, run: Callable[[], object], repeats: int = 3) -> float:
        """Seconds of a run behind a first one: the least of `repeats`."""
        run()
        found = []
        for _ in range(repeats):
            self.wait()
            started = time.perf_counter()
            run()
            self.wait()
            found.append(time.perf_counter() - started)
        return min(found)

    def autocast(self, precision: str) -> torch.autocast:
        return torch.autocast(self.device, torch.bfloat16, enabled=precision == "bf16")

    def peak(self) -> tuple[float, str]:
        """bf16 FLOP/s: of the card's data sheet, else of a product of this machine's own."""
        for card, tflops in PEAKS.items():
            if card in self.name:
                return tflops * 1e12, f"{card}'s data sheet"
        size = 512
        a, b = (torch.randn(size, size, device=self.device, dtype=torch.bfloat16) for _ in range(2))
        return 2 * size**3 / self.timed(lambda: a @ b), "its own matmul"

    def free(self) -> None:
        """Before something large: the caches given back, the record of the peak at zero."""
        if self.cuda:
            import gc

            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


@contextlib.contextmanager
def matmul_precision(name: str):
    """highest: fp32 in fp32; high: TF32 on the GPUs that have it."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
