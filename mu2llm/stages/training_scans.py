"""What a checkpoint keeps of the scans that it was trained on, so that it can say which scan is unlike them."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import torch

from mu2llm import storage
from mu2llm.cases import Shards
from mu2llm.engine.features import read_scans
from mu2llm.model import familiarity
from mu2llm.model.familiarity import LEAST, Familiarity, pooled
from mu2llm.stages.job import Job

logger = logging.getLogger(__name__)
SAMPLE = 1024  # scans at most, evenly of the training rows
BATCH = 16


def remember(model: Any, job: Job, shards: Shards, folder: str) -> None:
    """Writes the statistics of training scans into a checkpoint folder; `shards` may be those of cached features.

    The model is put into evaluation mode, on the stage's device.
    """
    count = shards.count("train")
    if count < LEAST:
        logger.warning("%s: %d training scans are too few to tell which scan is unlike them", job.out, count)
        return
    on_gpu = job.settings.gpus_per_worker and torch.cuda.is_available()
    model = model.eval().to("cuda" if on_gpu else "cpu")
    rows = np.unique(np.linspace(0, count - 1, min(count, SAMPLE)).astype(int))
    parts = [
        pooled(*read_scans(model, shards, "train", rows[start : start + BATCH], job.settings.precision)).cpu()
        for start in range(0, len(rows), BATCH)
    ]
    known = Familiarity.of(torch.cat(parts))
    assert known is not None
    known.write(folder)


def carry(parent: str, folder: str) -> None:
    """The parent's statistics, where vision is the same; an older parent has none."""
    path = storage.join(parent, familiarity.FILE)
    if storage.exists(path):
        storage.write_bytes(storage.join(folder, familiarity.FILE), storage.read_bytes(path))
    else:
        logger.warning("%s keeps nothing of its training scans, so what comes of it cannot tell scans unlike", parent)
