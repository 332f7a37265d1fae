"""Results in storage: what identifies one, and how a checkpoint is opened and published."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from mu2llm import storage
from mu2llm.errors import UserError
from mu2llm.records import Checkpoint


def digest(value: Any) -> str:
    """Twelve hex digits of anything that JSON can hold: what decides whether a stage is to be done again."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:12]


def open_checkpoint(uri: str) -> Checkpoint:
    """Reads the description of the checkpoint folder at `uri`; a UserError where there is no checkpoint."""
    path = storage.join(uri, Checkpoint.FILE)
    if not storage.exists(path):
        raise UserError(
            f"{uri} is not a checkpoint: it has no {Checkpoint.FILE}; give a folder that `mu2llm train` wrote"
        )
    return Checkpoint(uri=uri, **storage.read_json(path))


def publish(checkpoint: Checkpoint, folder: str) -> None:
    """Uploads a local `save_pretrained` folder to the checkpoint's `uri` and completes it with its description."""
    storage.copy(folder, checkpoint.uri)
    storage.write_json(storage.join(checkpoint.uri, Checkpoint.FILE), checkpoint.model_dump(mode="json"))
