"""Muon for the matrices of linear layers, AdamW for all else, as one optimiser.

Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) makes each update of a matrix nearly orthogonal, so that
directions that gradients rarely take move as far as the others. A μ²Tokenizer from scratch reads scans after fewer
steps than by AdamW (docs/measured.md). Updates have the RMS of AdamW's (arXiv 2502.16982).
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import nn
from torch.optim import Muon, Optimizer


class MuonAndAdamW(Optimizer):
    """Two optimisers that step together; groups, state and saved state are those of both."""

    def __init__(
        self, muon: Optimizer, adamw: Optimizer
    ) -> None:  # Optimizer's own would keep the groups a second time
        self.muon, self.adamw = muon, adamw
        self.defaults = adamw.defaults

    @classmethod
    def of(cls, adamw: Optimizer, model: nn.Module, learning_rate: float) -> Self:
        """Takes the matrices out of the groups of an AdamW that has not stepped yet; they keep their weight decay."""
        ids = {id(weight) for weight in matrices(model)}
        taken = []
        for group in adamw.param_groups:
            own = [p for p in group["params"] if id(p) in ids]
            group["params"] = [p for p in group["params"] if id(p) not in ids]
            if own:
                taken.append({"params": own, "weight_decay": group["weight_decay"]})
        adamw.param_groups = [group for group in adamw.param_groups if group["params"]]
        return cls(Muon(taken, lr=learning_rate, adjust_lr_fn="match_rms_adamw"), adamw)

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        return [*self.muon.param_groups, *self.adamw.param_groups]

    @property
    def state(self) -> Any:  # type: ignore[override]
        return ChainMap(self.muon.state, self.adamw.state)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = self.adamw.step(closure)
        self.muon.step()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.muon.zero_grad(set_to_none)
        self.adamw.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        return {"muon": self.muon.state_dict(), "adamw": self.adamw.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.muon.load_state_dict(state_dict["muon"])
        self.adamw.load_state_dict(state_dict["adamw"])


def matrices(model: nn.Module) -> list[torch.Tensor]:
    """The trained weights of linear layers; not the output head, a table of tokens, nor LoRA's thin factors."""
    outputs = getattr(model, "get_output_embeddings", None)
    head = outputs() if outputs else None
    return [
        layer.weight
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and layer is not head and "lora_" not in name and layer.weight.requires_grad
    ]
