"""Results in storage: what decides one (its identity), whose place it is, and what a checkpoint's weights are.

Settings and the contents that a result was made of decide it, by dotted key: a setting counts where it differs from
its default and is not marked `Execution`; shards enter by their checksum, a parent by the digest of its weights, pairs
by their content. So a new setting with its default changes no identity. A default that changes, or code that makes
something else of the same inputs, needs a new `VERSION`.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict

from mu2llm import storage
from mu2llm.errors import Failure, UserError
from mu2llm.records import Checkpoint
from mu2llm.settings.section import EXECUTION

VERSION = 2
MEND = "--fresh removes it and starts over, another --out keeps both"
CLAIM = "identity.json"
_VISION = ("vision.", "model.vision.")  # names of the vision tower's tensors, alone and in a whole model
_READ_BYTES = 2**22


def digest(value: Any) -> str:
    """Twelve hex digits of anything that JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:12]


# ---- identity


def decides(name: str, section: BaseModel, leave_out: Collection[str] = ()) -> dict[str, Any]:
    """The settings of a section that decide a result and are not at their default: dotted key → JSON value."""
    values = section.model_dump(mode="json")
    found: dict[str, Any] = {}
    for field, info in type(section).model_fields.items():
        if EXECUTION in info.metadata or field in leave_out:
            continue
        key, value, default = f"{name}.{field}", getattr(section, field), info.get_default(call_default_factory=True)
        if isinstance(value, BaseModel):
            found |= {} if isinstance(default, BaseModel) else {key: True}
            found |= decides(key, value)
        elif value != default:
            found[key] = values[field]
    return found


class Identity(BaseModel):
    """What decides a result, key by key; kept beside the result, so that a difference can be named."""

    model_config = ConfigDict(frozen=True)
    inputs: dict[str, Any]

    @classmethod
    def of(cls, inputs: Mapping[str, Any]) -> Identity:
        plain: dict[str, Any] = json.loads(json.dumps({**inputs, "identity.version": VERSION}, default=str))
        return cls(inputs=plain)

    @property
    def digest(self) -> str:
        return digest(self.inputs)

    def check(self, place: str, what: str, digest: str, inputs: Mapping[str, Any], mend: str = MEND) -> None:
        """A UserError where `what` lies at `place` and was decided by other inputs: the first key, and the mends."""
        if digest == self.digest:
            return
        keys = [key for key in {**self.inputs, **inputs} if self.inputs.get(key) != inputs.get(key)]
        if not inputs or not keys:
            raise UserError(f"{place} holds {what} of an earlier version, without a record of what decided it; {mend}")
        there, here = (_short(values.get(keys[0])) for values in (inputs, self.inputs))
        raise UserError(
            f"{place} holds {what} of another configuration or data: {keys[0]} is {there} there, {here} here; {mend}"
        )


def _short(value: Any) -> str:
    text = "the default" if value is None else value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 40 else f"{text[:12]}…"


def claim(place: str, identity: Identity, what: str) -> None:
    """Takes a folder for what is being made, or goes on with what is there of the same; a UserError at another's."""
    path = storage.join(place, CLAIM)
    if storage.exists(path):
        there = storage.read_json(path)
        identity.check(place, what, there["identity"], there.get("inputs", {}))
    elif storage.exists(place):
        identity.check(place, what, "", {})
    else:
        storage.write_json(path, {"identity": identity.digest, **identity.model_dump()})


# ---- checkpoints


class Weights(NamedTuple):
    """SHA-256 of a checkpoint's safetensors with their config.json, and of its vision tower alone; "" where none is."""

    weights: str
    vision: str


def open_checkpoint(uri: str) -> Checkpoint:
    """Reads the description of the checkpoint folder at `uri`; a UserError where there is no checkpoint."""
    path = storage.join(uri, Checkpoint.FILE)
    if not storage.exists(path):
        raise UserError(
            f"{uri} is not a checkpoint: it has no {Checkpoint.FILE}; give a folder that `mu2llm train` wrote"
        )
    return Checkpoint(uri=uri, **storage.read_json(path))


def weights_of(checkpoint: Checkpoint) -> Weights:
    """The digests that its lineage keeps; of an older checkpoint, without them, its files are read once a process."""
    lineage = checkpoint.lineage
    return Weights(lineage.weights, lineage.vision) if lineage.weights else folder_weights(checkpoint.uri)


def model_id(checkpoint: Checkpoint) -> str:
    """By which servers name a checkpoint: of its stage and its weights, wherever it lies."""
    return f"mu2llm-{checkpoint.lineage.stage}-{weights_of(checkpoint).weights[:12]}"


def upload(folder: str, uri: str) -> Weights:
    """Copies a local `save_pretrained` folder to a URI; the digests of what was copied."""
    storage.copy(folder, uri)
    return folder_weights(folder)


def weighed(checkpoint: Checkpoint, weights: Weights) -> Checkpoint:
    """The same checkpoint with its weights' digests in the lineage."""
    return checkpoint.model_copy(
        update={"lineage": checkpoint.lineage.model_copy(update={"weights": weights.weights, "vision": weights.vision})}
    )


def publish(checkpoint: Checkpoint, folder: str) -> Checkpoint:
    """Uploads a local `save_pretrained` folder to the checkpoint's `uri` and completes it with its description."""
    made = weighed(checkpoint, upload(folder, checkpoint.uri))
    describe(made)
    return made


def describe(checkpoint: Checkpoint) -> None:
    """Writes the description, which makes the folder at its `uri` a whole checkpoint."""
    storage.write_json(storage.join(checkpoint.uri, Checkpoint.FILE), checkpoint.model_dump(mode="json"))


def discard(uri: str) -> None:
    """Deletes a checkpoint folder, its description first: what a kill leaves of it is not taken for a whole one."""
    storage.delete(storage.join(uri, Checkpoint.FILE))
    storage.delete(uri)


def folder_weights(uri: str) -> Weights:
    """The digests of the `save_pretrained` folder at a URI as its files are now; read once a process."""
    stamps = tuple((each.base_name, each.size, each.mtime_ns) for each in storage.list_files(uri, recursive=False))
    return _read_weights(uri, stamps)


def content(uri: str) -> str:
    """SHA-256 of what a setting names by its place: a folder's weights, or a file; read once a process."""
    if not storage.is_file(uri):
        return folder_weights(uri).weights
    return _read_whole(uri, storage.info(uri).mtime_ns)


@functools.lru_cache(maxsize=256)
def _read_whole(uri: str, stamp: int | None) -> str:
    filesystem, path = storage.resolve(uri)
    whole = hashlib.sha256()
    with filesystem.open_input_stream(path, compression=None) as stream:
        while part := stream.read(_READ_BYTES):
            whole.update(part)
    return whole.hexdigest()


@functools.lru_cache(maxsize=256)
def _read_weights(uri: str, stamps: tuple[tuple[str, int, int | None], ...]) -> Weights:
    names = [name for name, *_ in stamps if name.endswith(".safetensors") and not name.startswith(".")]
    if not names:
        return Weights("", "")
    described = storage.join(uri, "config.json")
    config = storage.read_bytes(described) if storage.exists(described) else b"{}"
    whole = hashlib.sha256(config)
    tower: dict[str, str] = {}
    for name in names:
        read, tensors = storage.retried(uri, functools.partial(_read_file, storage.join(uri, name)))
        whole.update(f"{read}  {name}\n".encode())
        tower |= tensors
    return Weights(whole.hexdigest(), _digest_of_tower(json.loads(config), tower))


def _digest_of_tower(config: dict[str, Any], tensors: dict[str, str]) -> str:
    if not tensors:
        return ""
    return hashlib.sha256(json.dumps([config.get("vision_config"), tensors], sort_keys=True).encode()).hexdigest()


def _read_file(uri: str) -> tuple[str, dict[str, str]]:
    """A safetensors file, streamed: its SHA-256, and one for each tensor of the vision tower, its type and shape."""
    filesystem, path = storage.resolve(uri)
    whole, found = hashlib.sha256(), {}
    with filesystem.open_input_stream(path, compression=None) as stream:

        def read(size: int) -> Iterator[bytes]:
            while size:
                part = stream.read(min(size, _READ_BYTES))
                if not part:
                    raise Failure(f"{uri} ends early or is no safetensors file; its weights cannot be identified")
                whole.update(part)
                size -= len(part)
                yield part

        length = int.from_bytes(b"".join(read(8)), "little")
        header = _header(uri, b"".join(read(length)) if length < 2**30 else b"")
        for name, tensor in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            start, end = tensor["data_offsets"]
            own = hashlib.sha256(json.dumps([tensor["dtype"], tensor["shape"]]).encode())
            for part in read(end - start):
                own.update(part)
            if name.startswith(_VISION):
                found[name.removeprefix("model.")] = own.hexdigest()
    return whole.hexdigest(), found


def _header(uri: str, text: bytes) -> dict[str, Any]:
    try:
        header: dict[str, Any] = json.loads(text)
    except ValueError as error:
        raise Failure(f"{uri} is no safetensors file; its weights cannot be identified") from error
    header.pop("__metadata__", None)
    return header
