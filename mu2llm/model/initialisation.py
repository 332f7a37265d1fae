"""How our modules start: transformers calls this for each, children first, also where weights were missing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Self

import torch
from torch import nn
from transformers import initialization as init


class Initialised(nn.Module):
    """A module with parameters or buffers of its own, beside its children's."""

    def initialise(self) -> None:
        """Sets them, by the functions of `transformers.initialization`, which leave loaded ones alone."""
        raise TypeError(f"{type(self).__name__} does not say how it starts")


class Statistics(nn.Module):
    """Mixed into modules that only move running numbers in training mode; `frozen`, they stay in evaluation mode."""

    frozen = False

    def train(self, mode: bool = True) -> Self:
        return super().train(mode and not self.frozen)


def freeze_statistics(model: nn.Module) -> None:
    """Running statistics, batch norms' too, and annealed temperatures stay as they are, whatever is trained."""
    for module in model.modules():
        if isinstance(module, Statistics):
            module.frozen = True
            module.eval()


def rounded_modules(model: nn.Module) -> Iterator[nn.Module]:
    """Those whose weights autocast rounds in every pass, so that a model that does not train can hold them rounded: not
    a head that is tied to its embedding, which is read as it is."""
    embedded = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv3d) and id(module.weight) not in embedded:
            yield module


@torch.no_grad()
def initialise(module: nn.Module) -> None:
    """A module's own parameters and buffers, its children's being done."""
    if isinstance(module, Initialised):
        module.initialise()
    elif isinstance(module, nn.Linear):
        init.xavier_uniform_(module.weight)
    elif isinstance(module, nn.Conv3d):
        init.kaiming_normal_(module.weight)
    elif isinstance(module, nn.LayerNorm | nn.BatchNorm3d) and module.weight is not None:
        init.ones_(module.weight)
    if isinstance(module, nn.Linear | nn.Conv3d | nn.LayerNorm | nn.BatchNorm3d) and module.bias is not None:
        init.zeros_(module.bias)
    if isinstance(module, nn.BatchNorm3d) and module.running_mean is not None:
        assert module.running_var is not None and module.num_batches_tracked is not None
        init.zeros_(module.running_mean)
        init.ones_(module.running_var)
        init.zeros_(module.num_batches_tracked)
