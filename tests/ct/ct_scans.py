"""Scans that the tests make: a small chest as NIfTI, DICOM slices and zips, with whatever is wrong with them."""

from __future__ import annotations

import gzip
import io
import zipfile
import zlib
from typing import Any

import nibabel as nib
import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import UID, CTImageStorage, EnhancedCTImageStorage, ExplicitVRLittleEndian

SERIES = "1.2.826.0.1.3680043.8.498.1"
AFFINE = np.array([[2.0, 0, 0, -20], [0, 2.5, 0, -30], [0, 0, 3, -40], [0, 0, 0, 1]])  # RAS+, mm


def chest(shape: tuple[int, int, int] = (24, 20, 16), seed: int = 0) -> np.ndarray:
    """HU (x, y, z): air, a body of soft tissue with fat, the right lung larger than the left, a spine; noise."""
    x, y, z = np.meshgrid(*[np.linspace(-1, 1, size) for size in shape], indexing="ij")
    hu = np.full(shape, -1000.0)
    hu[(x / 0.95) ** 2 + (y / 0.85) ** 2 < 1] = -100
    hu[(x / 0.9) ** 2 + (y / 0.8) ** 2 < 1] = 40
    hu[((x - 0.42) / 0.35) ** 2 + (y / 0.5) ** 2 + (z / 0.9) ** 2 < 1] = -820
    hu[((x + 0.42) / 0.25) ** 2 + (y / 0.4) ** 2 + (z / 0.8) ** 2 < 1] = -820
    hu[(x / 0.15) ** 2 + ((y + 0.5) / 0.15) ** 2 < 1] = 400
    return np.maximum(hu + np.random.default_rng(seed).normal(0, 12, shape), -1024).astype(np.int16)


def nifti(
    stored: np.ndarray,
    affine: np.ndarray | None = AFFINE,
    scaling: tuple[float, float] | None = None,
    kind: type = nib.Nifti1Image,
    big_endian: bool = False,
    compress: bool = True,
    **fields: Any,
) -> bytes:
    """A NIfTI of stored values (x, y, z); `fields` are written into its header as they are."""
    header = kind.header_class(endianness=">" if big_endian else "<")
    header.set_data_dtype(stored.dtype)
    image = kind(stored, affine, header)
    if affine is not None:
        image.set_sform(affine, 1)
        image.set_qform(affine, 1)
    header = image.header
    header.set_slope_inter(*(scaling or (1, 0)))
    header["vox_offset"] = header.single_vox_offset
    for name, value in fields.items():
        header[name] = value
    voxels = stored.astype(stored.dtype.newbyteorder(">" if big_endian else "<")).tobytes(order="F")
    data = header.binaryblock + b"\0" * (int(header.single_vox_offset) - len(header.binaryblock)) + voxels
    return gzip.compress(data, 1) if compress else data


META_TYPES = {"i1": "CHAR", "u1": "UCHAR", "i2": "SHORT", "i4": "INT", "f4": "FLOAT", "f8": "DOUBLE"}
NRRD_TYPES = {"i1": "int8", "u1": "uchar", "i2": "short", "i4": "int", "f4": "float", "f8": "double"}
LPS = np.diag([-1.0, -1, 1, 1])


def numbers(values: Any) -> str:
    return " ".join(f"{value:.10g}" for value in np.ravel(values))


def metaimage(stored: np.ndarray, affine: np.ndarray = AFFINE, compress: bool = False, **fields: str | None) -> bytes:
    """An .mha of stored values (x, y, z); `fields` are written into its header as they are, None leaves one out."""
    axes = (LPS @ affine)[:3, :3]
    spacing = np.linalg.norm(axes, axis=0)
    voxels = stored.tobytes(order="F")
    said: dict[str, str | None] = {
        "ObjectType": "Image",
        "NDims": str(stored.ndim),
        "BinaryData": "True",
        "BinaryDataByteOrderMSB": "False",
        "CompressedData": str(compress),
        "TransformMatrix": numbers((axes / spacing).T),
        "Offset": numbers((LPS @ affine)[:3, 3]),
        "ElementSpacing": numbers(spacing),
        "DimSize": " ".join(map(str, stored.shape)),
        "ElementType": f"MET_{META_TYPES[stored.dtype.str[1:]]}",
        "ElementDataFile": "LOCAL",
    }
    said = {**said, **fields}
    said["ElementDataFile"] = said.pop("ElementDataFile")  # the last one, where it is
    head = "".join(f"{name} = {value}\n" for name, value in said.items() if value is not None)
    return head.encode() + (zlib.compress(voxels) if compress else voxels)


def nrrd(stored: np.ndarray, affine: np.ndarray = AFFINE, compress: bool = False, **fields: str | None) -> bytes:
    """An .nrrd of stored values (x, y, z); `fields` (`_` for a space) as for `metaimage`."""
    turned = LPS @ affine
    vectors = [f"({','.join(f'{value:.10g}' for value in column[:3])})" for column in turned.T]
    voxels = stored.tobytes(order="F")
    said: dict[str, str | None] = {
        "type": NRRD_TYPES[stored.dtype.str[1:]],
        "dimension": str(stored.ndim),
        "space": "left-posterior-superior",
        "sizes": " ".join(map(str, stored.shape)),
        "space directions": " ".join(vectors[:3]),
        "space origin": vectors[3],
        "endian": "little",
        "encoding": "gzip" if compress else "raw",
    }
    said |= {name.replace("_", " "): value for name, value in fields.items()}
    lines = "".join(f"{name}: {value}\n" for name, value in said.items() if value is not None)
    return f"NRRD0004\n# made by a test\n{lines}\n".encode() + (gzip.compress(voxels, 1) if compress else voxels)


def slices(
    hu: np.ndarray,
    affine: np.ndarray = AFFINE,
    scaling: tuple[float, float] = (1, -1024),
    positions: np.ndarray | None = None,
    **tags: Any,
) -> list[Dataset]:
    """DICOM CT slices of HU (x, y, z): columns run to the left, rows to the back, as scanners store them.

    `positions` are mm along the third axis instead of equal steps; `tags` are set on every slice, None deletes.
    """
    flipped = hu[::-1, ::-1]
    axes = affine[:3, :3] * [-1, -1, 1]
    origin = affine @ [hu.shape[0] - 1, hu.shape[1] - 1, 0, 1]
    spacing = np.linalg.norm(axes, axis=0)
    rows, columns = (np.array([-1, -1, 1]) * axes[:, axis] / spacing[axis] for axis in (0, 1))
    along = axes[:, 2] / spacing[2]
    places = np.arange(hu.shape[2]) * spacing[2] if positions is None else positions
    made = []
    for index, place in enumerate(places):
        stored = np.rint((flipped[..., index].T - scaling[1]) / scaling[0]).astype(np.int16)
        dataset = _slice(stored, index, scaling)
        dataset.ImagePositionPatient = [f"{v:.6f}" for v in (origin[:3] + along * place) * [-1, -1, 1]]
        dataset.ImageOrientationPatient = [f"{v:.7f}" for v in (*rows, *columns)]
        dataset.PixelSpacing = [float(spacing[1]), float(spacing[0])]
        for name, value in tags.items():
            delattr(dataset, name) if value is None else setattr(dataset, name, value)
        made.append(dataset)
    return made


def _slice(stored: np.ndarray, index: int, scaling: tuple[float, float]) -> Dataset:
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID = CTImageStorage
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID = UID(f"{SERIES}.{index + 1}")
    dataset.SeriesInstanceUID = SERIES
    dataset.StudyInstanceUID = dataset.FrameOfReferenceUID = "1.2.3"
    dataset.Modality = "CT"
    dataset.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    dataset.InstanceNumber = index + 1
    dataset.SliceThickness = 7.5  # not the spacing, as so often
    dataset.Rows, dataset.Columns = stored.shape
    dataset.SamplesPerPixel = 1
    dataset.PhotometricInterpretation = "MONOCHROME2"
    dataset.BitsAllocated = dataset.BitsStored = 16
    dataset.HighBit = 15
    dataset.PixelRepresentation = 1
    dataset.RescaleSlope, dataset.RescaleIntercept = scaling
    dataset.PixelData = stored.astype("<i2").tobytes()
    return dataset


def moved(hu: np.ndarray, by_mm: float, **tags: Any) -> list[Dataset]:
    """Slices as of `slices`, the whole scan higher by `by_mm`."""
    affine = AFFINE.copy()
    affine[2, 3] += by_mm
    return slices(hu, affine, **tags)


FRAME_TAGS = {  # functional group: what it takes from a classic slice
    "PlanePositionSequence": ["ImagePositionPatient"],
    "PlaneOrientationSequence": ["ImageOrientationPatient"],
    "PixelMeasuresSequence": ["PixelSpacing", "SliceThickness"],
    "PixelValueTransformationSequence": ["RescaleSlope", "RescaleIntercept"],
}


def enhanced(datasets: list[Dataset], content: list[dict[str, Any]] | None = None, **tags: Any) -> Dataset:
    """One enhanced multi-frame object of classic slices, in their order; `content` is each frame's FrameContent,
    `tags` are set at the top level."""
    frames = Dataset()
    for element in datasets[0]:
        if element.keyword not in [name for names in FRAME_TAGS.values() for name in names]:
            frames.add(element)
    frames.file_meta = FileMetaDataset()
    frames.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    frames.file_meta.MediaStorageSOPClassUID = frames.SOPClassUID = EnhancedCTImageStorage
    frames.file_meta.MediaStorageSOPInstanceUID = frames.SOPInstanceUID
    frames.ImageType = [*datasets[0].ImageType[:2], "VOLUME", "NONE"]
    frames.NumberOfFrames = len(datasets)
    frames.PixelData = b"".join(each.PixelData for each in datasets)
    shared, groups = Dataset(), []
    for index, each in enumerate(datasets):
        groups.append(Dataset())
        for sequence, names in FRAME_TAGS.items():
            item = Dataset()
            for name in names:
                if name in each:
                    setattr(item, name, each[name].value)
            setattr(groups[-1] if sequence == "PlanePositionSequence" else shared, sequence, [item])
        item = Dataset()
        for name, value in (content[index] if content else {"InStackPositionNumber": index + 1}).items():
            setattr(item, name, value)
        groups[-1].FrameContentSequence = [item]
    frames.SharedFunctionalGroupsSequence, frames.PerFrameFunctionalGroupsSequence = [shared], groups
    for name, value in tags.items():
        setattr(frames, name, value)
    return frames


def to_bytes(dataset: Dataset) -> bytes:
    stream = io.BytesIO()
    dataset.save_as(stream, enforce_file_format=True)
    return stream.getvalue()


def zipped(files: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return stream.getvalue()
