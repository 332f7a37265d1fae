"""The whole way as one resumable function: scans in a bucket → shards → three stages → evaluation → registry.

A step that is done is not done again unless what decides its result has changed: its own part of the
configuration, or an earlier step. What each took lies in `<out>/steps/<step>.json`.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from rich.table import Table

from mu2llm import artefacts, cluster, storage, tracking
from mu2llm.artefacts import open_checkpoint
from mu2llm.cases import Shards, ingest, read_manifest
from mu2llm.cases.shards import INDEX
from mu2llm.config import Experiment
from mu2llm.ct import phantom
from mu2llm.engine.scans import report_scans
from mu2llm.errors import UserError
from mu2llm.evaluation.evaluate import compare
from mu2llm.evaluation.promotion import promote
from mu2llm.evaluation.results import TITLES, Results
from mu2llm.memory import PeakMemory
from mu2llm.records import Checkpoint
from mu2llm.stages import contrastive, dpo, sft
from mu2llm.stages.preferences import Preferences, prefer

BUCKET = "s3://mu2llm-demo"
Show = Callable[[str, float, float, dict[str, float]], None]
"""(step, done, of how many, numbers)"""


@dataclass(frozen=True)
class Source:
    """Where the cases come from: the URI of a manifest, and the root of its relative paths."""

    manifest: str
    volumes: str
    format: str = "jsonl"


class Step(BaseModel):
    """A finished step: what decided it, what it gave, how long it took."""

    identity: str
    seconds: float
    result: dict[str, Any]


class Pipeline:
    """Runs steps in order below `out`, each once. `done` holds the finished ones by name."""

    def __init__(self, out: str, experiment: Experiment, show: Show) -> None:
        self.out, self.experiment, self.show = out, experiment, show
        self.done: dict[str, Step] = {}
        self.identity = ""

    def step(self, name: str, decides: Any, work: Callable[[], dict[str, Any]], outputs: list[str]) -> dict[str, Any]:
        """Does a step, or takes its result from an earlier run; `outputs` are removed before it is done otherwise."""
        self.identity = artefacts.digest([self.identity, name, decides])
        path = storage.join(self.out, "steps", f"{name}.json")
        marker = storage.join(self.out, "steps", f"{name}.started")
        made = storage.exists(path) or storage.exists(marker)
        if storage.exists(path):
            found = Step.model_validate(storage.read_json(path))
            if found.identity == self.identity:
                self.done[name] = found
                return found.result
            storage.write_bytes(marker, b"")  # outputs are there, and of another configuration
            storage.delete(path)
        if not storage.exists(marker) or storage.read_bytes(marker).decode() != self.identity:
            for output in outputs:  # of another configuration; what an interrupted run left of this one is kept
                _remove(output, made)
            storage.write_bytes(marker, self.identity.encode())
        started = time.monotonic()
        result = work()
        self.done[name] = Step(identity=self.identity, seconds=round(time.monotonic() - started, 2), result=result)
        storage.write_json(path, self.done[name].model_dump(mode="json"))
        storage.delete(marker)
        return result

    def progress(self, name: str) -> Callable[[int, int], None]:
        return lambda done, total: self.show(name, done, total, {})

    def training(self, name: str) -> Callable[[dict[str, float]], None]:
        return lambda numbers: self.show(name, numbers.get("step", 0), numbers["total"], numbers)


def _remove(output: str, made: bool) -> None:
    """Deletes what a step made; an alias of the registry does not go over to what takes its place."""
    if not storage.exists(output):
        return
    if not made:
        raise UserError(f"{output} is there already and no pipeline made it: give another --out, or delete it yourself")
    _release(output)
    storage.delete(output)


def _release(checkpoint: str) -> None:
    """Takes the registry's aliases from a checkpoint that goes."""
    if storage.exists(storage.join(checkpoint, Checkpoint.FILE)):
        gone = storage.absolute(storage.lasting(checkpoint))
        for alias in [alias for alias, uri in tracking.aliases().items() if uri == gone]:
            tracking.drop_alias(alias)


def demo(experiment: Experiment, out: str, scans: list[str], show: Show) -> dict[str, Any]:
    """The pipeline on phantoms in the embedded S3 server's bucket; gives, and writes, summary.json."""
    folder = Path(out).resolve()
    # the server first: Ray's workers inherit the environment that leads to it
    with storage.embedded_s3(folder / "s3"), cluster.session():
        filesystem, _ = storage.resolve(BUCKET)
        filesystem.create_dir(BUCKET.removeprefix("s3://"))
        pipeline = Pipeline(str(folder), experiment, show)
        raw, settings = f"{BUCKET}/scans", experiment.data.phantom

        def phantoms() -> dict[str, Any]:
            phantom.write(raw, settings.cases, experiment.seed, settings.prevalence, pipeline.progress("phantoms"))
            return {"cases": settings.cases}

        decides = [settings.model_dump(), experiment.seed]
        pipeline.step("phantoms", decides, phantoms, [raw])
        return _whole(pipeline, Source(f"{raw}/manifest.jsonl", raw), f"{BUCKET}/shards", scans)


def run(
    experiment: Experiment, out: str, source: Source, show: Show, scans: Sequence[str] = (), fresh: bool = False
) -> dict[str, Any]:
    """The pipeline on cases of one's own, everything below the URI `out`, on the Ray that is joined.

    Run again with the same `out`, it goes on at the step that is not done. Raises UserError where the manifest gives
    no case, Failure where a step failed; what was finished is kept.
    """
    out = storage.absolute(out)
    if fresh:
        clear(out)
    return _whole(Pipeline(out, experiment, show), source, storage.join(out, "shards"), scans)


def _whole(pipeline: Pipeline, source: Source, shards: str, scans: Sequence[str]) -> dict[str, Any]:
    """Everything from a manifest to the summary, below the pipeline's `out`."""
    with PeakMemory() as memory:
        ingestion = _ingest(pipeline, source, shards)
        checkpoints = _train(pipeline, shards)
        results = _evaluate(pipeline, shards, checkpoints)
        best = _register(pipeline, checkpoints, results)
        reports = (
            report_scans(best["checkpoint"], scans, pipeline.experiment.evaluation, pipeline.experiment.data.accept)
            if scans
            else []
        )
    page = storage.join(pipeline.out, "evaluation", "report.html")
    if storage.exists(page):
        storage.write_bytes(storage.join(pipeline.out, "report.html"), storage.read_bytes(page))
    summary = summarise(pipeline, ingestion, checkpoints, results, best, reports, memory.gib)
    storage.write_json(storage.join(pipeline.out, "summary.json"), summary)
    return summary


def _ingest(pipeline: Pipeline, source: Source, shards: str) -> dict[str, Any]:
    data = pipeline.experiment.data

    def work() -> dict[str, Any]:
        storage.delete(storage.join(shards, "features"))
        table = read_manifest(source.manifest, source.format, source.volumes, data)
        return ingest(table, shards, pipeline.experiment, pipeline.progress("ingest"))

    decides = [source.manifest, _contents(source.manifest), source.format, source.volumes]
    settings = data.model_dump(mode="json", exclude={"phantom", "fraction"})
    # shards of the same spec are gone on with, when the manifest has grown; those of another are in the way
    same = storage.exists(storage.join(shards, INDEX)) and Shards.open(shards).spec.hash == data.spec.hash
    outputs = [] if same else [shards]
    return pipeline.step("ingest", [*decides, settings], work, outputs)


def _contents(manifest: str) -> str:
    """Digest of a manifest's bytes; of the names and sizes of its files where it is a folder."""
    if storage.is_file(manifest):
        return hashlib.sha256(storage.read_bytes(manifest)).hexdigest()
    return artefacts.digest([[each.path, each.size] for each in storage.list_files(manifest)])


def _train(pipeline: Pipeline, shards: str) -> dict[str, str]:
    """The three stages and the pairs between them; the checkpoints' URIs by stage."""
    experiment, out = pipeline.experiment, pipeline.out
    uris = {stage: storage.join(out, "checkpoints", stage) for stage in ("contrastive", "sft", "dpo")}
    pairs = storage.join(out, "preferences")
    values = experiment.model_dump(mode="json")

    def trained(stage: str, work: Callable[[], Checkpoint]) -> dict[str, Any]:
        decides = [values[stage], values["model"], experiment.seed]
        outputs = [uris[stage], f"{uris[stage]}.state"]
        return pipeline.step(stage, decides, lambda: work().training.model_dump(), outputs)

    trained(
        "contrastive",
        lambda: contrastive.run(shards, uris["contrastive"], experiment, None, pipeline.training("contrastive")),
    )
    trained("sft", lambda: sft.run(shards, uris["sft"], experiment, uris["contrastive"], pipeline.training("sft")))
    pipeline.step(
        "preferences",
        [values["preferences"], values["judge"], values["evaluation"]["question"]],
        lambda: prefer(uris["sft"], shards, pairs, experiment, None, pipeline.progress("preferences")).model_dump(),
        [pairs],
    )
    trained("dpo", lambda: dpo.run(pairs, uris["dpo"], experiment, uris["sft"], pipeline.training("dpo")))
    return uris


def _evaluate(pipeline: Pipeline, shards: str, checkpoints: dict[str, str]) -> Results:
    """SFT and DPO on the held-out patients, in one pass."""
    experiment, out = pipeline.experiment, storage.join(pipeline.out, "evaluation")
    compared = {stage: checkpoints[stage] for stage in ("sft", "dpo")}

    def work() -> dict[str, Any]:
        results = compare(compared, shards, out, experiment, "test", pipeline.progress("evaluate"))
        return {run: results.summary(run)["green"] for run in compared}

    values = experiment.model_dump(mode="json")
    pipeline.step("evaluate", [values["evaluation"], values["judge"]], work, [out])
    return Results.open(out)


def _register(pipeline: Pipeline, checkpoints: dict[str, str], results: Results) -> dict[str, Any]:
    """The best by GREEN of those that pass their audit becomes champion; if none does, the best has no alias."""

    def work() -> dict[str, Any]:
        green = {run: results.runs[run].metrics["green"] for run in ("sft", "dpo")}
        audits = {run: results.runs[run].audit for run in green}
        ranked = sorted(green, key=lambda run: -estimate.value if (estimate := green[run]) else 0.0)
        passing = [run for run in ranked if (audit := audits[run]) and audit.passed]
        best = (passing or ranked)[0]
        if not passing:
            version = tracking.register(open_checkpoint(checkpoints[best]))
            return {"run": best, "checkpoint": checkpoints[best], "version": version, "alias": None}
        promoted = promote(checkpoints[best])
        return {"run": best, "checkpoint": checkpoints[best], "version": promoted.version, "alias": promoted.alias}

    return pipeline.step("register", tracking.store(), work, [])


def summarise(
    pipeline: Pipeline,
    ingestion: dict[str, Any],
    checkpoints: dict[str, str],
    results: Results,
    best: dict[str, Any],
    reports: list[dict[str, Any]],
    peak_gib: float,
) -> dict[str, Any]:
    """What summary.json holds (issue "The whole way"); seconds and peak memory are of all runs that it took."""
    experiment, done = pipeline.experiment, pipeline.done
    peak_path = storage.join(pipeline.out, "steps", "peak.json")
    before = storage.read_json(peak_path)["gib"] if storage.exists(peak_path) else 0.0
    peak = round(max(peak_gib, before), 3)
    storage.write_json(peak_path, {"gib": peak})
    seconds = {name: step.seconds for name, step in done.items()}
    training = {stage: open_checkpoint(uri).training for stage, uri in checkpoints.items()}
    matched = training["contrastive"].metrics
    preferences = Preferences.open(storage.join(pipeline.out, "preferences"))
    return {
        "preset": experiment.name,
        "seconds": {**seconds, "total": round(sum(seconds.values()), 2)},
        "peak_memory_gib": peak,
        "ingest": ingestion,
        "training": {stage: _numbers(each) for stage, each in training.items()},
        "contrastive": {
            "recall_at_1": matched.get("recall_at_1"),
            "recall_at_5": matched.get("recall_at_5"),
            "chance_at_1": matched.get("chance_at_1"),
            "n": int(matched.get("recall_n", 0)),
        },
        "preferences": preferences.model_dump(exclude={"identity", "shards", "checkpoint"}),
        **{run: results.summary(run) for run in ("sft", "dpo")},
        "dpo_minus_sft": results.difference("dpo", "sft"),
        "checkpoints": {**checkpoints, "best": best["checkpoint"]},
        "registered": best,
        "scans": reports,
        "judge": results.judge,
        "seed": experiment.seed,
        "git_commit": tracking.git_commit(),
        "versions": tracking.versions(),
    }


def _numbers(training: Any) -> dict[str, Any]:
    losses = [entry["loss"] for entry in training.history]
    return {
        "steps": training.steps,
        "cases_seen": training.cases_seen,
        "seconds": training.seconds,
        "resumed_from_step": training.resumed_from_step,
        "first_loss": losses[0] if losses else None,
        "last_loss": losses[-1] if losses else None,
        "losses": losses,
    }


def check_out(out: str) -> None:
    """The demo's folder must be a local one: the embedded S3 server serves it."""
    if storage.is_remote(out):
        raise UserError(f"--out {out}: the demo needs a local folder, which its embedded S3 server serves")


def clear(out: str) -> None:
    """Removes what the pipeline made below `out`: what `--fresh` does. Other files there are left alone."""
    if not storage.exists(storage.join(out, "steps")):
        return
    for stage in ("contrastive", "sft", "dpo"):
        _release(storage.join(out, "checkpoints", stage))
    for name in ("s3", "shards", "steps", "checkpoints", "preferences", "evaluation", "summary.json", "report.html"):
        storage.delete(storage.join(out, name))


def table(summary: dict[str, Any]) -> Table:
    """The summary's numbers for a terminal: SFT, DPO and their paired difference, with 95 % intervals."""
    title = f"preset {summary['preset']}: {summary['seconds']['total']:.0f} s, {summary['peak_memory_gib']:.1f} GiB"
    shown = Table("", "SFT", "DPO", "DPO − SFT", title=title)
    for metric in ("finding_f1", "finding_f1_shuffled", "green", "bleu_1", "rouge_l"):
        runs = [_cell(summary[run].get(metric)) for run in ("sft", "dpo")]
        shown.add_row(TITLES.get(metric, metric), *runs, _cell(summary["dpo_minus_sft"].get(metric)))
    shown.add_row("distinct reports", *(f"{summary[run]['distinct_reports']:.2f}" for run in ("sft", "dpo")), "")
    for run in ("sft", "dpo"):
        if not summary[run]["audits"]["passed"]:
            shown.add_row(f"[red]{run}: {'; '.join(summary[run]['audits']['reasons'])}[/]")
    alias = summary["registered"]["alias"]
    best = f"registered {summary['registered']['run']} as version {summary['registered']['version']}"
    shown.caption = (
        f"{best}, {'champion' if alias else 'not as champion: no run passed its audit'}; judge {summary['judge']}"
    )
    return shown


def _cell(estimate: dict[str, float] | None) -> str:
    if not estimate:
        return "–"
    return f"{estimate['value']:.3f} [dim]{estimate['low']:.3f}…{estimate['high']:.3f}, n {estimate['n']}[/]"
