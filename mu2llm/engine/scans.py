"""Any scans → reports: what `mu2llm generate` and the demo's `--scan` do, without shards."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, NamedTuple, Self

from mu2llm import ct
from mu2llm.cases import examination
from mu2llm.engine.decoder import ContinuousDecoder, Prompt, write
from mu2llm.engine.features import scan_features
from mu2llm.engine.loading import load, numerics
from mu2llm.engine.sampling import Decoding
from mu2llm.errors import Rejection
from mu2llm.model.familiarity import Familiarity, pooled, unlike
from mu2llm.progress import Counted
from mu2llm.records import Case, Series
from mu2llm.settings.evaluation import EvaluationConfig


class ScanPlace(NamedTuple):
    """Where a scan is: path or URI, and what `ct.read` needs besides to find it there and to put it in HU; `further`
    are the other series of an examination, for one report of them all. With `together` those that lie in one place and
    are not named are found, and of others what cannot be used is passed over."""

    path: str
    series: str | None = None
    rescale: tuple[float, float] | None = None
    further: tuple[Series, ...] = ()
    together: bool = False

    @classmethod
    def given(cls, path: str, series: Sequence[str] = ()) -> Self:
        """A path as it was given, and the series to read there in this order; of none those that are found."""
        further = tuple(Series(volume=path, series=name) for name in series[1:])
        return cls(path, series[0], further=further) if series else cls(path, together=True)

    @classmethod
    def of(cls, case: Case, together: bool) -> Self:
        """A case's."""
        first, *further = case.every_series
        return cls(first.volume, first.series, first.rescale, tuple(further), together)

    def volumes(self, accept: tuple[str, ...], most: int) -> list[ct.CTVolume]:
        """The scan in HU, and those behind it, at most so many of one place; Rejection where one cannot be used."""
        series = [Series(volume=self.path, series=self.series, rescale=self.rescale), *self.further]
        sources = [each.volume for each in series]
        return examination.volumes(series, sources, accept, most if self.together else None)


def report_scans(
    checkpoint: str,
    scans: Sequence[ScanPlace],
    settings: EvaluationConfig,
    accept: tuple[str, ...] = (),
    progress: Counted | None = None,
) -> list[dict[str, Any]]:
    """One entry a scan, in order: `{path, report, seconds, spec, warnings, series, familiarity, finding_probabilities}`
    or `{path, rejected, message, spec}`. `series` are the UIDs of those that were read, in order ("" of what is not
    DICOM). `familiarity` is `{percentile, unlike}` among the training scans' distances
    (`Familiarity`), None where the checkpoint keeps none; `finding_probabilities` None without a diagnostic prior.

    Scans are prepared by the checkpoint's own spec. One that is no CT by its values (`not_hu`) is rejected
    unless `accept` lists that code. `progress` is told (scans done, scans in all).
    """
    model, processor = load(checkpoint, settings.used_precision, settings.used_device)
    known = Familiarity.read(checkpoint)
    decoder = ContinuousDecoder(model, processor, settings.used_precision)
    decoding = Decoding(settings.max_new_tokens)
    entries = []
    for number, place in enumerate(scans):
        started = time.monotonic()
        entry: dict[str, Any] = {"path": place.path, "spec": {"name": processor.spec.name, "hash": processor.spec.hash}}
        try:
            volumes = place.volumes(accept, processor.spec.series)
            prepared = ct.prepare(volumes, processor.spec)
        except Rejection as rejection:
            entry |= {"rejected": rejection.reason, "message": rejection.message}
        else:
            scan = {"voxels": prepared.voxels[None], "chunk_mask": prepared.chunk_mask[None]}
            features, mask = scan_features(model, scan, settings.used_precision)
            ((text,),) = write(decoder, features, mask, [Prompt(settings.question, place.path, decoding)])
            entry |= {
                "report": text.text,
                "finished": text.finished,
                "warnings": list(ct.warnings(volumes, processor.spec)),
                "series": [volume.series for volume in volumes],
            }
            with numerics(model.device, settings.used_precision):
                likely = model.finding_probabilities(features, mask)
            entry["finding_probabilities"] = likely[0] if likely else None
            percentile = known.percentiles(pooled(features, mask))[0] if known else None
            entry["familiarity"] = {"percentile": percentile, "unlike": unlike(percentile)} if known else None
        entries.append({**entry, "seconds": round(time.monotonic() - started, 3)})
        if progress:
            progress(number + 1, len(scans))
    return entries
