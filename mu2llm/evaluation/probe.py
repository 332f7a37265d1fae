"""`mu2llm model probe`: what a vision encoder's features tell by themselves, without the language model.

A linear probe reads the 18 CT-RATE labels from the mean over a scan's tokens: fitted on split `train`, its strength and
thresholds chosen on `validation`, scored on `test`. A contrastive checkpoint also scores the labels by its texts alone;
a tower by itself has no head that knows them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import BaseModel
from torch import Tensor

from mu2llm import config, green
from mu2llm.artefacts import open_checkpoint
from mu2llm.cases import Shards
from mu2llm.cases.shards import read_rows
from mu2llm.engine.features import encode_scans
from mu2llm.errors import UserError
from mu2llm.evaluation.bootstrap import Bootstrap
from mu2llm.evaluation.clinical import Tally
from mu2llm.green.lexicon import LABELS, lexicon
from mu2llm.model import Mu2ForContrastive, load_contrastive
from mu2llm.model.towers.check import effective_rank
from mu2llm.progress import Counted
from mu2llm.records import Case, Estimate
from mu2llm.settings.stages import FINDINGS
from mu2llm.weights import TextEncoder

STRENGTHS = (0.001, 0.01, 0.1, 1.0)
"""Of the penalty on the probe's weights, tried on split `validation`."""
SPLITS = ("train", "validation", "test")
BATCH = 16  # scans whose features are read at a time


class LabelScore(BaseModel):
    """A label on the test split: how many scans have it, and how well it is told; None where all have it, or none."""

    positives: int
    auroc: Estimate | None = None
    f1: Estimate | None = None
    zero_shot_auroc: Estimate | None = None


class Probe(BaseModel):
    """What `probe` gives. `effective_rank` is that of the test scans' features: of `width` numbers how many differ."""

    checkpoint: str
    n: dict[str, int]
    width: int
    effective_rank: float
    macro_auroc: Estimate | None
    macro_f1: Estimate | None
    macro_zero_shot_auroc: Estimate | None
    labels: dict[str, LabelScore]


def probe(checkpoint: str, data: str, progress: Counted | None = None) -> Probe:
    """The linear probe of a checkpoint's vision on shards; features are cached beside them as for training.

    Raises UserError where the shards' spec is not the checkpoint's, or a split to fit or score on has no scans.
    """
    description = open_checkpoint(checkpoint)
    experiment = config.validate(description.experiment)
    shards = Shards.open(data)
    for split in ("train", "test"):
        if not shards.count(split):
            raise UserError(f"{data} has no scans in split {split}: the probe is fitted on train and scored on test")
    encoded = encode_scans(checkpoint, shards, experiment.evaluation, progress)
    is_contrastive = description.lineage.stage == "contrastive" and description.training.steps > 0
    model, encoder = load_contrastive(checkpoint) if is_contrastive else (None, None)
    texts = embed_labels(model, encoder, experiment.contrastive.positives) if model and encoder else None
    splits = {split: Scans.read(encoded, shards.cases(split), split, model, texts) for split in SPLITS}
    train, validation, test = splits.values()
    known = _mixed(train.labels)
    probabilities, thresholds = _fitted(train, validation if len(validation.labels) else train, test.features)
    found = probabilities > thresholds
    bootstrap = Bootstrap([case.patient for case in test.cases], experiment.evaluation.bootstrap, experiment.seed)
    areas = _areas(probabilities, test.labels, bootstrap, known)
    by_text = _areas(test.zero_shot, test.labels, bootstrap) if test.zero_shot is not None else {}
    right = np.stack([found & test.labels, found & ~test.labels, ~found & test.labels], axis=-1)
    tally = Tally(LABELS, right * known[:, None].astype(float))
    f1 = {name: bootstrap.estimate(statistic) for name, statistic in tally.by_name("f1").items()}
    scored = {
        name: LabelScore(
            positives=int(test.labels[:, i].sum()),
            auroc=_estimate(areas.get(name), len(test.labels)),
            f1=f1[name],
            zero_shot_auroc=_estimate(by_text.get(name), len(test.labels)),
        )
        for i, name in enumerate(LABELS)
    }
    return Probe(
        checkpoint=checkpoint,
        n={split: len(scans.labels) for split, scans in splits.items()},
        width=test.features.shape[1],
        effective_rank=effective_rank(test.features),
        macro_auroc=_estimate(_mean(areas), len(test.labels)),
        macro_f1=bootstrap.estimate(tally.macro("f1")),
        macro_zero_shot_auroc=_estimate(_mean(by_text), len(test.labels)),
        labels=scored,
    )


@dataclass(frozen=True)
class Scans:
    """A split's cases, their features (n, E), labels (n, 18), and zero-shot probabilities (n, 18) or None."""

    cases: list[Case]
    features: Tensor
    labels: np.ndarray
    zero_shot: np.ndarray | None

    @classmethod
    def read(
        cls, encoded: Shards, cases: list[Case], split: str, model: Mu2ForContrastive | None, texts: list[Tensor] | None
    ) -> Scans:
        pooled, scored = [], []
        for features, mask in _batches(encoded, split):
            weight = mask[:, :, None, None].float()
            pooled.append((features * weight).sum((1, 2)) / (weight.sum((1, 2)) * features.shape[2]))
            if model is not None and texts is not None:
                scored.append(zero_shot(model, features, mask, texts))
        labels = np.array([_labels(case) for case in cases], dtype=bool).reshape(-1, len(LABELS))
        features = torch.cat(pooled) if pooled else torch.zeros(0, 0)
        return cls(cases, features, labels, torch.cat(scored).numpy() if scored else None)


def _batches(encoded: Shards, split: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Features (b, T, n, E) float32 and chunk mask (b, T)."""
    for start in range(0, encoded.count(split), BATCH):
        rows = np.arange(start, min(start + BATCH, encoded.count(split)))
        read = read_rows(encoded.files(split), encoded.rows(split), ["features", "chunk_mask"], rows)
        yield torch.from_numpy(np.array(read["features"])).float(), torch.from_numpy(np.array(read["chunk_mask"]))


def _labels(case: Case) -> list[int]:
    """Those that came with the data set, else what the rules read in the report."""
    known = case.labels or green.labels(case.report)
    return [int(known.get(label, 0)) for label in LABELS]


def embed_labels(model: Mu2ForContrastive, encoder: TextEncoder, positives: str) -> list[Tensor]:
    """For each label the texts that mean it, said as the model was trained on (`contrastive.positives`), as its head
    reads them: (texts, D)."""
    return [model.whiten(encoder.embed(label_texts(label, positives))) for label in LABELS]


def label_texts(label: str, positives: str) -> list[str]:
    """What says that a scan has a label: findings by name, with and without a side, or sentences."""
    names = [entry.name for entry in lexicon().entries if entry.label == label] or [label.lower()]
    if positives not in FINDINGS:
        return [f"There is {name}." for name in names]
    sides = {name: ("", "left ", "right ", "bilateral ") if lexicon().by_name[name].sided else ("",) for name in names}
    return [f"{side}{name}" for name in names for side in sides[name]]


@torch.inference_mode()
def zero_shot(model: Mu2ForContrastive, features: Tensor, mask: Tensor, texts: list[Tensor]) -> Tensor:
    """(B, 18): of each label the most likely of its texts."""
    likely = model.zero_shot(None, mask, torch.cat(texts), features)
    return torch.stack([part.amax(0) for part in likely.split([len(text) for text in texts])], dim=1)


# ---- the probe


def _fitted(train: Scans, choose: Scans, test: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities (n, 18) of the test scans, and the threshold of each label that gives `choose` its highest F1."""
    mean, spread = train.features.mean(0), train.features.std(0, correction=0).clamp(min=1e-6)
    x, chosen, tested = ((each - mean) / spread for each in (train.features, choose.features, test))
    wanted, held = torch.from_numpy(train.labels).double(), torch.from_numpy(choose.labels).double()
    layers = [_logistic(x.double(), wanted, strength) for strength in STRENGTHS]
    best = min(layers, key=lambda layer: float(F.binary_cross_entropy_with_logits(layer(chosen.double()), held)))
    probabilities, guesses = best(tested.double()).sigmoid().numpy(), best(chosen.double()).sigmoid().numpy()
    return probabilities, np.array([_threshold(guesses[:, i], choose.labels[:, i]) for i in range(len(LABELS))])


def _logistic(x: Tensor, labels: Tensor, strength: float) -> Callable[[Tensor], Tensor]:
    """Logistic regression of all labels at once: convex, so that it has one solution."""
    weight = torch.zeros(x.shape[1], labels.shape[1], dtype=x.dtype, requires_grad=True)
    bias = torch.zeros(labels.shape[1], dtype=x.dtype, requires_grad=True)
    optimiser = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimiser.zero_grad()
        value = F.binary_cross_entropy_with_logits(x @ weight + bias, labels) + strength * weight.square().sum() / 2
        value.backward()
        return value

    optimiser.step(loss)
    found, offset = weight.detach(), bias.detach()
    return lambda rows: rows @ found + offset


def _threshold(scores: np.ndarray, labels: np.ndarray) -> float:
    if not labels.any():
        return 0.5
    tried = np.unique(scores)
    found = scores[None] >= tried[:, None]
    f1 = 2 * (found & labels).sum(1) / np.maximum(found.sum(1) + labels.sum(), 1)
    return float(tried[f1.argmax()] - 1e-12)


# ---- areas under the curve, with their intervals


def auroc(scores: np.ndarray, labels: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """(n,), (n,) → the area under the ROC of the scans drawn so often (resamples, n): (resamples,), ties half."""
    have, lack = scores[labels], scores[~labels]
    wins = (have[:, None] > lack[None]) + 0.5 * (have[:, None] == lack[None])
    positive, negative = draws[:, labels], draws[:, ~labels]
    with np.errstate(invalid="ignore", divide="ignore"):
        return ((positive @ wins) * negative).sum(1) / (positive.sum(1) * negative.sum(1))


def _areas(
    scores: np.ndarray, labels: np.ndarray, bootstrap: Bootstrap, known: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """Of the labels that some scans have and some lack: the area itself, and then that of each resample."""
    draws = np.concatenate([np.ones((1, len(labels))), bootstrap.draws])
    mixed = _mixed(labels) if known is None else _mixed(labels) & known
    return {name: auroc(scores[:, i], labels[:, i], draws) for i, name in enumerate(LABELS) if mixed[i]}


def _mixed(labels: np.ndarray) -> np.ndarray:
    """(18,): labels that some of the scans have and some lack."""
    return np.asarray(labels.any(0) & ~labels.all(0))


def _mean(areas: dict[str, np.ndarray]) -> np.ndarray | None:
    return np.nanmean(np.stack(list(areas.values())), axis=0) if areas else None


def _estimate(area: Any, n: int) -> Estimate | None:
    if area is None:
        return None
    low, high = np.nanpercentile(area[1:], [2.5, 97.5])
    return Estimate(value=float(area[0]), low=float(low), high=float(high), n=n)
