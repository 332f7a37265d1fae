"""The one record of a sweep: an Optuna study, with what was proposed, what is trained, and how every trial ended.

It lies in `optuna.journal` below the sweep's `out`, local or s3://, or in the database that `sweep.storage` names.
A trial's point is an attribute of its Optuna trial from the moment that it is proposed, its record from the moment
that it has ended: whatever a kill leaves without a record is proposed again, nothing that has one is. No Ray here.
"""

from __future__ import annotations

import itertools
import json
import math
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import optuna
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import BaseJournalBackend
from optuna.trial import FrozenTrial, TrialState

from mu2llm import storage
from mu2llm.errors import UserError
from mu2llm.settings.sweeps import SweepConfig
from mu2llm.sweeps.space import Space, canonical
from mu2llm.sweeps.trial import DIRECTIONS, OPTUNA, Point, Trial

JOURNAL = "optuna.journal"
SAMPLERS = {"optuna": optuna.samplers.TPESampler}  # random and grid draw at random, a grid after its points: never
optuna.logging.set_verbosity(optuna.logging.WARNING)


class Journal(BaseJournalBackend):
    """Optuna's journal (`JournalFileBackend` reads it too) as one file at any URI, of a single writer.

    The file is replaced as a whole: a kill leaves the one before or the one after, on a disk and in a bucket.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self.lines = storage.read_bytes(uri).splitlines(keepends=True) if storage.exists(uri) else []

    def read_logs(self, log_number_from: int) -> Iterable[dict[str, Any]]:
        return map(json.loads, self.lines[log_number_from:])

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        self.lines += [json.dumps(log).encode() + b"\n" for log in logs]
        storage.write_bytes(self.uri, b"".join(self.lines))


def database(out: str, url: str | None = None) -> BaseStorage:
    """Where studies are kept: below `out`, or in the database at `url`; a UserError for one that is none."""
    if url is None:
        return JournalStorage(Journal(storage.join(out, JOURNAL)))
    try:
        return RDBStorage(url)
    except Exception as error:  # whatever the database's driver raises
        raise UserError(f"sweep.storage: {type(error).__name__}: {str(error).splitlines()[0]}") from None


class Study:
    """A search of a space, or the training of given points: each is proposed, and then recorded, once."""

    def __init__(
        self, kept: BaseStorage, name: str, objective: Sequence[str], start: Point, space: Space | None = None
    ) -> None:
        """The study of that name, made unless it is there."""
        directions = [OPTUNA[each] for each in objective]
        self.study = optuna.create_study(storage=kept, study_name=name, directions=directions, load_if_exists=True)
        self.objective, self.start, self.space = list(objective), start, space or Space({})
        self.first: list[Point] = []
        self.asked: dict[str, optuna.Trial] = {}

    def trials(self) -> list[Trial]:
        """The recorded ones, in the order in which they ended."""
        return _ended(self.study)

    def go_on(self, settings: SweepConfig, points: Iterable[Point]) -> None:
        """Closes what a kill left open, and lines up what is proposed first: what it interrupted, then `points`."""
        for old in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            self._tell(old.number, _trial(old) if _record(old) else None)
        trials = self.study.get_trials(deepcopy=False)
        recorded = [_point(old) for old in trials if _record(old)]
        open_ = [old for old in trials if old.state == TrialState.FAIL and "point" in old.user_attrs]
        interrupted = [_point(old) for old in open_ if self.space.domains]  # of given points, only those given now
        self.first = []
        for point in [*interrupted, *points]:
            if point not in recorded and point not in self.first:
                self.first.append(point)
        # a sweep that goes on draws on
        sampler = SAMPLERS.get(settings.search, optuna.samplers.RandomSampler)
        self.study.sampler = sampler(seed=self.start.seed + len(recorded))  # type: ignore[call-arg]

    def propose(self, key: str) -> Point:
        """The next point to train; `key` names it until it is recorded. One that was proposed before is trained with
        the next seed: a repetition."""
        given = self.first[0] if self.first else None
        if given and self.space.domains and not self.study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
            self.study.enqueue_trial(self.space.encode(given.params), user_attrs={"point": given.model_dump()})
        asked = self.asked[key] = self.study.ask(self.space.distributions())
        if "point" not in asked.user_attrs:
            point = self._new(self.space.decode(asked.params)) if self.space.domains or not given else given
            asked.set_user_attr("point", point.model_dump())
        point = Point.model_validate(asked.user_attrs["point"])
        self.first = [other for other in self.first if other != point]
        return point

    def _new(self, params: dict[str, Any]) -> Point:
        there = [_point(old) for old in self.study.get_trials(deepcopy=False) if "point" in old.user_attrs]
        seeds = {point.seed for point in [*there, *self.first] if canonical(point.params) == canonical(params)}
        seed = next(seed for seed in itertools.count(self.start.seed) if seed not in seeds)
        return self.start.model_copy(update={"params": params, "seed": seed})

    def measured(self, key: str, metrics: dict[str, float]) -> None:
        """A measurement of a trial that goes on, for who watches the study."""
        value = metrics.get(self.objective[0])
        if len(self.objective) == 1 and value is not None:
            self.asked[key].report(value, int(metrics.get("step", 0)))

    def record(self, key: str, trial: Trial) -> None:
        """How a trial ended."""
        asked = self.asked.pop(key)
        asked.set_user_attr("record", trial.model_dump(exclude={"number"}))
        self._tell(asked.number, trial)

    def let_go(self, key: str) -> None:
        """Of a trial that was interrupted: it will be proposed again when the study goes on."""
        self._tell(self.asked.pop(key).number, None)

    def _tell(self, number: int, trial: Trial | None) -> None:
        values = [trial.value(name) for name in self.objective] if trial else []
        if trial and all(value is not None and math.isfinite(value) for value in values):
            self.study.tell(number, values)  # type: ignore[arg-type]
        else:
            # pruned without a value ranks last, so that the search leaves what cannot be trained
            infeasible = trial is not None and trial.status == "infeasible"
            self.study.tell(number, state=TrialState.PRUNED if infeasible else TrialState.FAIL)


def recorded(kept: BaseStorage, name: str) -> list[Trial]:
    """The recorded trials of a study, in the order in which they ended; a UserError where it is not kept there."""
    try:
        return _ended(optuna.load_study(study_name=name, storage=kept))
    except KeyError:
        raise UserError(f"no study {name} is kept there: give the sweep.storage with which the sweep began") from None


def _ended(study: optuna.Study) -> list[Trial]:
    ended = [old for old in study.get_trials(deepcopy=False) if old.datetime_complete and _record(old)]
    ended.sort(key=lambda old: (old.datetime_complete, old.number))
    return [_trial(old).model_copy(update={"number": number}) for number, old in enumerate(ended)]


def _record(old: FrozenTrial) -> bool:
    return "record" in old.user_attrs


def _point(old: FrozenTrial) -> Point:
    return Point.model_validate(old.user_attrs["point"])


def _trial(old: FrozenTrial) -> Trial:
    return Trial.model_validate(old.user_attrs["record"])


def importance(study: Study, name: str) -> dict[str, float]:
    """What share of an objective's variance among the better trials each key explains (PED-ANOVA); none of too few."""
    place, sign = study.objective.index(name), -1 if DIRECTIONS[name] == "max" else 1
    known = study.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    if len(known) < 4 or len({old.values[place] for old in known}) < 2:
        return {}
    evaluator = optuna.importance.PedAnovaImportanceEvaluator()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*low `target` values")  # hence the sign
        return optuna.importance.get_param_importances(
            study.study, evaluator=evaluator, target=lambda old: sign * old.values[place]
        )
