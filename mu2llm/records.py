"""The nouns that pass between rooms, as pydantic models with their Arrow schemas.

`CTVolume` lives in `mu2llm.ct`: it carries an array and never leaves the process that read it.
"""

from __future__ import annotations

import hashlib
import json
import math
from typing import Any, ClassVar, Literal, Self

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer, model_validator

Side = Literal["left", "right", "bilateral"]
Split = Literal["train", "validation", "test"]


class Record(BaseModel):
    """A frozen row: pydantic outside, Arrow in storage. Nested values are stored as JSON text."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    arrow_schema: ClassVar[pa.Schema]

    def row(self) -> dict[str, Any]:
        """The record as a row of its table."""
        values = self.model_dump(mode="json")
        return {
            field.name: json.dumps(values[field.name]) if _is_json(field) else values[field.name]
            for field in self.arrow_schema
        }

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> Self:
        """The inverse of `row`; columns that the record does not have are ignored."""
        values = {field.name: row[field.name] for field in cls.arrow_schema if field.name in row}
        for field in cls.arrow_schema:
            if _is_json(field) and isinstance(values.get(field.name), str):
                values[field.name] = json.loads(values[field.name])
        return cls.model_validate(values)

    @classmethod
    def table(cls, records: list[Self]) -> pa.Table:
        """Records → Arrow table with the record's schema, also when there is none."""
        return pa.Table.from_pylist([record.row() for record in records], schema=cls.arrow_schema)


def _json(name: str) -> pa.Field:
    return pa.field(name, pa.string(), metadata={b"encoding": b"json"})


def _is_json(field: pa.Field) -> bool:
    return bool(field.metadata) and field.metadata.get(b"encoding") == b"json"


class Finding(Record):
    """One finding that is present. `size_mm` is its longest diameter."""

    name: str
    side: Side | None = None
    place: str | None = None
    size_mm: float | None = None


class Question(Record):
    """One instruction about a scan and its answer; `region` is the part of the body it is about."""

    question: str
    answer: str
    region: str | None = None


class Series(Record):
    """A further series of an examination: where it is, as `Case` says of the first; without `rescale` that one's."""

    volume: str
    series: str | None = None
    rescale: tuple[float, float] | None = None


class Case(Record):
    """One examination: a scan in storage, or several series of it, and what was written about it."""

    id: str
    patient: str
    volume: str = Field(description="URI of the scan")
    report: str = Field(description="reference report, findings and impression")
    split: Split | None = None
    questions: tuple[Question, ...] = ()
    findings: tuple[Finding, ...] | None = Field(None, description="truth, where it is known (phantoms)")
    labels: dict[str, int] | None = Field(None, description="abnormality labels that came with the data set")
    rescale: tuple[float, float] | None = Field(
        None, description="slope and intercept from a metadata table, for volumes whose header lacks them"
    )
    series: str | None = Field(
        None,
        description="DICOM series among those at `volume`, by instance UID or description, NAME#2 for the second scan "
        "in it; None: the largest axial",
    )
    further: tuple[Series, ...] = Field((), description="the examination's series behind the first")
    source: str = ""

    arrow_schema = pa.schema(
        [
            pa.field("id", pa.string()),
            pa.field("patient", pa.string()),
            pa.field("volume", pa.string()),
            pa.field("report", pa.string()),
            pa.field("split", pa.string()),
            _json("questions"),
            _json("findings"),
            _json("labels"),
            _json("rescale"),
            pa.field("series", pa.string()),
            _json("further"),
            pa.field("source", pa.string()),
        ]
    )

    @property
    def every_series(self) -> tuple[Series, ...]:
        """The series of the examination, in the order in which a model gets them."""
        first = Series(volume=self.volume, series=self.series, rescale=self.rescale)
        return (
            first,
            *(each if each.rescale else each.model_copy(update={"rescale": self.rescale}) for each in self.further),
        )


PLAIN_FITS = ("torchio", "monai", "tiles")
"""Fits that keep a scan's scale, or bring it to `spacing_mm`: linear, in HU, without averaging."""


class PreprocessSpec(Record):
    """How a scan in HU becomes the model's input: (chunks T, channels C, slices K, H, W).

    Of several `series` of an examination each is prepared by itself, and their chunks stand one behind the other.

    Saved in the shards and in the checkpoint, and enforced by `hash` at inference. Sizes are (z, y, x), or in the order
    of `axes`. Exactly one of `windows` (HU ranges, one channel each) and `percentiles` (the reference's 0.5–99.5
    min–max scaling, one channel) is given.
    """

    version: Literal[1] = 1
    name: str
    orientation: Literal["RAS", "as_stored"] = "RAS"
    axes: str = Field(
        "SAR",
        pattern="^[RLAPSI]{3}$",
        description="where the grid's three axes run to; SAR: slices up, rows to the front, columns to the right",
    )
    spacing_mm: tuple[float, float, float] | None = Field(None, description="resample to it first; None keeps it")
    windows: tuple[tuple[float, float], ...] | None = None
    percentiles: tuple[float, float] | None = None
    crop_foreground: bool = True
    fit: Literal["isotropic", "stretch", "reference", "torchio", "monai", "tiles"] = Field(
        "isotropic",
        description="how the cropped body meets the grid: one scale for all axes and centred padding, each axis "
        "stretched to the grid, or the published way (METHOD.md §2.1); or at its own scale, cut or padded in the "
        "middle as TorchIO and MONAI do it, or cut to whole tiles",
    )
    grid: tuple[int, int, int] = Field(description="voxels (z, y, x) after resizing; z = chunks × slices a chunk")
    chunks: int = Field(ge=1)
    tiles: tuple[int, int, int] | None = Field(
        None, description="chunks along each axis, the last one counting fastest; None: all along the first"
    )
    dtype: Literal["uint8", "float16", "float32"] = "uint8"
    series: int = Field(
        1, ge=1, description="series of an examination that are read; where it has fewer, the others' chunks are empty"
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.windows is None) == (self.percentiles is None):
            raise ValueError(f"spec {self.name}: give either windows or percentiles, not both or neither")
        if self.tiles is None and self.grid[0] % self.chunks:
            raise ValueError(f"spec {self.name}: {self.grid[0]} slices do not divide into {self.chunks} chunks")
        if math.prod(self.tiling) != self.chunks or any(n % by for n, by in zip(self.grid, self.tiling, strict=True)):
            raise ValueError(
                f"spec {self.name}: a grid of {self.grid} in tiles {self.tiles} are not {self.chunks} chunks"
            )
        if {frozenset("RL"), frozenset("AP"), frozenset("SI")} != {_axis(letter) for letter in self.axes}:
            raise ValueError(f"spec {self.name}: axes {self.axes} do not name each axis of the body once, such as SAR")
        if self.fit in PLAIN_FITS and (self.windows is None or self.orientation != "RAS"):
            raise ValueError(f"spec {self.name}: fit {self.fit} needs windows, and orientation RAS with its axes")
        return self

    @model_serializer(mode="wrap")
    def _without_defaults(self, serialise: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """What came later is not written where it says nothing: older specs keep their text and their hash."""
        values: dict[str, Any] = serialise(self)
        return {
            key: v for key, v in values.items() if (key, v) not in (("axes", "SAR"), ("tiles", None), ("series", 1))
        }

    @property
    def tiling(self) -> tuple[int, int, int]:
        """Chunks along each axis of the grid, which is of one series."""
        return self.tiles or (self.chunks, 1, 1)

    @property
    def channels(self) -> int:
        return len(self.windows) if self.windows else 1

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """(T, C, K, H, W) of one scan, or of all series of an examination."""
        depth, height, width = (size // by for size, by in zip(self.grid, self.tiling, strict=True))
        return (self.series * self.chunks, self.channels, depth, height, width)

    @property
    def title(self) -> str:
        """Name and hash, and how many series it reads where it is not one."""
        return f"{self.name} ({self.hash}{_of_series(self.series)})"

    @property
    def hash(self) -> str:
        """Twelve hex digits over every field but the name."""
        fields = self.model_dump(mode="json", exclude={"name"})
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:12]


def _of_series(count: int) -> str:
    return f", {count} series" if count > 1 else ""


def _axis(letter: str) -> frozenset[str]:
    return next(frozenset(pair) for pair in ("RL", "AP", "SI") if letter in pair)


ERROR_CATEGORIES: dict[str, str] = {
    "a": "False report of a finding in the candidate",
    "b": "Missing a finding present in the reference",
    "c": "Misidentification of a finding's anatomic location/position",
    "d": "Misassessment of the severity of a finding",
    "e": "Mentioning a comparison that isn't in the reference",
    "f": "Omitting a comparison detailing a change from a prior study",
}


class Judgement(Record):
    """What a judge made of one (reference, candidate) pair: GREEN's counts, or why there are none.

    `significant` and `insignificant` count the errors (a)–(f); the `*_sentences` hold, per category, the
    sentences named. `score` is GREEN = matched / (matched + Σ significant), 0 where nothing matched, or what else the
    judge measures; None if invalid.
    """

    valid: bool
    score: float | None
    significant: tuple[int, int, int, int, int, int] = (0, 0, 0, 0, 0, 0)
    insignificant: tuple[int, int, int, int, int, int] = (0, 0, 0, 0, 0, 0)
    matched: int = 0
    significant_sentences: tuple[tuple[str, ...], ...] = ()
    insignificant_sentences: tuple[tuple[str, ...], ...] = ()
    matched_sentences: tuple[str, ...] = ()
    why: str = Field("", description="the reason where invalid, or where the candidate failed")
    judge: str = Field("", description="the judge's identity")

    arrow_schema = pa.schema(
        [
            pa.field("valid", pa.bool_()),
            pa.field("score", pa.float64()),
            pa.field("significant", pa.list_(pa.int32())),
            pa.field("insignificant", pa.list_(pa.int32())),
            pa.field("matched", pa.int32()),
            _json("significant_sentences"),
            _json("insignificant_sentences"),
            _json("matched_sentences"),
            pa.field("why", pa.string()),
            pa.field("judge", pa.string()),
        ]
    )

    @property
    def failed(self) -> bool:
        """Whether the candidate scores 0 for what it is (empty, cut off, unreadable), and not for what it says."""
        return self.valid and bool(self.why)


class Candidate(Record):
    """One report proposed for a case: sampled from a model, the reference, or that with a known corruption."""

    case_id: str
    index: int
    text: str
    origin: Literal["sampled", "reference", "corrupted", "human"]
    seed: int
    corruption: str = ""

    arrow_schema = pa.schema(
        [
            pa.field("case_id", pa.string()),
            pa.field("index", pa.int32()),
            pa.field("text", pa.string()),
            pa.field("origin", pa.string()),
            pa.field("seed", pa.int64()),
            pa.field("corruption", pa.string()),
        ]
    )


class PreferencePair(Record):
    """For one case, a report to prefer over another, with the judge's scores (None for human corrections)."""

    case_id: str
    prompt: str
    chosen: str
    rejected: str
    chosen_score: float | None
    rejected_score: float | None
    judge: str
    origin: Literal["sampled", "reference", "corrupted", "human"] = "sampled"

    arrow_schema = pa.schema(
        [
            *[pa.field(n, pa.string()) for n in ("case_id", "prompt", "chosen", "rejected")],
            pa.field("chosen_score", pa.float64()),
            pa.field("rejected_score", pa.float64()),
            pa.field("judge", pa.string()),
            pa.field("origin", pa.string()),
        ]
    )

    @property
    def key(self) -> str:
        """Sixteen hex digits of what a model learns from it: case, prompt and both reports."""
        texts = (self.case_id, self.prompt, self.chosen, self.rejected)
        return hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:16]


class Correction(Record):
    """A radiologist's version (`chosen`) of a report that the service wrote (`rejected`): a preference pair to be.

    One JSON line in storage. Its scan is known by `scan_sha256`, as `CTVolume.sha256`, by `input_key`, what the model
    saw of it (`mu2llm.ct.input_key`, by the spec `spec_hash`), and by `volume`, the URI from which it was read or
    under which the service kept it; None where it was uploaded and not kept. What the model saw may lie beside it, as
    `inputs/<report_id>.parquet` (`serving.keep_inputs`). `accepted` says that it was accepted as it is: both texts are
    the same. That and the `principal` who said so decide no pair, so they are no columns.
    """

    id: str
    report_id: str = Field("", description="of the generated report; empty where its text was sent instead")
    scan_sha256: str
    volume: str | None = None
    question: str
    chosen: str
    rejected: str
    checkpoint: str = ""
    spec_hash: str = ""
    input_key: str = ""
    time: str = Field(description="ISO 8601, UTC")
    principal: str = Field("", description="who made it, as the service's audit log names them")
    accepted: bool = False

    arrow_schema = pa.schema(
        [
            pa.field(name, pa.string())
            for name in (
                *("id", "report_id", "scan_sha256", "volume", "question", "chosen", "rejected"),
                *("checkpoint", "spec_hash", "input_key", "time"),
            )
        ]
    )


class Estimate(BaseModel):
    """A number with its bootstrap 95 % interval and its n."""

    model_config = ConfigDict(frozen=True)
    value: float
    low: float
    high: float
    n: int


class Lineage(BaseModel):
    """Where a checkpoint came from."""

    stage: Literal["contrastive", "sft", "dpo", "converted"]
    data: str | None = Field(None, description="URI of the shards or pairs")
    data_checksum: str | None = None
    spec_hash: str
    prompt: str = Field("", description="hash of a rendered prompt; empty where no reports are written")
    parent: str | None = Field(None, description="URI of the checkpoint it started from")
    judge: str | None = None
    seed: int = 0
    git_commit: str | None = None
    run: str = Field("", description="key of the run that made it, in the tracking store")
    versions: dict[str, str] = {}
    identity: str = Field("", description="digest of `inputs`")
    inputs: dict[str, Any] = Field({}, description="all that decides what the stage would produce, by dotted key")
    weights: str = Field("", description="digest of the checkpoint's own safetensors (`artefacts.Weights`)")
    vision: str = Field("", description="digest of its vision tower: what cached features are known by")
    tower: str = Field("", description="name and licence of an open vision tower that it is built on")


class Training(BaseModel):
    """What a stage did, cumulative over resumes. `history` holds the logged metrics by step, `validation` those of
    the checkpoints that were validated on the way."""

    steps: int = 0
    cases_seen: int = 0
    seconds: float = 0.0
    resumed_from_step: int = 0
    metrics: dict[str, float] = {}
    history: list[dict[str, float]] = []
    validation: list[dict[str, float]] = []


class Checkpoint(BaseModel):
    """A `save_pretrained` folder with `mu2llm.json` beside the weights: configuration, lineage, training.

    `mu2llm.json` is written last, so a folder that has it is whole.
    """

    FILE: ClassVar[str] = "mu2llm.json"
    uri: str = Field(exclude=True)
    experiment: dict[str, Any]
    lineage: Lineage
    training: Training = Training()

    @property
    def spec_title(self) -> str:
        """The hash of the spec that it expects, and how many series that reads where it is not one."""
        spec = self.experiment.get("data", {}).get("spec", {})
        return f"{self.lineage.spec_hash}{_of_series(spec.get('series', 1))}"
