"""The language model of a checkpoint, for other servers."""

from __future__ import annotations

import tempfile
from typing import Any

from mu2llm import storage
from mu2llm.artefacts import model_id, open_checkpoint, weights_of
from mu2llm.evaluation.exports import place
from mu2llm.model.causal import save_causal


def language_model(checkpoint: str, out: str, fresh: bool = False) -> dict[str, Any]:
    """Writes the folder (`mu2llm.model.causal`); what the command prints. Raises UserError where `out` is there."""
    opened = open_checkpoint(checkpoint)
    weights, name = weights_of(opened).weights, model_id(opened)
    place.clear(out, fresh)
    with tempfile.TemporaryDirectory() as folder:
        alone = save_causal(checkpoint, folder)
        storage.copy(folder, out)
    place.sign(out, "lm", checkpoint=checkpoint, weights=weights)
    architecture = type(alone).__name__
    told = {"architecture": architecture, "parameters": alone.num_parameters(), "dtype": str(alone.dtype)}
    return {"out": out, "served_model_name": name, **told}
