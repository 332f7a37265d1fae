"""The optimiser's groups: learning rates by what is trained, fresh modules, LoRA, the language model, vision."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

GROUPS = ("fresh", "places", "lora", "language_model", "vision")
"""The names of `settings.stages.LearningRates`."""


def group_of(name: str) -> str:
    """Of a parameter, by its name in the model, whatever DDP, peft or the contrastive model put around it."""
    parts = name.split(".")
    if any(part.startswith("lora_") for part in parts):
        return "lora"
    if "vision" in parts:
        return "vision"
    if "places" in parts:
        return "places"
    return "language_model" if {"language_model", "lm_head", "text_encoder"} & set(parts) else "fresh"


def split(optimiser: Optimizer, named: Iterable[tuple[str, nn.Parameter]], rates: Mapping[str, float]) -> None:
    """Parts the optimiser's groups, before its first step, so that each has the rate of what is in it."""
    of = {id(parameter): group_of(name) for name, parameter in named}
    if "fresh" in rates:
        rates = {"places": rates["fresh"], **rates}
    parted = []
    for given in optimiser.param_groups:
        for group in GROUPS:
            own = [parameter for parameter in given["params"] if of[id(parameter)] == group]
            if own:
                parted.append({**given, "params": own, "lr": rates.get(group, given["lr"]), "group": group})
    optimiser.param_groups = parted


def logged(optimiser: Any) -> dict[str, float]:
    """`learning_rate/GROUP` of each group; nothing where they were not parted."""
    return {f"learning_rate/{each['group']}": float(each["lr"]) for each in optimiser.param_groups if "group" in each}


def forget_unreached(optimiser: Any) -> None:
    """Takes the state away of weights that no step had reached when it was saved, frozen or left out up to there.

    Loading a sharded state, torch makes one of zeros for them that counts a step, and AdamW's first step is then not
    what it is without a resume.
    """
    for parameter, state in list(optimiser.state.items()):
        moment = state["exp_avg_sq"].sum()
        if not (moment.full_tensor() if isinstance(moment, DTensor) else moment):
            del optimiser.state[parameter]
