"""`mu2llm score`: anyone's reports against their references. No model, no scans, and with the rules judge no Ray.

Below `out` lies what `evaluate` writes there, so `rescore` and `compare` take it too.
"""

from __future__ import annotations

from typing import Any

from mu2llm import artefacts, green, storage, tracking
from mu2llm.artefacts import Identity
from mu2llm.cases import Shards
from mu2llm.config import Experiment
from mu2llm.engine.predictions import Prediction
from mu2llm.evaluation import floors, foreign
from mu2llm.evaluation.evaluate import by_table, check_same, clear, scored, without_model
from mu2llm.evaluation.results import Header, Results
from mu2llm.records import Case


def score(
    predictions: str,
    references: str,
    out: str,
    experiment: Experiment,
    split: str | None = None,
    train: str | None = None,
    name: str | None = None,
    fresh: bool = False,
) -> Results:
    """The reports of `predictions`, joined with `references` by id, scored as one run called `name`.

    `references` are a table of texts or shards, `split` a split of shards or one of CT-RATE's names, `train` the
    training reports for the floors (of shards their own). Raises UserError where ids do not meet, or `out` holds other
    scores.
    """
    green.check_judge(experiment.judge)
    cases, twice = foreign.references(references, split)
    joined = foreign.join(cases, twice, foreign.read(predictions, foreign.PREDICTIONS))
    training = _training(references, train)
    inputs = {
        "predictions": artefacts.digest([joined.reports, joined.finished]),
        "references": artefacts.digest([case.model_dump(mode="json", exclude={"source"}) for case in joined.cases]),
        "train": artefacts.digest([case.report for case in training]),
        "seed": experiment.seed,
    }
    identity = Identity.of(inputs)
    if fresh:
        clear(out)
    check_same(out, identity, experiment)
    if not Header.there(out):
        _write(out, joined, training, identity, experiment.seed, name or _stem(predictions))
        data = tracking.place(references) if Shards.there(references) else storage.lasting(references)
        Header(
            identity=identity.digest,
            inputs=identity.inputs,
            checkpoints={name or _stem(predictions): storage.lasting(predictions)},
            foreign=storage.lasting(predictions),
            unmatched=joined.unmatched,
            data=data,
            split=split or ("test" if Shards.there(references) else _stem(references)),
            question="",
            seed=experiment.seed,
            prior=floors.prior_source(training),
            histories={},
        ).write(out)
    return scored(out, experiment)


def summary(results: Results) -> dict[str, Any]:
    """What `mu2llm score --json` prints."""
    [run] = results.header.checkpoints
    beside, audit = results.bounds(run), results.runs[run].audit
    return {
        "n": results.cases,
        "unmatched": {"missing": [], "doubled": [], "left_over": [], **results.header.unmatched},
        "split": beside.pop("split_name"),
        "split_hash": beside.pop("split_hash"),
        "metrics": {name: value.model_dump() if value else None for name, value in results.runs[run].metrics.items()},
        **beside,
        "paraphrase": results.paraphrase.model_dump() if results.paraphrase else None,
        "failed": audit.failed,
        "invalid": audit.invalid,
        "consistency": {
            "reports": audit.consistency.model_dump() if audit.consistency else None,
            "references": audit.reference_consistency.model_dump() if audit.reference_consistency else None,
        },
        "red_line": audit.red_line,
        "warnings": audit.warnings,
        "predictions": results.header.foreign,
        "references": results.header.data,
        "judge": results.judge,
        "truth": results.truth,
        "notes": results.notes,
    }


def _training(references: str, train: str | None) -> list[Case]:
    if train:
        return foreign.references(train, "train" if Shards.there(train) else None, "--train")[0]
    return Shards.open(references).cases("train") if Shards.there(references) else []


def _write(out: str, joined: foreign.Joined, training: list[Case], identity: Identity, seed: int, run: str) -> None:
    same = {"run": run, "variant": "as_is", "region": None, "question": "", "index": 0, "tokens": 0, "seed": seed}
    written = [
        Prediction(case_id=case.id, text=text, finished=finished, scan_of=case.id, **same)
        for case, text, finished in zip(joined.cases, joined.reports, joined.finished, strict=True)
    ]
    written += by_table(written, joined.cases, training, seed)
    written += without_model(joined.cases, training, "", seed)
    storage.write_table(storage.join(out, "cases.parquet"), Case.table(joined.cases))
    storage.write_table(storage.join(out, "predictions.parquet"), Prediction.table(written))


def _stem(uri: str) -> str:
    return uri.rstrip("/").rpartition("/")[2].partition(".")[0] or "foreign"
