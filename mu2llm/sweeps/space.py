"""A search space: keys of the configuration and the values they may take, as Optuna's distributions. No Ray here."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
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
KINDS = ("choice", "subsets", "integers", "uniform", "log")


class Domain(BaseModel):
    """The values of one key: exactly one of the five kinds. `points` is how many a grid takes of a range."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    choice: tuple[Any, ...] | None = Field(None, min_length=1)
    subsets: tuple[Any, ...] | None = Field(None, min_length=1, description="all of them but the empty one")
    integers: tuple[int, int] | None = None
    uniform: tuple[float, float] | None = None
    log: tuple[float, float] | None = None
    points: int | None = Field(None, ge=2)

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        kinds = [name for name in KINDS if getattr(self, name) is not None]
        if len(kinds) != 1:
            raise ValueError(f"give one of {', '.join(KINDS)}, not {', '.join(kinds) or 'none'}")
        if self.range and self.range[0] >= self.range[1]:
            raise ValueError(f"the range {self.range[0]} … {self.range[1]} is empty")
        if self.log and self.log[0] <= 0:
            raise ValueError(f"a log range starts above 0, given {self.log[0]}")
        return self

    @property
    def range(self) -> tuple[float, float] | None:
        return self.integers or self.uniform or self.log

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
        low, high = self.range or (0, 0)
        spaced = (np.geomspace if self.log else np.linspace)(low, high, self.points)
        return [float(f"{value:.6g}") for value in spaced]

    def distribution(self) -> BaseDistribution:
        """Optuna's; categories as JSON text, which is what its databases hold."""
        if self.integers is not None:
            return IntDistribution(*self.integers)
        if self.range is not None:
            return FloatDistribution(*self.range, log=self.log is not None)
        return CategoricalDistribution([json.dumps(value) for value in self.values()])

    def encode(self, value: Any) -> Any:
        """A value as Optuna's parameter; a ValueError where the domain does not have it."""
        known = self.range[0] <= value <= self.range[1] if self.range else value in self.values()
        if not known:
            raise ValueError(f"{value!r} is not in {self.model_dump(exclude_none=True)}")
        return value if self.range else json.dumps(value)

    def decode(self, parameter: Any) -> Any:
        """Optuna's parameter as a value: real numbers to four digits, so that what is trained can be typed."""
        if isinstance(parameter, float) and math.isfinite(parameter):
            return float(f"{parameter:.4g}")
        return parameter if self.range else json.loads(parameter)


@dataclass(frozen=True)
class Space:
    """Key → domain, in order; without any, only given points can be trained."""

    domains: dict[str, Domain]

    @classmethod
    def load(cls, kind: str, experiment: Experiment) -> Self:
        """The space that comes with a command with `sweep.space` laid over it; null takes a key or a section away.

        Raises UserError for a key that the configuration does not have, a domain that is none, values that it refuses.
        """
        given = dict(_leaves(yaml.safe_load((files("mu2llm.sweeps") / "spaces" / f"{kind}.yaml").read_text())))
        for key, value in _leaves(experiment.sweep.space):
            if value is None:
                given = {k: v for k, v in given.items() if not f"{k}.".startswith(f"{key}.")}
            else:
                given[key] = value
        if not given:
            raise UserError("sweep.space leaves nothing to search; give it a key with a domain")
        space = cls({key: _domain(key, value) for key, value in given.items()})
        for key, domain in space.domains.items():
            for value in domain.range if domain.range and not domain.integers else domain.values():
                try:
                    apply(experiment, {key: value})
                except UserError as error:
                    raise UserError(f"sweep.space.{key}: {value!r} will not do: {error}") from None
        return space

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

    def decode(self, parameters: Params) -> Params:
        return {key: self.domains[key].decode(value) for key, value in parameters.items()}

    def first(self, experiment: Experiment) -> list[Params]:
        """The configuration itself, where the space has it, then `sweep.first`; a UserError for one outside."""
        values = experiment.model_dump(mode="json")
        own = {key: _value(values, key) for key in self.domains}
        points = []
        for given in ({}, *experiment.sweep.first):
            point = {**own, **dict(_leaves(given))}
            try:
                self.encode(point)
                points.append(point)
            except (ValueError, TypeError) as error:
                if given:  # the configuration itself is compared with the winner at the end all the same
                    raise UserError(f"sweep.first {given}: {error}") from None
        return points


def apply(experiment: Experiment, params: Params) -> Experiment:
    """The experiment with other values of some keys; a UserError where it does not take them."""
    values = experiment.model_dump(mode="json")
    for key, value in params.items():
        *path, last = key.split(".")
        section = values
        for part in path:
            if not isinstance(section.get(part), dict):
                raise UserError(f"{key} is not a key of the configuration: there is no {part}")
            section = section[part]
        section[last] = value
    return config.validate(values)


def canonical(params: Params) -> str:
    """Params as text, the same for the same values."""
    return json.dumps(params, sort_keys=True, default=str)


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    """Dotted key → value; a domain is a value."""
    for key, value in values.items():
        if isinstance(value, dict) and not (value and set(value) <= {*KINDS, "points"}):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _domain(key: str, value: Any) -> Domain:
    try:
        return Domain.model_validate(value)
    except ValidationError as error:
        raise UserError(
            f"sweep.space.{key}: {error.errors()[0]['msg']}, given {value!r:.80}; a domain is such as "
            "{choice: [1, 2]}, {subsets: [1, 2, 4]}, {integers: [1, 4]}, {uniform: [0, 1]} or {log: [0.01, 1]}"
        ) from None


def _value(values: Any, key: str) -> Any:
    for part in key.split("."):
        values = values[part]
    return values
