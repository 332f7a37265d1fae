"""A stage's loop in gloo processes in place of Ray Train's workers: the same numbers, without a cluster to start.

The processes are forked from a server that has loaded torch, transformers and the stages, so that none pays for it.
`train` stands for `launch.run`: with it patched in, `sft.run(…)` trains here, on as many processes as the settings
have workers.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import shutil
import signal
import socket
from multiprocessing.connection import wait
from pathlib import Path

from mu2llm.cases import stream
from mu2llm.stages import launch
from mu2llm.stages.worker import RayTrainWorker, current_worker, work

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["__main__", "mu2llm.stages.contrastive", "mu2llm.stages.sft", "mu2llm.stages.dpo"])
launch_run = launch.run  # as it is where nothing is patched


class GlooWorker(RayTrainWorker):
    """Where a process stands among the others; the intermediate checkpoints of all ranks come together in a folder."""

    def __init__(self, rank: int, world: int, kept: Path) -> None:
        self._rank, self._world, self.kept = rank, world, kept

    rank = property(lambda self: self._rank)
    world = property(lambda self: self._world)

    def report(self, metrics, folder=None, validate=None):
        import torch.distributed as dist

        if folder is None:
            return
        shutil.copytree(folder, self.kept / f"{metrics['saved_step']:08d}", dirs_exist_ok=True)
        dist.barrier()
        if self.rank == 0:
            (self.kept / "whole").write_text(f"{metrics['saved_step']:08d}")

    def uploaded(self):
        pass

    def done(self):
        pass

    def preempted(self):
        return False

    def checkpoint(self):
        whole = self.kept / "whole"
        return str(self.kept / whole.read_text()) if whole.exists() else None


class Rows:
    """What Ray Data would stream, read here."""

    def __init__(self, source, order, share, num_cpus, alone):
        self.source, self.order, self.share = source, order, share

    def iter_batches(self, batch_size, **_):
        for first in range(0, len(self.share), batch_size):
            positions = self.share.positions(first, first + batch_size)
            items = self.order.items(positions)
            yield {**self.source.read(items), "row": positions, "item": items}


def train(job, loop, progress=None, held_out=None):
    """As `launch.run`, with `job.settings.workers` processes; goes on at the last checkpoint while some are killed."""
    if job.settings.workers == 0:
        return launch_run(job, loop, progress, held_out)
    kept = Path(f"{job.out}.gloo")
    kept.mkdir(parents=True)
    for _ in range(1 + job.settings.max_failures):
        if all(code == 0 for code in _attempt(job, loop, kept)):
            return launch._publish(job, None)
    raise AssertionError(f"{job.out}: the processes died again and again")


def _attempt(job, loop, kept):
    """The exit codes of the processes; where one is killed, as a machine's end kills it, the others end with it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port, world = probe.getsockname()[1], job.settings.workers
    processes = [SERVER.Process(target=_rank, args=(job, loop, rank, world, port, kept)) for rank in range(world)]
    for process in processes:
        process.start()
    running = list(processes)
    while running and not any(process.exitcode for process in processes):
        ended = wait([process.sentinel for process in running])
        running = [process for process in running if process.sentinel not in ended]
    codes = [process.exitcode for process in processes]
    assert not any(codes) or -signal.SIGKILL in codes, f"the processes ended with {codes}: see their traceback"
    for process in processes:
        process.kill()
        process.join()
    return codes


def _rank(job, loop, rank, world, port, kept):
    import torch.distributed as dist

    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in names.items()}, MASTER_ADDR="127.0.0.1")
    stream.blocks = Rows
    dist.init_process_group("gloo")
    current_worker.set(GlooWorker(rank, world, kept))
    try:
        work({"job": job.model_dump(), "loop": loop})
        dist.barrier()
    finally:
        with contextlib.suppress(RuntimeError):
            dist.destroy_process_group()
