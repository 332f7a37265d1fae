"""The vision encoder under a contrastive head: scans against the sentences, sections or reports about them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModel
from transformers import initialization as init
from transformers.utils import ModelOutput

from mu2llm.errors import UserError
from mu2llm.model.configuration import Mu2ContrastiveConfig
from mu2llm.model.initialisation import Initialised
from mu2llm.model.modeling import Mu2PreTrainedModel
from mu2llm.model.text_pooling import TextConditionedPooling
from mu2llm.model.vision import VisionEncoder
from mu2llm.weights import mean_pool

Gather = Callable[[Tensor], Tensor]


@dataclass
class ContrastiveOutput(ModelOutput):
    """`logits` (M, B) of every distinct text with every scan of this worker, and which of them belong together,
    `targets` (M, B).

    `positives` is how many pairs of a distinct text and a scan belong together, over all workers: what the loss has
    to pull. The mean of the workers' `loss` is that of the whole batch, and the mean of its gradients too.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    targets: Tensor | None = None
    positives: Tensor | None = None


class TextWhitening(Initialised):
    """Centre and axes by which a sentence encoder's embeddings became what the head learned to read."""

    centre: Tensor
    axes: Tensor

    def __init__(self, encoder_width: int, text_width: int) -> None:
        super().__init__()
        self.register_buffer("centre", torch.zeros(encoder_width))
        self.register_buffer("axes", torch.eye(encoder_width, text_width))

    def initialise(self) -> None:
        init.zeros_(self.centre)
        init.copy_(self.axes, torch.eye(*self.axes.shape))

    def forward(self, embeddings: Tensor) -> Tensor:
        """(M, encoder width) → (M, text width)"""
        return (embeddings - self.centre) @ self.axes


class Mu2ForContrastive(Mu2PreTrainedModel):
    """Sigmoid (SigLIP) or InfoNCE over all texts and scans of the batch; gives the vision encoder SFT starts from."""

    config_class = Mu2ContrastiveConfig  # type: ignore[assignment]
    base_model_prefix = "vision"
    main_input_name = "volumes"

    def __init__(self, config: Mu2ContrastiveConfig) -> None:
        super().__init__(config)
        self.vision = VisionEncoder(config.vision)
        self.head = TextConditionedPooling(config)
        self.whitening = TextWhitening(config.encoder_width, config.text_width) if config.encoder_width else None
        self.text_encoder = AutoModel.from_config(config.text_config) if config.text_config else None
        self.post_init()

    def keep_whitening(self, centre: Tensor, axes: Tensor) -> None:
        """Saves with the model how its texts are whitened: centre (W,), axes (W, text width)."""
        self.config.encoder_width = len(centre)
        self.whitening = TextWhitening(*axes.shape).to(self.device)
        self.whitening.load_state_dict({"centre": centre, "axes": axes})

    def encode_vision(
        self, volumes: Tensor, chunk_mask: Tensor | None = None, full_chunks: int | None = None
    ) -> Tensor:
        """(B, T, C, K, H, W) → pooled features (B, T, n, hidden); `full_chunks` is as in `VisionEncoder`"""
        if chunk_mask is None:
            chunk_mask = torch.ones(volumes.shape[:2], dtype=torch.bool, device=volumes.device)
        return cast(Tensor, self.vision(volumes, chunk_mask.bool(), full_chunks))

    def embed_texts(
        self,
        text_embeddings: Tensor | None = None,
        text_ids: Tensor | None = None,
        text_mask: Tensor | None = None,
    ) -> Tensor:
        """Embeddings (M, D) as they are, or of tokens (M, L), of length 1, by the model's own text encoder."""
        if text_embeddings is not None:
            return text_embeddings
        if self.text_encoder is None or text_ids is None or text_mask is None:
            raise UserError("give text_embeddings, or to a model with a text encoder of its own text_ids and text_mask")
        return mean_pool(self.text_encoder(text_ids, text_mask).last_hidden_state, text_mask)

    def score(
        self,
        volumes: Tensor | None,
        chunk_mask: Tensor,
        text_embeddings: Tensor,
        vision_features: Tensor | None = None,
    ) -> Tensor:
        """Logits (M, B) of each text (M, D) with each scan, or with its features (B, T, n, hidden)."""
        features, mask = self._tokens(volumes, chunk_mask, vision_features)
        return self.head(text_embeddings.to(features.dtype), self.head.scan(features), mask)

    def zero_shot(
        self,
        volumes: Tensor | None,
        chunk_mask: Tensor,
        text_embeddings: Tensor,
        vision_features: Tensor | None = None,
    ) -> Tensor:
        """(M, B): how likely each text is true of each scan, by the temperature that was fitted on held-out scans."""
        return (self.score(volumes, chunk_mask, text_embeddings, vision_features) / self.head.temperature).sigmoid()

    def get_image_features(
        self, volumes: Tensor | None, chunk_mask: Tensor, vision_features: Tensor | None = None
    ) -> Tensor:
        """(B, head width): a scan by itself, the mean of what the head finds at its tokens.

        Its product with `get_text_features` is the score of a text that looks everywhere alike, without the bias;
        `score` lets each text look at its own few tokens.
        """
        features, mask = self._tokens(volumes, chunk_mask, vision_features)
        values = self.head.value(self.head.scan(features))
        return (values * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)

    def get_text_features(self, text_embeddings: Tensor) -> Tensor:
        """Texts (M, D), as `whiten` or `embed_texts` gives them, → (M, head width)"""
        return cast(Tensor, self.head.mean(text_embeddings.to(self.head.mean.weight.dtype)))

    def whiten(self, embeddings: Tensor) -> Tensor:
        """A sentence encoder's embeddings (M, W) → what the head reads, (M, D); unchanged where none was whitened."""
        return embeddings if self.whitening is None else cast(Tensor, self.whitening(embeddings))

    def _tokens(
        self, volumes: Tensor | None, chunk_mask: Tensor, features: Tensor | None, full_chunks: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Features (B, T, n, hidden) and which of their tokens are of a chunk that holds something (B, T·n)."""
        if features is None:
            if volumes is None:
                raise UserError("give volumes or vision_features")
            features = self.encode_vision(volumes, chunk_mask, full_chunks)
        return features, chunk_mask.bool().repeat_interleave(features.shape[2], dim=1)

    def forward(
        self,
        volumes: Tensor | None = None,
        chunk_mask: Tensor | None = None,
        text_embeddings: Tensor | None = None,
        owner: Tensor | None = None,
        targets: Tensor | None = None,
        text_ids: Tensor | None = None,
        text_mask: Tensor | None = None,
        text_keys: Tensor | None = None,
        gather: Gather | None = None,
        full_chunks: int | None = None,
        vision_features: Tensor | None = None,
        **_: Any,
    ) -> ContrastiveOutput:
        """volumes (B, T, C, K, H, W), or their vision_features (B, T, n, hidden), chunk_mask (B, T), and texts → the
        loss over all their pairs.

        text_embeddings (M, D), or text_ids and text_mask (M, L) for a text encoder that is trained too. `owner` (M,)
        is each text's scan, or `targets` (M, B) all scans it is true of. Texts of the same key, text_keys (M,) int64,
        are one text, whoever brought them; without keys each is a text of its own. Keys and not embeddings: in bf16
        no embedding's product with itself is 1.

        `gather` brings (n, …) of this worker to (N, …) of all, in the same order on each, with the gradient. Only
        texts are gathered, and they need keys: each worker holds those of all against its own scans.
        Raises UserError where InfoNCE has a text that no scan has.
        """
        assert chunk_mask is not None
        cached = None if vision_features is None else vision_features.to(self.dtype)
        features, mask = self._tokens(volumes, chunk_mask, cached, full_chunks)
        texts = self.embed_texts(text_embeddings, text_ids, text_mask).to(features.dtype)
        if targets is None:
            assert owner is not None
            targets = F.one_hot(owner, len(features)).bool()
        if text_keys is not None:
            texts, targets = _distinct(texts, targets, text_keys, gather)
        elif gather is not None:
            raise UserError("give text_keys: among several workers' texts they tell which are the same")
        logits = self.head(texts, self.head.scan(features), mask)
        exact = logits.to(torch.promote_types(logits.dtype, torch.float32))
        loss = {"sigmoid": _sigmoid, "infonce": _infonce}[self.config.loss](exact, targets, gather)
        return ContrastiveOutput(loss=loss, logits=logits, targets=targets, positives=_total(targets.sum(), gather))


@torch.no_grad()
def fit_temperature(logits: Tensor, targets: Tensor, loss: str) -> float:
    """The temperature, 0.05 to 20, over which held-out logits (M, B) have least loss (Guo et al. 2017)."""
    measure = {"sigmoid": _sigmoid, "infonce": _infonce}[loss]
    tried = torch.logspace(-1.3, 1.3, 105).tolist()
    return min(tried, key=lambda temperature: float(measure(logits / temperature, targets)))


def _distinct(texts: Tensor, targets: Tensor, keys: Tensor, gather: Gather | None) -> tuple[Tensor, Tensor]:
    """Texts (M, D) of all workers, each once, and which of them this worker's scans have (M, B)."""
    own = keys
    if gather is not None:
        texts, keys = gather(texts), gather(keys)
    first = (~(keys[:, None] == keys[None]).tril(-1).any(1)).nonzero().squeeze(1)
    has = (keys[first, None] == own[None]).float() @ targets.float()
    return texts[first], has > 0


def _total(number: Tensor, gather: Gather | None) -> Tensor:
    """Of all workers together."""
    return number if gather is None else gather(number[None]).sum()


def _sigmoid(logits: Tensor, targets: Tensor, gather: Gather | None = None) -> Tensor:
    """SigLIP: every pair is its own yes or no."""
    each = F.binary_cross_entropy_with_logits(logits, targets.to(logits.dtype), reduction="sum")
    return each * _share(logits.shape[1], gather, logits) / logits.shape[0]


def _infonce(logits: Tensor, targets: Tensor, gather: Gather | None = None) -> Tensor:
    """Cross-entropy of each text over the scans of all workers and of each scan over the texts, any positive being
    right."""
    hit = logits.masked_fill(~targets, float("-inf"))
    of_text = torch.stack([logits.logsumexp(1), hit.logsumexp(1)])
    if gather is not None:
        of_text = gather(of_text[None]).logsumexp(0)
    lonely = int(of_text[1].isinf().sum())
    if lonely:
        raise UserError(f"{lonely} of {len(targets)} texts are of no scan: InfoNCE has nothing to pull them to")
    by_text = (of_text[0] - of_text[1]).mean()
    owned = targets.any(0)
    by_scan = (logits.logsumexp(0) - hit.logsumexp(0))[owned].sum() * _share(int(owned.sum()), gather, logits)
    return (by_text + by_scan) / 2


def _share(own: int, gather: Gather | None, like: Tensor) -> Tensor:
    """What a sum over this worker's scans counts: workers / scans of all, as the workers' losses are averaged."""
    counts = like.new_tensor([own])
    counts = counts if gather is None else gather(counts)
    return len(counts) / counts.sum()
