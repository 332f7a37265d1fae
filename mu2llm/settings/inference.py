"""Settings of inference: where, in which precision and how many at a time models run that do not train."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from mu2llm.settings.section import Execution, Section

Precision = Literal["fp32", "bf16", "fp16"]
Device = Literal["cpu", "cuda"]


class InferenceConfig(Section):
    """Evaluation, candidates, feature cache, reference and validation run by it. Of the texts it decides nothing but
    the rounding."""

    precision: Precision | Literal["auto"] = Field("auto", description="auto: bf16 on a GPU, fp32 on CPUs")
    device: Execution[Device | Literal["auto"]] = Field(
        "auto", description="auto: a GPU where an actor gets one, else the CPUs"
    )
    batch_size: Execution[int] = Field(16, ge=1, description="cases that an actor takes at a time")
    max_sequences: Execution[int | None] = Field(
        None, ge=1, description="texts that an actor writes at once; further ones of its cases join as others end"
    )
    actors: Execution[int | None] = Field(None, ge=1, description="None: as many as the cluster has room for")
    cpus_per_actor: Execution[float] = Field(1, ge=0)
    gpus_per_actor: Execution[float] = Field(0, ge=0)

    @property
    def used_device(self) -> Device:
        if self.device == "auto":
            return "cuda" if self.gpus_per_actor else "cpu"
        return self.device

    @property
    def rounding(self) -> dict[str, str]:
        """What an identity has of it: the precision in which is computed, where it is not fp32."""
        return {} if self.used_precision == "fp32" else {"precision": self.used_precision}

    @property
    def used_precision(self) -> Precision:
        if self.precision == "auto":
            return "bf16" if self.used_device == "cuda" else "fp32"
        return self.precision
