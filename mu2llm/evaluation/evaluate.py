"""`mu2llm evaluate`: a split's reports by one or several checkpoints, scored, audited and shown.

Below `out`: cases, predictions and judgements as Parquet, metrics.json and metrics.parquet, report.html. What is
scored is read from these tables, so scores can be made anew without any model (`rescore`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from mu2llm import artefacts, green, storage, tracking
from mu2llm.artefacts import Identity, open_checkpoint, weights_of
from mu2llm.cases import Shards
from mu2llm.config import Experiment
from mu2llm.engine.features import cached_features
from mu2llm.engine.generate import checked, generate
from mu2llm.engine.predictions import VARIANTS, Prediction, Request
from mu2llm.engine.sampling import Decoding
from mu2llm.errors import UserError
from mu2llm.evaluation import floors
from mu2llm.evaluation.assess import assess
from mu2llm.evaluation.leaderboard import rows, track
from mu2llm.evaluation.report import PAGE, write_report
from mu2llm.evaluation.results import METRICS, Header, Results
from mu2llm.evaluation.splits import SELECTIONS, select, split_hash
from mu2llm.progress import Counted
from mu2llm.records import Case, Checkpoint, Judgement

STATE = "predictions.state"
"""Below `out`, while reports are written: finished batches."""
JUDGEMENTS = "judgements.parquet"
MADE = (Header.FILE, METRICS, "metrics.parquet", JUDGEMENTS, "predictions.parquet", "cases.parquet", PAGE, STATE)
_OF_THE_PREDICTIONS = ("max_new_tokens", "max_cases", "regions", "question", "precision")


def evaluate(
    checkpoint: str,
    data: str,
    out: str,
    experiment: Experiment,
    split: str = "test",
    progress: Counted | None = None,
    fresh: bool = False,
) -> dict[str, Any]:
    """One checkpoint's metrics, audits and report; see `compare`."""
    run = open_checkpoint(checkpoint).lineage.stage
    return compare({run: checkpoint}, data, out, experiment, split, progress, fresh).summary(run)


def compare(
    checkpoints: Mapping[str, str],
    data: str,
    out: str,
    experiment: Experiment,
    split: str = "test",
    progress: Counted | None = None,
    fresh: bool = False,
) -> Results:
    """Several checkpoints (run → URI) on the same cases in one pass, with paired differences of later ones to earlier.

    Reports that are already in `out` are not written again, and not judged again unless a setting of scoring changed;
    another number of pages only renders the report anew. `fresh` removes what is in `out` and starts over. Results that
    are new go to the tracking store too. Raises UserError where checkpoints and shards do not fit, or `out` holds
    another evaluation or the judgements of another judge.
    """
    shards = Shards.open(data)
    request = request_of(checkpoints, shards, split, experiment)
    checked(request)
    green.check_judge(experiment.judge)  # before hours of writing, and before anything is removed
    if fresh:
        clear(out)
    check_same(out, request.identity, experiment)
    if not Header.there(out):
        artefacts.claim(storage.join(out, STATE), request.identity, "an interrupted evaluation")
        _write_predictions(request, shards, out, progress)
    return scored(out, experiment)


def clear(out: str) -> None:
    """Removes what an evaluation made in `out`."""
    for name in MADE:
        storage.delete(storage.join(out, name))


def scored(out: str, experiment: Experiment) -> Results:
    """The results of saved predictions, judged unless they are already; new ones go to the tracking store too."""
    before = Results.open(out) if storage.exists(storage.join(out, METRICS)) else None
    if before and before.scored_by == scoring(experiment).inputs:
        return render(out, experiment)
    results = rescore(out, experiment)
    if before is None or _numbers(results) != _numbers(before):
        for row in rows(results, storage.lasting(storage.join(out, PAGE))):
            track(row)
    return results


def scoring(experiment: Experiment) -> Identity:
    """What decides the scores of saved predictions."""
    settings = artefacts.decides("evaluation", experiment.evaluation, leave_out=_OF_THE_PREDICTIONS)
    return Identity.of({**green.decides(experiment.judge), "rules": green.rules_identity(), **settings})


def check_same(out: str, identity: Identity, experiment: Experiment, mend: str = artefacts.MEND) -> None:
    """A UserError where `out` holds other predictions, or another judge's verdicts, which would be lost."""
    if not Header.there(out):
        return
    header = Header.open(out)
    identity.check(out, "an evaluation", header.identity, header.inputs, mend)
    if storage.exists(storage.join(out, METRICS)):
        by = Identity.of({key: v for key, v in Results.open(out).scored_by.items() if key.startswith("judge")})
        mend = f"{mend}, mu2llm rescore judges its reports anew"
        Identity.of(green.decides(experiment.judge)).check(out, "an evaluation", by.digest, by.inputs, mend)


def _numbers(results: Results) -> dict[str, Any]:
    return results.model_dump(exclude={"scored_by", "pages"})


def rescore(out: str, experiment: Experiment) -> Results:
    """Scores the saved predictions (anew) and writes judgements, metrics and report; needs neither model nor scans."""
    header = Header.open(out)
    cases, predictions = read_predictions(out)
    results, judgements = assess(header, cases, predictions, experiment)
    results = results.model_copy(update={"scored_by": scoring(experiment).inputs})
    storage.write_table(storage.join(out, JUDGEMENTS), judgements)
    storage.write_table(storage.join(out, "metrics.parquet"), results.table())
    storage.write_json(storage.join(out, METRICS), results.model_dump(mode="json"))
    return render(out, experiment)


def render(out: str, experiment: Experiment) -> Results:
    """Writes the report of saved results, unless it is there with as many pages."""
    results, pages = Results.open(out), experiment.evaluation.pages
    if results.pages == pages and storage.exists(storage.join(out, PAGE)):
        return results
    cases, predictions = read_predictions(out)
    rows = storage.read_table(storage.join(out, JUDGEMENTS)).to_pylist()
    judged = {(row["run"], row["case_id"]): Judgement.from_row(row) for row in rows}
    results = results.model_copy(update={"pages": pages})
    write_report(out, results, cases, predictions, judged, pages)
    storage.write_json(storage.join(out, METRICS), results.model_dump(mode="json"))
    return results


def compare_saved(evaluations: Sequence[str], out: str, experiment: Experiment, common: bool = False) -> Results:
    """Evaluations that are there already, put side by side in `out`: paired differences on the same cases, no model.

    Runs of the same name are told apart by their folder. Raises UserError where the cases are not the same, unless
    `common` asks for those that all of them have, with the same reference.
    """
    headers = [Header.open(each) for each in evaluations]
    saved = [read_predictions(each) for each in evaluations]
    hashes = [split_hash(cases) for cases, _ in saved]
    if len(set(hashes)) > 1 and not common:
        other = next(i for i, each in enumerate(hashes) if each != hashes[0])
        raise UserError(
            f"{evaluations[other]} ({hashes[other]}) and {evaluations[0]} ({hashes[0]}) are of different cases; "
            "only the same can be paired: --common compares those that both have"
        )
    kept = _in_all([cases for cases, _ in saved])
    if not kept:
        raise UserError(f"no case with the same reference is in all of {', '.join(evaluations)}")
    cases = [case for case in saved[0][0] if case.id in kept]
    saved = [(cases, [p for p in found if p.case_id in kept]) for _, found in saved]
    names = _told_apart(evaluations, headers)
    inputs = {f"evaluation.{i}": each.identity for i, each in enumerate(headers)}
    identity = Identity.of({**inputs, **({"common": split_hash(cases)} if len(set(hashes)) > 1 else {})})
    header = headers[0].model_copy(
        update={
            "identity": identity.digest,
            "inputs": identity.inputs,
            "checkpoints": {
                names[i, run]: each.checkpoints[run] for i, each in enumerate(headers) for run in each.checkpoints
            },
            "identities": {
                names[i, run]: each.identities.get(run, "")
                for i, each in enumerate(headers)
                for run in each.checkpoints
            },
            "histories": {stage: losses for each in headers for stage, losses in each.histories.items()},
        }
    )
    check_same(out, identity, experiment, "another --out keeps both")
    predictions = [p for p in saved[0][1] if p.run in floors.NAMES]
    for i, (_, found) in enumerate(saved):
        predictions += [p.model_copy(update={"run": names[i, p.run]}) for p in found if p.run not in floors.NAMES]
    storage.write_table(storage.join(out, "cases.parquet"), Case.table(saved[0][0]))
    storage.write_table(storage.join(out, "predictions.parquet"), Prediction.table(predictions))
    header.write(out)
    return rescore(out, experiment)


def _in_all(saved: Sequence[Sequence[Case]]) -> set[str]:
    """The ids of the cases that all have, with the same reference."""
    pairs = [{(case.id, " ".join(case.report.split())) for case in cases} for cases in saved]
    return {name for name, _ in set.intersection(*pairs)}


def _told_apart(evaluations: Sequence[str], headers: Sequence[Header]) -> dict[tuple[int, str], str]:
    """(number of the evaluation, run) → a name that no other has."""
    runs = Counter(run for header in headers for run in header.checkpoints)
    folders = [storage.absolute(each).rstrip("/").rpartition("/")[2] for each in evaluations]
    names = {
        (i, run): run if runs[run] == 1 else f"{run} ({folders[i]})"
        for i, header in enumerate(headers)
        for run in header.checkpoints
    }
    if len(set(names.values())) < len(names):
        raise UserError(f"two evaluations of the same name: {', '.join(evaluations)}; rename one folder")
    return names


def read_predictions(out: str) -> tuple[list[Case], list[Prediction]]:
    """The saved cases and predictions."""
    tables = [storage.read_table(storage.join(out, f"{name}.parquet")).to_pylist() for name in ("cases", "predictions")]
    return [Case.from_row(row) for row in tables[0]], [Prediction.from_row(row) for row in tables[1]]


# ---- writing reports


def request_of(checkpoints: Mapping[str, str], shards: Shards, split: str, experiment: Experiment) -> Request:
    """What an evaluation asks for; `split` may be one of CT-RATE's names, which are of the test split's cases."""
    settings = experiment.evaluation
    ids = tuple(case.id for case in select(shards.cases("test"), split)) if split in SELECTIONS else None
    return Request(
        checkpoints=checkpoints,
        data=cached_features(checkpoints.values(), shards, settings.used_precision) or shards.uri,
        split=split if ids is None else "test",
        ids=ids,
        question=settings.question,
        decoding=Decoding(settings.max_new_tokens, seed=experiment.seed),
        variants=VARIANTS,
        regions=settings.regions,
        max_cases=settings.max_cases,
        inference=settings,
    )


def _write_predictions(request: Request, shards: Shards, out: str, progress: Counted | None) -> None:
    """Cases and predictions, and last the header, which says that they are whole."""
    predictions = generate(request, storage.join(out, STATE), progress)
    cases = request.cases(shards)
    train = shards.cases("train")
    predictions += by_table(predictions, cases, train, request.decoding.seed)
    predictions += without_model(cases, train, request.question, request.decoding.seed)
    storage.write_table(storage.join(out, "cases.parquet"), Case.table(cases))
    storage.write_table(storage.join(out, "predictions.parquet"), Prediction.table(predictions))
    Header(
        identity=request.identity.digest,
        inputs=request.identity.inputs,
        checkpoints={run: tracking.place(uri) for run, uri in request.checkpoints.items()},
        identities={run: weights_of(open_checkpoint(uri)).weights for run, uri in request.checkpoints.items()},
        data=tracking.place(shards.uri),
        split=request.split,
        question=request.question,
        seed=request.decoding.seed,
        prior=floors.prior_source(train),
        histories=_histories(request.checkpoints),
    ).write(out)
    storage.delete(storage.join(out, STATE))


def by_table(
    predictions: Sequence[Prediction], cases: Sequence[Case], train: Sequence[Case], seed: int
) -> list[Prediction]:
    """The table writer's report beside each that a model wrote of a whole scan."""
    own = [p for p in predictions if p.variant == "as_is" and p.region is None]
    known = {case.id: case for case in cases}
    texts = floors.table([known[p.case_id] for p in own], train, [p.text for p in own], seed) if own else []
    changed = {"variant": "table", "tokens": 0, "finished": True, "scan_of": ""}
    return [p.model_copy(update={**changed, "text": text}) for p, text in zip(own, texts, strict=True)]


def without_model(cases: Sequence[Case], train: Sequence[Case], question: str, seed: int) -> list[Prediction]:
    """What the floors write for every case, kept beside the models' reports so that they can be scored anew."""
    same = {"question": question, "tokens": 0, "finished": True, "seed": seed}
    return [
        Prediction(run=run, case_id=case.id, variant="as_is", region=None, index=0, scan_of="", text=text, **same)
        for run, reports in floors.written(cases, train, seed).items()
        for case, text in zip(cases, reports, strict=True)
    ]


def _histories(checkpoints: Mapping[str, str]) -> dict[str, list[dict[str, float]]]:
    """What each stage logged: of the checkpoints and of those that they came from, as far as they are still there."""
    histories: dict[str, list[dict[str, float]]] = {}
    for uri in checkpoints.values():
        parent: str | None = uri
        while parent and storage.exists(storage.join(parent, Checkpoint.FILE)):
            checkpoint = open_checkpoint(parent)
            histories.setdefault(checkpoint.lineage.stage, checkpoint.training.history)
            parent = checkpoint.lineage.parent
    return histories
