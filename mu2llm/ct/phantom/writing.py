"""Many phantoms into storage: volumes and a manifest."""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from functools import partial

from mu2llm import storage
from mu2llm.ct.phantom.making import make
from mu2llm.errors import Failure, UserError
from mu2llm.progress import Counted

PARALLEL_FROM = 64  # cases from which it pays to start processes
BATCH = 8  # cases handed to a process at a time


def write(
    out: str,
    cases: int,
    seed: int,
    prevalence: float = 0.2,
    progress: Counted | None = None,
    nodules: str = "balls",
) -> str:
    """Writes `<out>/volumes/<id>.nii.gz` and, last, `<out>/manifest.jsonl`; gives the manifest's URI.

    `progress` is called with (done, all). Many cases are made in new processes (spawn), so a script that calls this
    needs the usual `if __name__ == "__main__":`. A Failure says why it could not be done.
    """
    if cases < 1:
        raise UserError(f"phantoms: expected one case or more, given {cases}")
    lines: list[str] = []
    manifest = storage.join(out, "manifest.jsonl")
    try:
        for written in _written(out, cases, seed, prevalence, nodules):
            lines += written
            if progress:
                progress(len(lines), cases)
        storage.write_bytes(manifest, "".join(f"{line}\n" for line in lines).encode())
    except (OSError, BrokenExecutor) as error:
        raise Failure(f"{out}: the phantoms could not be written: {error}") from error
    return manifest


def _written(out: str, cases: int, seed: int, prevalence: float, nodules: str) -> Iterator[list[str]]:
    """The manifest's lines, batch by batch in order, each once its volumes are in storage."""
    batches = [range(start, min(start + BATCH, cases)) for start in range(0, cases, BATCH)]
    write_batch = partial(_write_batch, out, seed, prevalence, nodules)
    workers = min(os.cpu_count() or 1, 16)
    if cases < PARALLEL_FROM or workers == 1:
        yield from map(write_batch, batches)
        return
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(write_batch, batches)


def _write_batch(out: str, seed: int, prevalence: float, nodules: str, indexes: range) -> list[str]:
    lines = []
    for index in indexes:
        phantom = make(seed, index, prevalence, nodules)
        row = phantom.row()
        storage.write_bytes(storage.join(out, row["volume"]), phantom.nifti())
        lines.append(json.dumps(row))
    return lines
