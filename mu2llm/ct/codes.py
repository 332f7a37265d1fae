"""Every code that reading a scan can end with: why it is rejected, what was set right, and the limits.

`mu2llm inspect`, the `rejected` table of `ingest` and the service all speak these codes and no others.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, get_args

from mu2llm.errors import UserError

REASONS: dict[str, str] = {
    "not_found": "there is nothing under this path or URI",
    "empty": "the file, folder or archive holds nothing, or the scan has no voxels",
    "unsupported_format": "neither NIfTI, MetaImage, NRRD nor DICOM nor a zip of DICOM files",
    "wrong_suffix": "the name's suffix says another format than the content is",
    "truncated": "the file ends before its voxels do",
    "corrupt": "the file or archive is damaged: checksum, header or structure is wrong",
    "too_large": "more voxels, bytes or files than a scan can have: refused before decompression is finished",
    "unsafe_archive": "absolute or climbing paths, in an archive or of a header's data file; links, encrypted members",
    "rgb": "colour voxels: a screen save or rendered map, not HU",
    "complex": "complex voxels",
    "not_3d": "not one three-dimensional volume (4-D series, vectors, 2-D)",
    "single_slice": "one slice alone is no volume",
    "other_modality": "the file calls itself another modality than CT",
    "no_images": "no DICOM file with pixels (structured reports, plans, presentation states)",
    "no_series": "the series that was asked for is not there",
    "undecodable": "no decoder for the transfer syntax or encoding, or the decoder failed",
    "enhanced_unreadable": "an enhanced multi-frame object whose frames do not make one regular volume",
    "unknown_orientation": "nothing says how the voxels lie in the body; accepted on request",
    "bad_geometry": "the affine is singular, not finite, of impossible spacing or sheared beyond a gantry's tilt",
    "no_positions": "DICOM slices without ImagePositionPatient or PixelSpacing",
    "irregular_positions": "slices that lie on no one line, or at steps so unequal that most would be interpolated",
    "duplicate_positions": "different slices at one position: several phases or reconstructions mixed",
    "mixed_grids": "slices of one series that follow one another differ in matrix, pixel spacing or orientation",
    "series_per_slice": "every slice has a SeriesInstanceUID of its own; joined on request",
    "slice_gap": "neighbouring slices too far apart to interpolate between: slices are missing",
    "not_hu": "the distribution of values cannot be CT in HU; accepted on request",
}

WARNINGS: dict[str, str] = {
    "tilt_resampled": "gantry tilt or a sheared affine: resampled onto a straight grid",
    "gap_resampled": "unequal gaps or missing slices: interpolated onto equal steps",
    "partial": "part of a series: other phases, acquisitions or reconstructions were left out, or objects are missing",
    "stations_joined": "acquisitions that share slices at their border: joined, one slice kept at each place",
    "series_joined": "slices with a SeriesInstanceUID of their own each: joined on request",
    "padding_clipped": "padding and values below −1024 HU were set to −1024",
    "nonfinite_filled": "NaN or infinite values were set to −1024",
    "no_modality": "DICOM without Modality, taken for CT",
    "no_rescale": "DICOM without RescaleSlope or RescaleIntercept: 1 and 0 were taken for what is missing",
    "rescaled_by_table": "slope and intercept of the metadata table were applied",
    "already_rescaled": "slope and intercept of the metadata table were not applied: the values are in HU already",
    "duplicates_dropped": "identical slices at one position: one of them kept",
    "files_set_aside": "localisers, screen saves, projections, other series or files in the same place were left out",
    "unreadable_files": "files in the same place that should be DICOM but cannot be parsed were left out",
    "orientation_assumed": "orientation unknown and accepted on request: the axes are a guess",
    "forms_differ": "sform and qform disagree: the sform was taken",
    "spacing_differs": "the voxel sizes of the sform are not those of pixdim: the sform's were taken",
    "spacing_repaired": "negative voxel sizes were made positive",
    "units_converted": "the header's unit of length is not mm: converted",
    "oblique": "the axes are turned against the body's: kept as scanned, named by the closest ones",
    "not_hu": "the distribution of values cannot be CT in HU (MR, label map, 8-bit export, scaled twice)",
    "series_unusable": "series of an examination that could not be used were passed over, and the next ones taken",
    "series_missing": "fewer series of the examination than the spec reads (its `series`): the others are empty",
}

Acceptable = Literal["unknown_orientation", "series_per_slice", "not_hu"]
ACCEPTABLE: tuple[Acceptable, ...] = get_args(Acceptable)  # reasons; warnings but not_hu are let in anyway

MAX_VOXELS = 2**30  # of one scan: 512×512×4096
MAX_BYTES = 2 * MAX_VOXELS  # of the DICOM files of one scan, decompressed
MAX_FILES = 20_000
AIR_HU = -1024


def check_accept(accept: Iterable[str]) -> frozenset[str]:
    """The codes to let in; a UserError names one that cannot be."""
    codes = frozenset(accept)
    for code in sorted(codes):
        if code not in ACCEPTABLE and code not in WARNINGS:
            raise UserError(f"accept: {code!r} cannot be accepted; {', '.join(ACCEPTABLE)} can")
    return codes


def in_order(codes: Iterable[str]) -> tuple[str, ...]:
    """Warning codes, each once, in the order of the documented list."""
    given = set(codes)
    return tuple(code for code in WARNINGS if code in given)
