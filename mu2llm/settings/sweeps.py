"""Settings of the sweeps."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from mu2llm.settings.section import Section
from mu2llm.settings.stages import StageConfig

Objective = Literal["green", "finding_f1", "grounding_gap", "visual_tokens", "seconds_per_scan", "kl"]


class SweepConfig(Section):
    space: dict[str, Any] = Field({}, description="what is searched, laid over the space that comes with the command")
    trials: int = Field(12, ge=1)
    search: Literal["optuna", "random", "grid"] = "optuna"
    objective: tuple[Objective, ...] = Field(("green",), min_length=1, description="several: their Pareto front")
    first: tuple[dict[str, Any], ...] = Field((), description="known good points, tried after the configuration itself")
    reports: int = Field(4, ge=1, description="times that a trial is measured, the last at its end")
    cases: int | None = Field(None, ge=1, description="validation cases that a measurement reads; None: all")
    scheduler: Literal["asha", "none"] = "asha"
    grace: int = Field(1, ge=1, description="measurements before a trial can be stopped")
    reduction: float = Field(3, gt=1, description="of this many trials at a rung one goes on")
    workers_per_trial: int = Field(
        1, ge=0, description="0: the trial trains itself, in a process kept for the next one"
    )
    gpus_per_trial: float | None = Field(
        None, ge=0, description="may be a fraction; None: as many as the stage's workers ask for"
    )
    max_concurrent: int | None = Field(None, ge=1, description="None: as many as the cluster holds")
    max_failures: int = Field(1, ge=0, description="times that a trial whose process died is tried again")
    time_budget_s: float | None = Field(None, gt=0)
    storage: str | None = Field(None, description="Optuna's database; None: optuna.journal below --out")
    final_seeds: int = Field(3, ge=0, description="seeds with which the winner and the default are trained again")
    final_split: Literal["validation", "test"] = Field(
        "test", description="where those two are reported; validation decides"
    )

    def gpus_of(self, stage: StageConfig) -> float:
        """GPUs of a whole trial of the stage, all its workers together."""
        asked = self.gpus_per_trial
        return max(self.workers_per_trial, 1) * stage.gpus_per_worker if asked is None else asked
