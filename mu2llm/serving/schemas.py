"""What goes over the wire, version 1: the models behind OpenAPI."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from mu2llm.ct import Acceptable
from mu2llm.records import ERROR_CATEGORIES, Judgement

Text = Annotated[str, Field(max_length=100_000)]
StopSequence = Annotated[str, Field(min_length=1, max_length=200)]
StopSequences = Annotated[tuple[StopSequence, ...], Field(max_length=4)]
Uri = Annotated[str, Field(min_length=1, max_length=2_000)]
Question = Annotated[str, Field(max_length=4_000)]


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


# ---- reports


class ReportOptions(Body):
    """What is asked about a scan and how the answer is drawn. Greedy at temperature 0."""

    question: Question | None = Field(None, description="instead of the model's own question for a whole report")
    region: Annotated[str, Field(max_length=100)] | None = Field(
        None, description="a part of the body, such as chest: asks for its findings only"
    )
    stream: bool = Field(False, description="server-sent events: scan, token…, report (or error)")
    max_new_tokens: int | None = Field(None, ge=1, le=4096)
    temperature: float = Field(0, ge=0, le=5)
    top_p: float = Field(1, gt=0, le=1)
    seed: int = Field(0, ge=0, lt=2**63)
    stop: StopSequences = Field((), description="the report ends before the first of these")
    accept: tuple[Acceptable, ...] = Field((), description="reason codes that are let in all the same")


class NamedScan(Body):
    """A scan by its URI in an allowed place, by its study in an archive, or by its id."""

    uri: Uri | None = None
    study: Uri | None = Field(
        None, description="DICOMweb URI of a study, whose largest CT series are read, or of one series of it"
    )
    scan: Annotated[str, Field(max_length=64)] | None = Field(None, description="id of a scan sent to /v1/scans")

    @model_validator(mode="after")
    def _one_of_them(self) -> Self:
        if sum(each is not None for each in (self.uri, self.study, self.scan)) != 1:
            raise PydanticCustomError("one_scan", "give uri, study or scan, one of the three")
        return self


class ReportRequest(NamedScan, ReportOptions):
    """The JSON form of what is asked about a scan."""


class SentScan(BaseModel):
    """A scan that is kept for a while: `scan` of a report or job names its `id`, chat names it as `scan:ID`."""

    id: str
    size: int = Field(description="bytes")
    expires: str = Field(description="ISO 8601, UTC")


class ScanFacts(BaseModel):
    """A scan as it was read. `shape` and `spacing` (mm) are along x, y, z in RAS+ axes; `orientation` is the file's; of
    several series they are the first one's."""

    sha256: str
    shape: tuple[int, int, int]
    spacing: tuple[float, float, float]
    orientation: str
    warnings: tuple[str, ...]
    format: str
    series: int = Field(1, description="how many series of the examination the report is about")
    series_uid_sha256: str | None = Field(
        None, description="SHA-256 of the SeriesInstanceUID that was read; null where it is no DICOM"
    )


class FindingOut(BaseModel):
    """A finding that the rules read in the report."""

    name: str
    side: str | None = None
    place: str | None = None
    size_mm: float | None = None


class ModelFacts(BaseModel):
    """The checkpoint that wrote."""

    id: str
    stage: str
    checkpoint: str = Field(description="its name; the last part of its URI")


class SpecFacts(BaseModel):
    """The PreprocessSpec that the scan was prepared by."""

    name: str
    hash: str


class FamiliarityOut(BaseModel):
    """How unlike the training scans the scan is: the share of them that are nearer to their mean, in percent."""

    percentile: float
    unlike: bool = Field(description="beyond the 99.5th percentile: do not rely on the report")


class Report(BaseModel):
    """A draft for a radiologist's eye. `finished` is False where the length limit cut it off."""

    id: str
    report: str
    findings: list[FindingOut]
    model: ModelFacts
    spec: SpecFacts
    scan: ScanFacts
    question: str
    finished: bool
    tokens: int
    prompt_tokens: int = Field(0, description="of the prompt, visual tokens among them; 0 of older jobs")
    seconds: dict[str, float] = Field(description="read, queue, encode, write, total")
    familiarity: FamiliarityOut | None = Field(
        None, description="null where the checkpoint keeps no statistics of its training scans"
    )
    finding_probabilities: dict[str, float] | None = Field(
        None, description="how likely each finding is by the model's diagnostic prior; null where it has none"
    )
    disclaimer: str = "Research use only; not a medical device."


# ---- jobs


class Job(BaseModel):
    """A report that is made in the background; kept in storage, so that it survives a restart."""

    id: str
    status: Literal["queued", "running", "done", "failed"]
    created: str
    updated: str
    attempts: int = 0
    report: Report | None = None
    problem: dict[str, Any] | None = Field(None, description="problem details where it failed")


# ---- GREEN


class PairIn(Body):
    reference: Text
    candidate: Text


class GreenRequest(Body):
    pairs: Annotated[list[PairIn], Field(min_length=1)]


class JudgedSentences(BaseModel):
    """The sentences that the judge named, by error category."""

    significant: dict[str, list[str]]
    insignificant: dict[str, list[str]]
    matched: list[str]


class GreenResult(BaseModel):
    """One judgement; `score` is null where it is invalid, and `why` says why."""

    score: float | None
    significant: tuple[int, int, int, int, int, int]
    insignificant: tuple[int, int, int, int, int, int]
    matched: int
    valid: bool
    why: str
    judge: str
    sentences: JudgedSentences

    @classmethod
    def of(cls, judgement: Judgement) -> GreenResult:
        def by_category(said: tuple[tuple[str, ...], ...]) -> dict[str, list[str]]:
            return {c: list(said[i]) if i < len(said) else [] for i, c in enumerate(ERROR_CATEGORIES)}

        return cls(
            **judgement.model_dump(include=set(cls.model_fields) - {"sentences"}),
            sentences=JudgedSentences(
                significant=by_category(judgement.significant_sentences),
                insignificant=by_category(judgement.insignificant_sentences),
                matched=list(judgement.matched_sentences),
            ),
        )


class GreenAnswer(BaseModel):
    results: list[GreenResult]
    mean: float | None = Field(description="over the valid ones")
    n_valid: int
    n_invalid: int = Field(description="pairs that the judge failed on; not in the mean")
    n_failed: int = Field(description="candidates that are empty or cannot be read; 0 in the mean")
    categories: dict[str, str] = ERROR_CATEGORIES


# ---- corrections


class CorrectionIn(Body):
    """An edited report: of one that the service wrote, by its `id`, or with `generated` and the scan's sha256."""

    edited: Text
    id: Annotated[str, Field(max_length=64)] | None = None
    generated: Annotated[str, Field(min_length=1, max_length=100_000)] | None = None
    scan_sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None = None
    question: Question | None = None

    @field_validator("edited")
    @classmethod
    def _says_something(cls, edited: str) -> str:
        if not any(letter.isalnum() for letter in edited):
            raise PydanticCustomError("blank", "the text is blank, which teaches nothing")
        return edited


class CorrectionOut(BaseModel):
    """`mu2llm prefer --corrections` reads what is stored."""

    id: str
    pair: bool = Field(description="False where nothing was changed: /v1/decisions accepts a report as it is")


# ---- drafts

DraftState = Literal["generated", "edited", "accepted", "rejected"]


class DecisionIn(Body):
    """What a draft is worth, said once: as it was last edited, or as it was generated."""

    id: Annotated[str, Field(max_length=64)]
    decision: Literal["accepted", "rejected"]


class Draft(BaseModel):
    """A report and what became of it. `made_by` and `changed_by` are principals: a key's id, `token`, `KEY/SUBJECT`
    behind a trusted proxy, empty where no key is needed."""

    id: str
    state: DraftState
    report: str = Field(description="as it was generated")
    edited: str | None = Field(description="as it was last corrected")
    question: str
    scan_sha256: str
    made: str
    made_by: str
    changed: str | None
    changed_by: str
    findings: list[FindingOut] = Field(description="that the rules read in the report as it was generated")
    model: ModelFacts | None = Field(description="null of drafts of before this was kept, as is `scan`")
    scan: ScanFacts | None


# ---- influence


class InfluenceIn(NamedScan):
    """The scan that the draft is of."""

    accept: tuple[Acceptable, ...] = Field((), description="reason codes that were let in for the draft")


class SentenceInfluence(BaseModel):
    """The region of the patient's body that a sentence hangs on most, and whether it does so more than on others."""

    text: str
    start: int = Field(description="first character in the report as it was generated")
    end: int = Field(description="behind the last")
    drop: float = Field(description="by how much its log-probability (nats) falls where the region is taken away")
    random: float = Field(description="the same where random regions of the body of its size are, on the mean")
    nifti: str | None = Field(
        description="NIfTI-1 in base64, uint8 0…255, its affine in mm in the scan's own RAS+ world; null where one of "
        "the random regions costs as much, or none costs anything: the sentence hangs on no place in particular"
    )


class InfluenceAnswer(BaseModel):
    """Of each sentence of a draft, in their order."""

    sentences: list[SentenceInfluence]
    seconds: float


# ---- the rest


class ModelsAnswer(BaseModel):
    """OpenAI's list of models, with what we know besides."""

    object: Literal["list"] = "list"
    data: list[dict[str, Any]]


class Sample(BaseModel):
    """A procedural phantom; `reference` is its true report."""

    id: str
    name: str
    description: str
    reference: str


class Health(BaseModel):
    status: Literal["ok"] = "ok"


class Readiness(BaseModel):
    """200 when reports can be written; 503 before, with `why`."""

    ready: bool
    why: str = ""
    model: ModelFacts | None = None
    warm_up_seconds: float | None = None
