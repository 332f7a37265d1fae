"""BERTScore of a run's reports: in this process, or on Ray Data where there are many, by the evaluation's actors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data

from mu2llm import logs, weights
from mu2llm.engine.actors import failures, resources, use_cpus
from mu2llm.evaluation import text_metrics
from mu2llm.evaluation.last_layer import LastLayer
from mu2llm.evaluation.text_metrics import TOGETHER, Pair
from mu2llm.settings.inference import InferenceConfig

MANY = 2000  # pairs, from which actors are worth their start


class BertScore:
    """By the text encoder of a name, which is loaded where it is used. A UserError where there is none."""

    def __init__(self, encoder: str, settings: InferenceConfig) -> None:
        self._name, self._settings, self._cut = encoder, settings, 0
        self._most = int(weights.text_encoder_config(encoder).max_position_embeddings)
        self._here: LastLayer | None = None

    @property
    def identity(self) -> str:
        """What two numbers must share to be comparable."""
        return f"{self._name}, last layer, no idf, not rescaled"

    @property
    def description(self) -> str:
        """The identity, and how many texts were longer than the encoder takes."""
        return self.identity + (f"; {self._cut} texts were cut at {self._most} tokens" if self._cut else "")

    def scores(self, pairs: Sequence[Pair]) -> list[float]:
        """F1 of each pair."""
        if ray.is_initialized() and len(pairs) >= MANY:
            return self._by_actors(pairs)
        self._here = self._here or LastLayer(self._name)
        before = self._here.cut
        scores = text_metrics.bert_score(pairs, self._here)
        self._cut += self._here.cut - before
        return scores

    def _by_actors(self, pairs: Sequence[Pair]) -> list[float]:
        rows = list(_rows(pairs))
        parts = ray.data.from_items(rows, override_num_blocks=len(rows))
        parts.context.raise_original_map_exception = True
        scored = parts.map_batches(
            _Actor,
            fn_constructor_args=(self._name, self._settings),
            batch_size=1,
            **resources(self._settings, len(rows)),
        )
        scores = np.empty(len(pairs))
        with failures("BERTScore", "reports and judgements are kept, run again to go on"):
            for row in scored.iter_rows():
                scores[row["first"] : row["first"] + len(row["scores"])] = row["scores"]
                self._cut += row["cut"]
        return [float(score) for score in scores]


def _rows(pairs: Sequence[Pair]) -> Iterator[dict[str, Any]]:
    """What is encoded together, so that the numbers are those of one process."""
    for first in range(0, len(pairs), TOGETHER):
        references, candidates = zip(*pairs[first : first + TOGETHER], strict=True)
        yield {"first": first, "references": list(references), "candidates": list(candidates)}


class _Actor:
    def __init__(self, name: str, settings: InferenceConfig) -> None:
        logs.begin(stage="evaluate")
        use_cpus(settings)
        self._encoder = LastLayer(name, "cuda" if settings.gpus_per_actor else "cpu")

    def __call__(self, batch: dict[str, np.ndarray]) -> pa.Table:
        before = self._encoder.cut
        pairs = list(zip(batch["references"][0], batch["candidates"][0], strict=True))
        scores = text_metrics.bert_score(pairs, self._encoder)
        return pa.table({"first": batch["first"], "scores": [scores], "cut": [self._encoder.cut - before]})
