"""What scaling costs on Ray's own autoscaler: `python tests/benchmarks/bench_autoscaling.py [ingest sweep …]`.

A head without CPUs and fake nodes of this machine (tests/cluster/growing.py), which come in about a second: what is
measured is what Ray and we take to ask for a node, to use it and to let it go; a cloud's minutes for a machine come on
top. Models and scans are of the least size.

ingest   starts without a node with CPUs
sweep    64 trials of DPO whose training is a stub, on up to eight nodes, killed after 20 and resumed
sft      one to two workers: one waits for its node, one node is taken in the middle of the training
service  a generator under load to three and back; the scorer from none to one and back
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import ray
import ray.train
from ray import cloudpickle, serve

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS), *(str(TESTS / name) for name in ("cluster", "engine", "serving"))]

from growing import IDLE_S, Growing, Watcher, joined, nodes  # noqa: E402

from mu2llm import cases, config, private_apis, tracking  # noqa: E402
from mu2llm.cases import Shards  # noqa: E402
from mu2llm.cluster import session  # noqa: E402
from mu2llm.ct import phantom  # noqa: E402

SCANS = 48
TRIALS, KILLED = 64, 20
STEPS = 400  # of SFT
REQUESTS_S = 60.0  # of load on the service


def wait_for(true: Callable[[], object], seconds: float = 300) -> float:
    """Seconds until it is so; a TimeoutError where it never is."""
    started = time.monotonic()
    while not true():
        if time.monotonic() - started > seconds:
            raise TimeoutError(f"it was not so within {seconds:.0f} s")
        time.sleep(0.2)
    return time.monotonic() - started


def line(what: str, **numbers: object) -> None:
    told = ", ".join(f"{name.replace('_', ' ')} {_shown(value)}" for name, value in numbers.items())
    print(f"{what:<10}{told}", flush=True)


def _shown(value: object) -> str:
    return f"{value:.1f}" if isinstance(value, float) else str(value)


def ingest(folder: Path) -> None:
    phantom.write(str(folder / "scans"), SCANS, 0)
    experiment = config.load("tiny")
    table = cases.read_manifest(f"{folder}/scans/manifest.jsonl", "jsonl", f"{folder}/scans", experiment.data)
    with Growing(1, 3) as cluster, joined(cluster), Watcher() as watcher:
        first: list[float] = []
        assert not nodes()
        scales, limits = private_apis.scales_itself(), private_apis.cluster_limits()
        cases.ingest(table, f"{folder}/shards", experiment, lambda *_: first.append(watcher.seconds))
        done = watcher.seconds
        gone = wait_for(lambda: not nodes())
    there = sum(Shards.open(f"{folder}/shards").count(split) for split in ("train", "validation", "test"))
    line(
        "ingest",
        scans=f"{there} of {SCANS}",
        first_node_s=watcher.first(1),
        most_nodes=watcher.most,
        first_scans_s=first[0],
        done_s=done,
        scales_itself=scales,
        tells_its_limits=limits is not None,
        **{f"all_nodes_gone_s_later_(idle_{IDLE_S})": gone},
    )


# ---- sweeps


def no_training(plan: Any, point: Any, report: Callable[[dict[str, Any]], None]) -> None:
    """A trial that costs nothing: what it measures, its parameters decide."""
    beta = float(point.params["dpo.beta"])
    for step in range(1, plan.base.sweep.reports + 1):
        ended = step == plan.base.sweep.reports
        report({"green": 1 - abs(beta - 0.1), "kl": 0.01 / beta, "step": float(step), "n": 8.0, "ended": ended})


def swept(folder: Path, told: Callable[[float, float, dict[str, float]], None]) -> tuple[int, list[Any], list[Any]]:
    """(trials at once, those that had ended before, all) of the sweep in a folder, on the Ray that is joined."""
    from mu2llm.stages.job import Watch
    from mu2llm.sweeps import runner
    from mu2llm.sweeps.space import Space
    from mu2llm.sweeps.study import Study, database
    from mu2llm.sweeps.trial import Plan, Point

    settings = ["sweep.workers_per_trial=0", "sweep.scheduler=none", "sweep.reports=2", "dpo.cpus_per_worker=1"]
    experiment = config.load("tiny", settings)
    space = Space.load("dpo", experiment)
    plan = Plan(
        kind="dpo",
        stage="dpo",
        experiment=experiment.model_dump(mode="json"),
        domains=space.domains,
        data=f"{folder}/pairs",
        init=f"{folder}/sft",
        shards=f"{folder}/shards",
        checksum="none",
        out=f"{folder}/sweep",
        watch=Watch(times=2, cases=8, kl=True),
    )
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    runner.run = no_training  # type: ignore[assignment]
    study = Study(database(plan.out, None), "sweep", experiment.sweep.objective, Point(seed=0), space)
    before = study.trials()
    trials = runner.run_trials(plan, study, [], told, TRIALS)
    return runner.concurrency(experiment.dpo, experiment.sweep), before, trials


def sweep_until_killed(folder: Path, address: str) -> None:
    def told(done: float, total: float, numbers: dict[str, float]) -> None:
        if done >= KILLED:
            os._exit(9)

    with session(address):
        swept(folder, told)


def sweep(folder: Path) -> None:
    ended: list[float] = []
    with Growing(1, 8) as cluster, joined(cluster), Watcher() as watcher:
        killed = subprocess.run([sys.executable, __file__, "--killed", str(folder), cluster.gcs], check=False)
        assert killed.returncode == 9
        at, cpu = watcher.seconds, time.process_time()
        at_once, before, trials = swept(folder, lambda *_: ended.append(time.monotonic()))
        cpu, seconds = time.process_time() - cpu, watcher.seconds - at
    line(
        "sweep",
        trials=f"{len(trials)} of {TRIALS}, {len({t.id for t in trials})} of them distinct",
        at_once="as many as the cluster brings" if at_once > TRIALS else at_once,
        most_nodes=watcher.most,
        first_node_s=watcher.first(1),
        all_nodes_s=watcher.first(watcher.most),
        ended_before_the_kill=len(before),
        of_these_there_again_at_the_end=len({t.id for t in before} & {t.id for t in trials}),
        the_others_in_s=seconds,
        driver_s_a_trial=cpu / (len(trials) - len(before)),
        median_s_between_two=statistics.median(b - a for a, b in itertools.pairwise(ended)),
    )


# ---- training


def sft(folder: Path) -> None:
    from small_runs import case, least, write_checkpoint, write_shards

    from mu2llm.stages import sft as stage

    data, steps = str(folder / "data"), STEPS
    write_shards(data, [case(i) for i in range(40)], "train", least())
    init = write_checkpoint(str(folder / "init"), 0, "contrastive")
    plain = least().model_dump(mode="json", exclude_defaults=True)
    plain["sft"] = {
        **{"workers": [1, 2], "cpus_per_worker": 2, "max_steps": steps, "batch_size": 4, "save_steps": 20},
        **{"log_steps": 1, "freeze_vision": False, "max_failures": 3},
    }
    experiment = config.validate(plain)
    told: list[tuple[float, float, float]] = []
    taken: list[float] = []
    often = functools.partial(ray.train.ScalingConfig, elastic_resize_monitor_interval_s=2)  # by itself every minute
    ray.train.ScalingConfig = often  # type: ignore[misc,assignment]
    with Growing(2, 2) as cluster, joined(cluster), Watcher() as watcher:
        holder = Holder.remote()  # type: ignore[attr-defined]
        ray.get(holder.__ray_ready__.remote())

        def grown_at() -> float:
            return next((step for _, step, workers in told if workers == 2), float(STEPS))

        def follow(numbers: dict[str, float]) -> None:
            if "workers" in numbers and "step" in numbers:
                told.append((watcher.seconds, numbers["step"], numbers["workers"]))
                if numbers["step"] == 6:
                    ray.kill(holder)
                if numbers["workers"] == 2 and not taken and numbers["step"] > grown_at() + 60:
                    taken.append(watcher.seconds)
                    take_a_node()

        checkpoint = stage.run(data, str(folder / "elastic"), experiment, init, progress=follow)
        done = watcher.seconds
    sizes = [
        int(n) for n, before in zip([w for *_, w in told], [0.0, *[w for *_, w in told]], strict=False) if n != before
    ]
    again = next(at for at, *_ in told if taken and at > taken[0])
    line(
        "sft",
        workers_in_turn=" → ".join(map(str, sizes)),
        first_step_s=told[0][0],
        grown_s_after_room=next(at for at, _, w in told if w == 2) - next(at for at, s, _ in told if s == 6),
        next_step_s_after_a_node_was_taken=again - taken[0],
        steps=f"{checkpoint.training.steps} of {steps}",
        cases_seen=f"{checkpoint.training.cases_seen} of {steps * 4}",
        done_s=done,
    )


@ray.remote(num_cpus=2)
class Holder:
    """Fills a node."""


def take_a_node() -> None:
    """Kills the raylet of a node with a training worker, and what runs on it, as when a spot machine goes."""
    found = [
        each
        for each in psutil.process_iter(["name", "cmdline"])
        if each.info["name"] == "raylet" and any("fffffffffffff" in word for word in each.info["cmdline"] or [])
    ]
    raylet = found[-1]
    for process in [*raylet.children(recursive=True), raylet]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


# ---- the service


def service(folder: Path) -> None:
    from small_service import free_port, wait_until_ready
    from small_writer import FIRST, write_checkpoint

    from mu2llm.serving.app import NAME, Settings
    from mu2llm.serving.running import running

    checkpoint = write_checkpoint(str(folder / "served"), FIRST)
    given = config.load(
        "demo",
        [
            *(f"serving.{name}.cpus=1" for name in ("generator", "reader")),
            *(f"serving.{name}.downscale_delay_s=10" for name in ("generator", "scorer")),
            *(f"serving.{name}.upscale_delay_s=3" for name in ("generator", "scorer")),
            "serving.generator.max_replicas=3",
            "serving.generator.target_ongoing_requests=1",
            "serving.scorer.min_replicas=0",
            "serving.scorer.cpus=1",
            f"serving.state={folder}/state",
            "serving.authentication=off",
        ],
    )
    settings = Settings(
        checkpoint=checkpoint,
        tracking=f"sqlite:///{folder}/served.db",
        loopback=True,
        serving=given.serving,
        judge=given.judge,
    )
    port, scan = free_port(), phantom.make(3, 1).nifti()
    with Growing(2, 4) as cluster, joined(cluster), Watcher() as watcher, running(settings, "127.0.0.1", port) as url:
        wait_until_ready(url)
        ready = watcher.seconds
        started = time.monotonic()
        answer = httpx.post(f"{url}/v1/green", json={"pairs": [{"reference": FIRST, "candidate": FIRST}]}, timeout=300)
        first_judgement = time.monotonic() - started
        replicas: list[tuple[float, int]] = []
        stop = threading.Event()

        def running_replicas(name: str) -> int:
            states = serve.status().applications[NAME].deployments[name].replica_states
            return sum(count for state, count in states.items() if state == "RUNNING")

        def watch() -> None:
            while not stop.wait(0.5):
                replicas.append((time.monotonic() - started, running_replicas("ReportGenerator")))

        watching = threading.Thread(target=watch, daemon=True)
        started = time.monotonic()
        watching.start()
        statuses = load(url, scan, 8)
        grown = max(count for _, count in replicas)
        up = next((at for at, count in replicas if count == grown), 0.0)
        back = wait_for(lambda: running_replicas("ReportGenerator") == 1)
        scorer_gone = wait_for(lambda: running_replicas("GreenScorer") == 0)
        stop.set()
        watching.join()
    line(
        "service",
        ready_s=ready,
        first_judgement_from_no_scorer_s=first_judgement,
        its_status=answer.status_code,
        generators=f"1 → {grown} → 1",
        most_generators_s=up,
        back_to_one_s_after_the_load=back,
        scorer_none_again_s_later=scorer_gone,
        answers=json.dumps({str(k): statuses.count(k) for k in sorted(set(statuses))}),
        most_nodes=watcher.most,
    )


def load(url: str, scan: bytes, clients: int) -> list[int]:
    """So many clients that each ask again when they are answered: the statuses of all answers."""
    statuses: list[int] = []
    until = time.monotonic() + REQUESTS_S

    def client() -> None:
        with httpx.Client(base_url=url, timeout=300) as made:
            while time.monotonic() < until:
                statuses.append(made.post("/v1/reports", files={"scan": ("a.nii.gz", scan)}).status_code)

    threads = [threading.Thread(target=client) for _ in range(clients)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    return statuses


PARTS = {each.__name__: each for each in (ingest, sweep, sft, service)}


@contextlib.contextmanager
def own_store(folder: Path) -> Iterator[None]:
    os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{folder}/mu2llm.db"
    tracking.store()
    yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--killed", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.killed:
        sweep_until_killed(Path(given.killed[0]), given.killed[1])
    for name in given.parts or PARTS:
        with tempfile.TemporaryDirectory(prefix="mu") as folder, own_store(Path(folder)):
            PARTS[name](Path(folder))


if __name__ == "__main__":
    main()
