"""Token embeddings for BERTScore: the last layer of a text encoder."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from mu2llm import weights

BATCH = 32


class LastLayer:
    """A `TokenEncoder` by `weights.text_encoder`. `cut` counts the texts that were longer than the encoder takes."""

    def __init__(self, name: str, device: str = "cpu") -> None:
        self.cut, self.device = 0, device
        encoder = weights.text_encoder(name)
        self.model, self.tokenizer = encoder.model.to(device), encoder.tokenizer
        self.most = int(self.model.config.max_position_embeddings)

    @torch.inference_mode()
    def tokens(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Each text → (tokens, width), the special tokens first and last."""
        ids = self.tokenizer(list(texts), truncation=True, max_length=self.most).input_ids
        self.cut += sum(len(row) == self.most for row in ids)
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))  # alike lengths pad little
        out: list[np.ndarray] = [np.empty(0)] * len(ids)
        for start in range(0, len(order), BATCH):
            rows = order[start : start + BATCH]
            inputs = self.tokenizer.pad({"input_ids": [ids[i] for i in rows]}, return_tensors="pt")
            hidden = self.model(**inputs.to(self.device)).last_hidden_state.float().cpu().numpy()
            for i, states in zip(rows, hidden, strict=True):
                out[i] = states[: len(ids[i])]
        return out
