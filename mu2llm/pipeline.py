"""The whole way as one resumable function: scans in a bucket → shards → three stages → evaluation → registry.

A step is done once for what decides its result: its settings and the content of its inputs. Another configuration goes
beside what is there and nothing is deleted: the first one's result has the plain name (`checkpoints/sft`), each other's
the plain name and its identity (`checkpoints/sft-4f0c…`); summary.json names those of the last run. `<out>/steps` keeps
whose each place is (places.json), and what was given and how long it took by the step that made each (sft-4f0c….json).
"""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from mu2llm import artefacts, cluster, green, storage, summary, tracking
from mu2llm.artefacts import Identity, open_checkpoint
from mu2llm.cases import Shards, ingest, read_manifest
from mu2llm.cases.ingest import SPLITS
from mu2llm.cases.manifest import check_manifest
from mu2llm.config import Experiment
from mu2llm.ct import phantom
from mu2llm.engine.scans import ScanPlace, report_scans
from mu2llm.errors import UserError
from mu2llm.evaluation.evaluate import compare, render, request_of, scoring
from mu2llm.evaluation.promotion import promote
from mu2llm.evaluation.report import PAGE
from mu2llm.evaluation.results import Results
from mu2llm.memory import PeakMemory
from mu2llm.places import Places
from mu2llm.progress import Counted, Logged, Steps, counted, logged
from mu2llm.records import Checkpoint
from mu2llm.stages import contrastive, dpo, sft
from mu2llm.stages.job import finished
from mu2llm.stages.preferences import Preferences, identify, prefer

STAGES: dict[str, Any] = {"contrastive": contrastive, "sft": sft, "dpo": dpo}
BUCKET = "s3://mu2llm-demo"
TRAINED, EVALUATED = "train", "test"  # splits


@dataclass(frozen=True)
class Source:
    """Where the cases come from: the URI of a manifest, and the root of its relative paths."""

    manifest: str
    volumes: str
    format: str = "jsonl"


class Step(BaseModel):
    """A finished step: what decided it, what it gave, how long it took."""

    identity: str
    inputs: dict[str, Any] = {}
    seconds: float
    result: dict[str, Any]


class Pipeline:
    """Runs steps in order below `out`, each once. `done` holds the finished ones by name."""

    def __init__(self, out: str, experiment: Experiment, show: Steps) -> None:
        self.out, self.experiment, self.show = out, experiment, show
        self.places = Places.open(out)
        self.done: dict[str, Step] = {}
        self.started = time.time()

    def step(
        self, name: str, identity: Identity, work: Callable[[], dict[str, Any]], place: str | None = None
    ) -> dict[str, Any]:
        """Does a step, or takes what it gave before if that still lies at `place` and was the same."""
        made = place.rpartition("/")[2] if place else name
        path = storage.join(self.out, "steps", f"{made}.json")
        found = Step.model_validate(storage.read_json(path)) if storage.exists(path) else None
        there = place is None or storage.exists(place)
        if found and found.identity == identity.digest and there:
            self.done[name] = found
            return found.result
        started = time.monotonic()
        result = work()
        seconds = time.monotonic() - started + (found.seconds if found and place and there else 0)
        self.done[name] = Step(
            identity=identity.digest, inputs=identity.inputs, seconds=round(seconds, 2), result=result
        )
        storage.write_json(path, self.done[name].model_dump(mode="json"))
        return result

    def place(self, plain: str, identity: Identity) -> str:
        """Where the result of that identity lies, or is to: `plain` if it was the first there, else beside it."""
        return self.places.take(plain, identity.digest)

    def spent(self, peak_gib: float) -> dict[str, Any]:
        """Seconds by step and peak memory, of all runs that it took."""
        path = storage.join(self.out, "steps", "peak.json")
        before = storage.read_json(path)["gib"] if storage.exists(path) else 0.0
        storage.write_json(path, {"gib": (peak := round(max(peak_gib, before), 3))})
        seconds = {name: step.seconds for name, step in self.done.items()}
        return {"seconds": {**seconds, "total": round(sum(seconds.values()), 2)}, "peak_memory_gib": peak}

    def progress(self, name: str) -> Counted:
        return counted(self.show, name)

    def training(self, name: str) -> Logged:
        return logged(self.show, name)


def demo(experiment: Experiment, out: str, scans: list[str], show: Steps) -> dict[str, Any]:
    """The pipeline on phantoms in the embedded S3 server's bucket; gives, and writes, summary.json."""
    folder = Path(out).resolve()
    # the server first: Ray's workers inherit the environment that leads to it
    with storage.embedded_s3(folder / "s3"), cluster.session():
        filesystem, _ = storage.resolve(BUCKET)
        filesystem.create_dir(BUCKET.removeprefix("s3://"))
        pipeline = Pipeline(str(folder), experiment, show)
        settings = experiment.data.phantom
        identity = Identity.of({**artefacts.decides("data.phantom", settings), "seed": experiment.seed})
        raw = pipeline.place(f"{BUCKET}/scans", identity)

        def phantoms() -> dict[str, Any]:
            phantom.write(
                raw,
                settings.cases,
                experiment.seed,
                settings.prevalence,
                pipeline.progress("phantoms"),
                settings.nodules,
            )
            return {"cases": settings.cases}

        pipeline.step("phantoms", identity, phantoms, raw)
        return _whole(pipeline, Source(f"{raw}/manifest.jsonl", raw), f"{BUCKET}/shards", scans)


def run(
    experiment: Experiment, out: str, source: Source, show: Steps, scans: Sequence[str] = (), fresh: bool = False
) -> dict[str, Any]:
    """The pipeline on cases of one's own, everything below the URI `out`, on the Ray that is joined.

    Run again with the same `out`, it goes on at the step that is not done; `fresh` removes what it made there and
    starts over. Raises UserError where the manifest gives no case, Failure where a step failed; what was finished is
    kept.
    """
    out = storage.absolute(out)
    check_manifest(source.manifest, source.format)  # before anything is removed
    if fresh:
        clear(out)
    return _whole(Pipeline(out, experiment, show), source, storage.join(out, "shards"), scans)


def _whole(pipeline: Pipeline, source: Source, plain_shards: str, scans: Sequence[str]) -> dict[str, Any]:
    """Everything from a manifest to the summary, below the pipeline's `out`."""
    with PeakMemory() as memory:
        shards, ingestion = _ingest(pipeline, source, plain_shards)
        checkpoints, pairs = _train(pipeline, shards)
        evaluation = _evaluate(pipeline, shards, checkpoints)
        results = Results.open(evaluation)
        best = _register(pipeline, checkpoints, results)
        settings = pipeline.experiment
        places = [ScanPlace.given(path) for path in scans]
        reports = report_scans(best["checkpoint"], places, settings.evaluation, settings.data.accept) if scans else []
    page = storage.join(evaluation, PAGE)
    if storage.exists(page):
        storage.write_bytes(storage.join(pipeline.out, PAGE), storage.read_bytes(page))
    told = {
        **summary.results_of(settings, checkpoints, Preferences.open(pairs), results),
        **{"ingest": ingestion, "registered": best, "scans": reports},
        "checkpoints": {**checkpoints, "best": best["checkpoint"]},
        **pipeline.spent(memory.gib),
    }
    storage.write_json(storage.join(pipeline.out, summary.FILE), told)
    pipeline.places.finished(pipeline.started)
    return told


def _ingest(pipeline: Pipeline, source: Source, plain: str) -> tuple[str, dict[str, Any]]:
    """The shards' URI, and what `ingest` told. A manifest that has grown, and cases that are excluded, are gone on with
    at the same place."""
    data = pipeline.experiment.data
    settings = artefacts.decides("data", data, leave_out=("phantom", "fraction", "shuffle_rows", "exclude"))
    whence = {"manifest": source.manifest, "format": source.format, "volumes": source.volumes, **settings}
    shards = pipeline.place(plain, Identity.of(whence))

    def work() -> dict[str, Any]:
        table = read_manifest(source.manifest, source.format, source.volumes, data)
        _check_splits(Counter(case.split for case in table.cases if case.split), source.manifest)
        return ingest(table, shards, pipeline.experiment, pipeline.progress("ingest"))

    excluded = {"data.exclude": sorted(data.exclude)} if data.exclude else {}
    identity = Identity.of({**whence, **excluded, "contents": _contents(source.manifest)})
    told = pipeline.step("ingest", identity, work, shards)
    made = Shards.open(shards)
    _check_splits({split: made.count(split) for split in SPLITS}, shards)  # rejections may have emptied one
    return shards, told


def _check_splits(counts: Mapping[str, int], where: str) -> None:
    """A UserError, days before it would be found, where there is nothing to train or to evaluate on."""
    empty = [split for split in (TRAINED, EVALUATED) if not counts.get(split)]
    if empty:
        there = ", ".join(f"{split} {count}" for split, count in sorted(counts.items()) if count) or "no cases"
        raise UserError(
            f"{where} has no case in split {empty[0]}, and the pipeline trains on {TRAINED} and evaluates on "
            f"{EVALUATED}; there are {there}: put cases into it in the manifest, or leave the split to data.split"
        )


def _contents(manifest: str) -> str:
    """Digest of a manifest's bytes; of the names and sizes of its files where it is a folder."""
    if storage.is_file(manifest):
        return hashlib.sha256(storage.read_bytes(manifest)).hexdigest()
    return artefacts.digest([[each.path, each.size] for each in storage.list_files(manifest)])


def _train(pipeline: Pipeline, shards: str) -> tuple[dict[str, str], str]:
    """The three stages and the pairs between them: the checkpoints' URIs by stage, and the pairs'."""
    experiment = pipeline.experiment

    def trained(stage: str, data: str, init: str | None) -> str:
        plain = storage.join(pipeline.out, "checkpoints", stage)
        job = STAGES[stage].job_of(data, plain, experiment, init)
        out = pipeline.place(plain, job.identity)
        finished(job.model_copy(update={"out": out}))  # refuses what somebody else trained there

        def work() -> dict[str, Any]:
            made = STAGES[stage].run(data, out, experiment, init, pipeline.training(stage))
            return dict(made.training.model_dump())

        pipeline.step(stage, job.identity, work, out)
        return out

    vision = trained("contrastive", shards, None)
    writer = trained("sft", shards, vision)
    identity = identify(writer, Shards.open(shards), experiment)
    pairs = pipeline.place(storage.join(pipeline.out, "preferences"), identity)

    def preferred() -> dict[str, Any]:
        return prefer(writer, shards, pairs, experiment, None, pipeline.progress("preferences")).model_dump()

    pipeline.step("preferences", identity, preferred, pairs)
    return {"contrastive": vision, "sft": writer, "dpo": trained("dpo", pairs, writer)}, pairs


def _evaluate(pipeline: Pipeline, shards: str, checkpoints: dict[str, str]) -> str:
    """SFT and DPO on the held-out patients, in one pass: the evaluation's URI."""
    experiment = pipeline.experiment
    compared = {stage: checkpoints[stage] for stage in ("sft", "dpo")}
    request = request_of(compared, Shards.open(shards), EVALUATED, experiment).identity.inputs
    judge = green.decides(experiment.judge)
    out = pipeline.place(storage.join(pipeline.out, "evaluation"), Identity.of({**request, **judge}))

    def work() -> dict[str, Any]:
        results = compare(compared, shards, out, experiment, EVALUATED, pipeline.progress("evaluate"))
        return {run: results.summary(run)["green"] for run in compared}

    pipeline.step("evaluate", Identity.of({**request, **scoring(experiment).inputs}), work, out)
    render(out, experiment)  # which does nothing unless another number of pages is asked for
    return out


def _register(pipeline: Pipeline, checkpoints: dict[str, str], results: Results) -> dict[str, Any]:
    """The best by GREEN of those that pass their audit becomes champion; if none does, the best has no alias."""

    def work() -> dict[str, Any]:
        scores = {run: results.runs[run].metrics["green"] for run in ("sft", "dpo")}
        ranked = sorted(scores, key=lambda run: -estimate.value if (estimate := scores[run]) else 0.0)
        passing = [run for run in ranked if results.runs[run].audit.passed]
        best = (passing or ranked)[0]
        if not passing:
            version = tracking.register(open_checkpoint(checkpoints[best]))
            return {"run": best, "checkpoint": checkpoints[best], "version": version, "alias": None}
        promoted = promote(checkpoints[best])
        return {"run": best, "checkpoint": checkpoints[best], "version": promoted.version, "alias": promoted.alias}

    decides = {"store": tracking.store(), "evaluation": results.header.identity, **results.scored_by}
    return pipeline.step("register", Identity.of({**decides, **checkpoints}), work)


def check_out(out: str) -> None:
    """The demo's folder must be a local one: the embedded S3 server serves it."""
    if storage.is_remote(out):
        raise UserError(f"--out {out}: the demo needs a local folder, which its embedded S3 server serves")


def clear(out: str) -> None:
    """Removes what the pipeline made below `out`: what `--fresh` does. Other files there are left alone."""
    for place in Places.open(out).uris():
        if storage.exists(storage.join(place, Checkpoint.FILE)):
            tracking.release(place)
        artefacts.discard(place)
        storage.delete(f"{place}.state")
    for name in (summary.FILE, PAGE, "steps"):
        storage.delete(storage.join(out, name))
