"""A search space: keys of the configuration and what values they may take. No Ray here."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Mapping
from importlib.resources import files
from typing import Any, Self

import numpy as np
import yaml
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from mu2llm import config
from mu2llm.config import Experiment
from mu2llm.errors import UserError

Params = dict[str, Any]
"""Key of the configuration, such as dpo.beta → value."""


class Domain(BaseModel):
    """The values of one key: exactly one of the five kinds. `points` is how many a grid takes of a range."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    choice: tuple[Any, ...] | None = Field(None, min_length=1)
    subsets: tuple[Any, ...] | None = Field(None, min_length=1)
    integers: tuple[int, int] | None = None
    uniform: tuple[float, float] | None = None
    log: tuple[float, float] | None = None
    points: int | None = Field(None, ge=2)

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        kinds = [name for name in KINDS if getattr(self, name) is not None]
        if len(kinds) != 1:
            raise ValueError(f"give one of {', '.join(KINDS)}, not {', '.join(kinds) or 'none'}")
        for low, high in (each for each in (self.integers, self.uniform, self.log) if each):
            if low >= high:
                raise ValueError(f"the range {low} … {high} is empty")
        if self.log and self.log[0] <= 0:
            raise ValueError(f"a log range starts above 0, given {self.log[0]}")
        return self

    def values(self) -> list[Any]:
        """All of them, of a range `points`; a ValueError for a range without."""
        if self.choice is not None:
            return list(self.choice)
        if self.subsets is not None:
            sizes = range(1, len(self.subsets) + 1)
            return [list(some) for size in sizes for some in itertools.combinations(self.subsets, size)]
        if self.integers is not None:
            return list(range(self.integers[0], self.integers[1] + 1))
        if self.points is None:
            raise ValueError("a grid needs `points` for a range of real numbers")
        if self.log is not None:
            return [float(f"{value:.6g}") for value in np.geomspace(*self.log, self.points)]
        assert self.uniform is not None
        return [float(f"{value:.6g}") for value in np.linspace(*self.uniform, self.points)]

    def distribution(self) -> BaseDistribution:
        """Optuna's; categories as JSON text, which is what its databases hold."""
        if self.integers is not None:
            return IntDistribution(*self.integers)
        if self.uniform is not None:
            return FloatDistribution(*self.uniform)
        if self.log is not None:
            return FloatDistribution(*self.log, log=True)
        return CategoricalDistribution([json.dumps(value) for value in self.values()])

    def encode(self, value: Any) -> Any:
        """A value as Optuna's parameter; a ValueError where the domain does not have it."""
        range_ = self.integers or self.uniform or self.log
        told = value if range_ else json.dumps(value)
        if not (range_[0] <= value <= range_[1] if range_ else told in map(json.dumps, self.values())):
            raise ValueError(f"{value!r} is not in {self.model_dump(exclude_none=True)}")
        return told

    def decode(self, told: Any) -> Any:
        return json.loads(told) if self.choice is not None or self.subsets is not None else told


KINDS = ("choice", "subsets", "integers", "uniform", "log")


class Space:
    """Key → domain, in order."""

    def __init__(self, domains: Mapping[str, Domain]) -> None:
        self.domains = dict(domains)

    @classmethod
    def load(cls, kind: str, experiment: Experiment) -> Self:
        """The space that comes with a command with `sweep.space` laid over it.

        Raises UserError for a key that the configuration does not have, a domain that is none, values that it refuses.
        """
        shipped = yaml.safe_load((files("mu2llm.sweeps") / "spaces" / f"{kind}.yaml").read_text())
        domains = _domains(_lay(shipped, experiment.sweep.space))
        if not domains:
            raise UserError("sweep.space leaves nothing to search; give it a key with a domain")
        space = cls(domains)
        space._check(experiment)
        return space

    def _check(self, experiment: Experiment) -> None:
        """Every value by itself must be one that the configuration takes; of a range both ends."""
        for key, domain in self.domains.items():
            ends = domain.log or domain.uniform
            for value in list(ends) if ends else domain.values():
                try:
                    apply(experiment, {key: value})
                except UserError as error:
                    raise UserError(f"sweep.space.{key}: {value!r} will not do: {error}") from None

    def distributions(self) -> dict[str, BaseDistribution]:
        return {key: domain.distribution() for key, domain in self.domains.items()}

    def grid(self) -> list[Params]:
        """Every combination; a UserError where a range has no `points`."""
        columns = []
        for key, domain in self.domains.items():
            try:
                columns.append(domain.values())
            except ValueError as error:
                raise UserError(f"sweep.space.{key}: {error}") from None
        return [dict(zip(self.domains, values, strict=True)) for values in itertools.product(*columns)]

    def encode(self, params: Params) -> Params:
        """As Optuna's parameters; a ValueError where the space does not have them."""
        return {key: domain.encode(params[key]) for key, domain in self.domains.items()}

    def decode(self, told: Params) -> Params:
        return {key: self.domains[key].decode(value) for key, value in told.items()}

    def default(self, experiment: Experiment) -> Params:
        """The configuration's own values of the space's keys."""
        values = experiment.model_dump(mode="json")
        return {key: _get(values, key) for key in self.domains}

    def known_good(self, experiment: Experiment) -> list[Params]:
        """The configuration itself, where the space has it, then `sweep.first`; a UserError for one outside."""
        own = self.default(experiment)
        points = []
        try:
            self.encode(own)
            points.append(own)
        except ValueError:
            pass  # it is compared with the winner at the end all the same
        for given in experiment.sweep.first:
            point = {**own, **dict(_leaves(given))}
            try:
                self.encode(point)
            except (ValueError, TypeError) as error:
                raise UserError(f"sweep.first {given}: {error}") from None
            points.append(point)
        return points


def apply(experiment: Experiment, params: Params) -> Experiment:
    """The experiment with other values of some keys; a UserError where it does not take them."""
    values = experiment.model_dump(mode="json")
    for key, value in params.items():
        *path, last = key.split(".")
        at = values
        for part in path:
            if not isinstance(at.get(part), dict):
                raise UserError(f"{key} is not a key of the configuration: there is no {part}")
            at = at[part]
        at[last] = value
    return config.validate(values)


def canonical(params: Params) -> str:
    """Params as text, the same for the same values."""
    return json.dumps(params, sort_keys=True, default=str)


def rounded(params: Params, digits: int = 4) -> Params:
    """Real numbers to so many significant digits: what is trained is what is shown and can be typed."""
    return {
        key: float(f"{v:.{digits}g}") if isinstance(v, float) and math.isfinite(v) else v for key, v in params.items()
    }


def _lay(under: Any, over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` laid over `under`; a domain replaces a domain, null takes it away."""
    laid = dict(under)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(laid.get(key), dict)
        if value is None:
            laid.pop(key, None)
        elif both and not _is_domain(value) and not _is_domain(laid[key]):
            laid[key] = _lay(laid[key], value)
        else:
            laid[key] = value
    return laid


def _is_domain(value: Any) -> bool:
    return isinstance(value, dict) and bool(value) and set(value) <= {*KINDS, "points"}


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict) and not _is_domain(value):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _domains(values: Mapping[str, Any]) -> dict[str, Domain]:
    domains = {}
    for key, value in _leaves(values):
        try:
            domains[key] = Domain.model_validate(value)
        except ValidationError as error:
            raise UserError(
                f"sweep.space.{key}: {error.errors()[0]['msg']}, given {value!r:.80}; a domain is such as "
                "{choice: [1, 2]}, {subsets: [1, 2, 4]}, {integers: [1, 4]}, {uniform: [0, 1]} or {log: [0.01, 1]}"
            ) from None
    return domains


def _get(values: Mapping[str, Any], key: str) -> Any:
    at: Any = values
    for part in key.split("."):
        at = at[part]
    return at
