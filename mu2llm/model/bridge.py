"""Between the μ²Tokenizer and a language model of another width, or whose embeddings are of another size."""

from __future__ import annotations

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from mu2llm.model.configuration import Mu2TokenizerConfig
from mu2llm.model.initialisation import Initialised


class EmbeddingScale(Initialised):
    """Tokens of the root mean square of a language model's own input embeddings, times a learned gain that starts at 1.

    Unscaled, tokens of unit variance are as many times larger than the words beside them as 1 is than `rms`.
    """

    rms: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(1))  # FSDP shards no single numbers
        self.register_buffer("rms", torch.ones(()))

    def initialise(self) -> None:
        init.ones_(self.gain)
        init.ones_(self.rms)

    @torch.no_grad()
    def measure(self, embeddings: Tensor) -> None:
        """From the table (vocabulary, hidden) of the language model."""
        norm = torch.linalg.vector_norm(embeddings, dtype=torch.promote_types(embeddings.dtype, torch.float32))
        self.rms.copy_(norm / math.sqrt(embeddings.numel()))

    def forward(self, x: Tensor) -> Tensor:
        """(…, E) → the same shape and type; computed in fp32 or finer"""
        exact = x.to(torch.promote_types(x.dtype, torch.float32))
        return (F.rms_norm(exact, exact.shape[-1:]) * (self.rms * self.gain)).to(x.dtype)


class LanguageBridge(nn.Module):
    """Linear maps where the widths differ: the question's embeddings down to the μ²Tokenizer, its tokens up to the
    language model; and the scale of these."""

    def __init__(self, config: Mu2TokenizerConfig) -> None:
        super().__init__()
        width, language = config.hidden_size, config.language_size
        asked = language is not None and config.text_conditioned
        self.text = nn.Linear(cast(int, language), width) if asked else None
        self.tokens = nn.Linear(width, language) if language is not None else None
        self.norm = EmbeddingScale() if config.output_scale == "embedding_rms" else None

    def down(self, text: Tensor) -> Tensor:
        """The question's embeddings (B, L, language model's width) → (B, L, E)"""
        return text if self.text is None else self.text(text)

    def up(self, tokens: Tensor) -> Tensor:
        """Tokens (B, queries, E) → (B, queries, language model's width)"""
        tokens = tokens if self.tokens is None else self.tokens(tokens)
        return tokens if self.norm is None else self.norm(tokens)
