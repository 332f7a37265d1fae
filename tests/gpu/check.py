"""What a machine with a GPU is to show: `python tests/gpu/check.py [--out gpu-check]` writes one table, twice: as
Markdown and as JSON.

It needs torch, transformers and what `mu2llm.model` imports (NEEDS), no Ray; trl and datasets for DPO, which is
skipped by name without them. `--device cpu --small` runs all of it on a CPU at the least size, for the tests: nothing
that it says of speed means anything. Exits 1 where an aim is missed or a check failed.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import sys
import tempfile
import time
import traceback
from pathlib import Path

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # of several, HF's trainer would use all
sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parent)]

NEEDS = ("torch", "transformers", "peft", "accelerate", "pydantic", "pyarrow", "scipy", "nibabel", "pydicom", "isal",
         "yaml", "jinja2")  # fmt: skip
CHECKS = ("parity", "attention", "training", "writing", "learning")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="the least sizes, for a CPU")
    parser.add_argument("--seconds", type=float, default=60, help="how long each stage learns")
    parser.add_argument("--only", nargs="+", choices=CHECKS, default=CHECKS)
    parser.add_argument("--out", type=Path, default=Path("gpu-check"), help="a folder")
    asked = parser.parse_args()
    missing = [name for name in NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        print(f"not installed here: {', '.join(missing)}; install or carry these packages", file=sys.stderr)
        return 2
    return run(asked)


def run(asked: argparse.Namespace) -> int:
    import torch
    from machine import Machine
    from rows import Row, as_json, markdown

    if asked.device == "cuda" and not torch.cuda.is_available():
        print("torch sees no GPU: run this where there is one, or with --device cpu --small", file=sys.stderr)
        return 2
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as scratch:
        machine = Machine(asked.device, asked.small, asked.seconds, Path(scratch))
        about = machine.about()
        for name in asked.only:
            started = time.perf_counter()
            try:
                for row in importlib.import_module(name).check(machine):
                    rows.append(row)
                    print(f"{row.verdict:<9}{row.what}: {row.measured} (aim {row.aim})", file=sys.stderr, flush=True)
            except Exception as error:  # in the table, with the others' rows, and the exit says so
                traceback.print_exc()
                rows.append(Row(name, "ended with an error", "–", f"{type(error).__name__}: {error}", "failed"))
            about[f"seconds of {name}"] = f"{time.perf_counter() - started:.0f}"
            asked.out.mkdir(parents=True, exist_ok=True)
            (asked.out / "gpu-check.json").write_text(as_json(about, rows))
            (asked.out / "gpu-check.md").write_text(markdown(about, rows))
    print(f"{asked.out}/gpu-check.md, {asked.out}/gpu-check.json")
    return int(any(row.verdict in ("missed", "failed") for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
