"""Settings of the HTTP service."""

from __future__ import annotations

from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from mu2llm.settings.inference import InferenceConfig, Precision
from mu2llm.settings.section import Section

READER_GIB = 1
"""A reader's own memory, beside that of its decoders."""


class ReplicasConfig(Section):
    """The processes of one deployment of the service: how many, what each gets, how much each takes on."""

    min_replicas: int = Field(1, ge=0, description="0: down to none when nobody asks (the scorer only)")
    max_replicas: int = Field(1, ge=1)
    target_ongoing_requests: float = Field(2, gt=0, description="requests a replica that autoscaling aims at")
    max_ongoing_requests: int = Field(16, ge=1, description="requests that a replica takes at a time")
    upscale_delay_s: float = Field(10, ge=0, description="how long there have to be too many before one is added")
    downscale_delay_s: float = Field(300, ge=0, description="how long one has to be spare before it is ended")
    cpus: float = Field(0.5, ge=0)
    gpus: float = Field(0, ge=0)
    memory_gib: float = Field(0, ge=0, description="that Ray sets aside for each; 0: none")
    labels: dict[str, str] = Field({}, description="of the nodes that they run on; empty: any")


class VllmConfig(Section):
    """Where vLLM serves what `mu2llm export lm` wrote of the checkpoint, with `--enable-prompt-embeds`."""

    url: str = Field("", description="of its API, such as http://vllm:8001/v1")
    model: str | None = Field(
        None, description="by which name it serves it (--served-model-name); None: by the checkpoint's id of /v1/models"
    )
    key_variable: str = Field("", description="of the nodes' environment, that has its API key; empty: it needs none")
    silent_seconds: float = Field(60, gt=0, description="for which it may send nothing while a report is waited for")

    @field_validator("url")
    @classmethod
    def _is_an_address(cls, url: str) -> str:
        parts = urlsplit(url)
        if url and (parts.scheme not in ("http", "https") or not parts.hostname):
            raise ValueError(f"serving.vllm.url={url}: expected http(s)://HOST[:PORT]/v1")
        if parts.username or parts.password:
            raise ValueError("serving.vllm.url has a user or password: name a variable by serving.vllm.key_variable")
        return url


class ServingConfig(Section):
    """The HTTP service. `state` keeps API keys, drafts, jobs, corrections and the audit log; uploads are deleted after
    use, those of /v1/scans after `scan_minutes`."""

    state: str = Field("mu2llm-serve", description="URI of what must survive a restart")
    keep_scans: str | None = Field(None, description="URI under which uploaded scans are kept; None keeps none")
    keep_inputs: bool = Field(
        False,
        description="keep what the model saw of a scan with the corrections of its report, so that they become "
        "preference pairs: by the patients' consent",
    )
    keep_reports_days: float = Field(30, gt=0, description="for how long a report can be corrected by its id")
    authentication: Literal["auto", "on", "off"] = Field(
        "auto", description="API keys; auto: and the token that `mu2llm serve` prints"
    )
    public_origins: tuple[str, ...] = Field(
        (), description="what a browser calls it behind a reverse proxy, such as https://reports.example"
    )
    subject_header: str = Field("", description="in which a proxy says who asks, such as X-Forwarded-User; empty: none")
    trusted_proxies: tuple[str, ...] = Field(
        (), description="ids of the API keys whose subject_header is believed; other keys that send it are refused"
    )
    hosts: tuple[str, ...] = Field((), description="further Host names that are answered on loopback")
    allowed_uris: tuple[str, ...] = Field(
        (), description="what {uri} may lie under, such as s3://bucket/scans or /srv/scans"
    )
    dicomweb: tuple[str, ...] = Field(
        (), description="DICOMweb services whose studies may be named, such as https://pacs.example/dicom-web"
    )
    max_body_mb: int = Field(1024, ge=1)
    upload_seconds: float = Field(1800, gt=0, description="for the whole body of a request to come")
    upload_kb_per_second: float = Field(16, gt=0, description="at least, after ten seconds; slower uploads get a 408")
    max_slices: int = Field(2500, ge=2)
    reading_seconds: float = Field(120, gt=0, description="for decoding and preparing one scan")
    reading_gib: float = Field(8, gt=0, description="memory that decoding one scan may take")
    traces: float = Field(
        0, ge=0, le=1, description="fraction of the requests of which spans go to OTEL_EXPORTER_OTLP_ENDPOINT"
    )
    request_seconds: float = Field(300, gt=0, description="for one whole report; longer ones are jobs")
    max_pairs: int = Field(256, ge=1, description="pairs of one /v1/green request")
    max_batch_size: int = Field(8, ge=1, description="scans and questions that are written at a time")
    max_queued_requests: int = Field(64, ge=1, description="report requests taken on at once; above: 429")
    precision: Precision | Literal["auto"] = Field("auto", description="auto: bf16 on a GPU, fp32 on CPUs")
    cached_scans: int = Field(64, ge=0, description="scans whose encoding a generator remembers")
    scan_minutes: float = Field(60, gt=0, description="for which a scan sent to /v1/scans can be named by its id")
    max_scans: int = Field(64, ge=1, description="of these at a time; above: 429")
    jobs_at_once: int = Field(2, ge=1)
    job_seconds: float = Field(3600, gt=0, description="for one job")
    registry_seconds: float = Field(10, gt=0, description="how often a registry:// model is looked up")
    engine: Literal["own", "vllm"] = Field("own", description="what writes; vllm: the server of serving.vllm")
    vllm: VllmConfig = VllmConfig()
    canary: str | None = Field(
        None,
        description="a second checkpoint, that answers a fraction of the scans: its URI, or registry://mu2llm@ALIAS",
    )
    canary_fraction: float | None = Field(None, ge=0, le=1, description="of the scans; a scan is always on one side")
    shadow: str | None = Field(
        None, description="a checkpoint that reads scans too, shown to nobody: what differs is counted and kept"
    )
    shadow_fraction: float = Field(1, ge=0, le=1, description="of the scans that it reads")
    drain_seconds: float = Field(60, ge=0, description="that a replica gets to finish what it has begun")
    ingress: ReplicasConfig = ReplicasConfig(max_ongoing_requests=512, target_ongoing_requests=128)
    reader: ReplicasConfig = ReplicasConfig(max_replicas=2, max_ongoing_requests=4)
    generator: ReplicasConfig = ReplicasConfig(cpus=1, max_ongoing_requests=64, target_ongoing_requests=16)
    scorer: ReplicasConfig = ReplicasConfig(max_ongoing_requests=32, target_ongoing_requests=8)

    @field_validator("authentication", mode="before")
    @classmethod
    def _as_yaml_reads_it(cls, value: Any) -> Any:
        return {True: "on", False: "off"}.get(value, value) if isinstance(value, bool) else value

    @model_validator(mode="after")
    def _a_trusted_proxy_says_who_asks(self) -> ServingConfig:
        if self.trusted_proxies and not self.subject_header:
            raise ValueError("serving.trusted_proxies needs serving.subject_header: where they say who asks")
        return self

    @model_validator(mode="after")
    def _a_canary_has_its_fraction(self) -> ServingConfig:
        if (self.canary is None) != (self.canary_fraction is None):
            given, lacks = ("canary", "canary_fraction") if self.canary else ("canary_fraction", "canary")
            raise ValueError(f"serving.{given} needs serving.{lacks}: give both, or neither")
        return self

    @model_validator(mode="after")
    def _an_engine_is_somewhere(self) -> ServingConfig:
        if self.engine == "vllm" and not self.vllm.url:
            raise ValueError("serving.engine=vllm needs serving.vllm.url: where it serves the language model")
        if self.engine == "vllm" and self.vllm.model and (self.canary or self.shadow):
            raise ValueError(
                "serving.vllm.model names one language model, and a canary or shadow needs its own: leave it out, "
                "and serve each by its checkpoint's id"
            )
        return self

    @model_validator(mode="after")
    def _readers_hold_what_they_decode(self) -> ServingConfig:
        reader = self.reader
        need = self.reading_gib * reader.max_ongoing_requests + READER_GIB
        if reader.memory_gib and reader.memory_gib < need:
            raise ValueError(
                f"serving.reader.memory_gib={reader.memory_gib:g} is less than {need:g}: serving.reading_gib × "
                f"serving.reader.max_ongoing_requests + {READER_GIB}; ask for as much, or lower one of them"
            )
        return self

    @property
    def inference(self) -> InferenceConfig:
        """What a generator's replica runs by."""
        return InferenceConfig(
            precision=self.precision,
            batch_size=self.max_batch_size,
            cpus_per_actor=self.generator.cpus,
            gpus_per_actor=self.generator.gpus,
        )
