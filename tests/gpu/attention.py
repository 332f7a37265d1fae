"""The μ²Tokenizer against the published way of computing the same, and the kernel that each attention runs on."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import parity
import torch
import training
from machine import Machine
from rows import Row, told, within
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import bench_tokenizer as bench

FASTER = 8.0
KERNEL = re.compile(r"aten::_scaled_dot_product_(\w+?)(?:_attention)?(?:_for_cpu)?$")


def check(machine: Machine) -> Iterator[Row]:
    yield from _speed(machine, 64 if machine.small else 2048)
    yield from _attention(machine)


def _speed(machine: Machine, width: int) -> Iterator[Row]:
    if machine.small:
        bench.CHUNKS, bench.TOKENS, bench.TOP_K, bench.QUERIES = 2, 32, 32, 8
    module, visual, text = bench.make(width)
    module, visual, text = (each.to(machine.device) for each in (module, visual, text))
    with torch.no_grad():
        off = parity.relative(module(visual, text).tokens, bench.published_way(module, visual, text))
    yield within("tokenizer", f"E={width}: outputs of the published way and ours, relative difference", off, 1e-2)

    def step(way: Any) -> None:
        module.zero_grad()
        with machine.autocast("bf16"):
            loss = way().square().mean()
        loss.backward()

    ours = machine.timed(lambda: step(lambda: module(visual, text).tokens))
    published = machine.timed(lambda: step(lambda: bench.published_way(module, visual, text)))
    times = published / ours
    what = f"E={width}, bf16, forward + backward: times the loop's speed ({published:.4f} s against {ours:.4f} s)"
    # the aim is a GPU's: a CPU's own matmul does not allow it (docs/model.md)
    verdict = "measured" if machine.small else "ok" if times >= FASTER else "missed"
    yield Row("tokenizer", what, f"≥ {FASTER:g}", f"{times:.1f}×", verdict, times)
    peak, of_what = machine.peak()
    share = 3 * bench.flops(width) / peak / ours
    yield told("tokenizer", f"E={width}: share of the roofline by {of_what}", f"{share:.1%}", share)


def _attention(machine: Machine) -> Iterator[Row]:
    experiment = training.of(machine, "full")
    for name, make in (("contrast", training.contrast), ("SFT", training.supervise)):
        machine.free()
        trainer, batch = make(machine, experiment)
        inputs = {k: v.to(machine.device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
        del inputs["case_ids"]
        model = trainer.model.train()
        with _Named(model) as found, machine.autocast("bf16"):
            model(**inputs)
        for where, kernels in found.kernels.items():
            slow = "math" in kernels
            # on a CPU a learned bias has no other kernel
            verdict = "measured" if not machine.cuda else "missed" if slow else "ok"
            said = ", ".join(sorted(kernels))
            yield Row("attention", f"{name}: kernel of {where}", "none is math", said, verdict)
        del trainer, model


class _Named(TorchFunctionMode):
    """Where `scaled_dot_product_attention` is called in a model (numbers of layers left out) → its kernels."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.kernels: dict[str, set[str]] = {}
        self.model, self.path = model, list[str]()
        self.hooks: list[Any] = []

    def __enter__(self) -> _Named:
        for name, module in self.model.named_modules():
            self.hooks.append(module.register_forward_pre_hook(lambda *_, name=name: self.path.append(name)))
            self.hooks.append(module.register_forward_hook(lambda *_: self.path.pop() and None))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        for hook in self.hooks:
            hook.remove()
        super().__exit__(*error)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.nn.functional.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        with _Operations() as operations:
            output = func(*args, **(kwargs or {}))
        used = {match[1] for name in operations.names if (match := KERNEL.match(name))}
        where = re.sub(r"\.\d+", "", self.path[-1]) if self.path else "the model"
        self.kernels.setdefault(where, set()).update(used or {"math"})
        return output


class _Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))
