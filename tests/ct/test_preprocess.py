"""CTVolume → model input: the published way number for number, and the ways of our own."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
import torch
from ct_scans import AFFINE, chest, nifti
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.transforms import Compose, CropForeground, Resize, ScaleIntensityRangePercentiles

from mu2llm import config
from mu2llm.ct import SPECS, CTVolume, PreprocessSpec, prepare, read, tiled, whole


def published(data: bytes, depth: int, size: int, chunks: int) -> np.ndarray:
    """METHOD.md §2.1 in plain nibabel and MONAI: (chunks, slices, size, size)."""
    image = nib.Nifti1Image.from_bytes(data)
    scan = torch.from_numpy(image.get_fdata().transpose(2, 0, 1)[None].copy())
    scaled = Compose([ScaleIntensityRangePercentiles(0.5, 99.5, 0.0, 1.0, clip=True), CropForeground()])(scan)
    height, width = scaled.shape[2:]
    ratio = min(size / height, size / width)
    shape = [min(scaled.shape[1], depth), int(height * ratio), int(width * ratio)]
    resized = Resize(shape, mode="trilinear", align_corners=True, anti_aliasing=True)(scaled)
    grid = np.zeros((depth, size, size), np.float32)
    grid[: shape[0], : shape[1], : shape[2]] = np.asarray(resized)[0]
    return grid.reshape(chunks, depth // chunks, size, size)


@pytest.mark.parametrize(
    ("shape", "grid", "chunks"),
    [
        ((40, 34, 20), (32, 16, 16), 4),  # in the plane smaller, slices kept, padding behind
        ((40, 34, 50), (32, 16, 16), 4),  # everything smaller
        ((13, 17, 9), (16, 32, 32), 8),  # in the plane larger
        ((30, 30, 16), (16, 30, 30), 2),  # as it is
    ],
)
@pytest.mark.parametrize("axes", ["RAS", "LPS", "PIR"])
def test_reference_is_the_published_preprocessing(shape, grid, chunks, axes):
    ornt = nib.orientations.ornt_transform(
        nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt(tuple(axes))
    )
    affine = AFFINE @ nib.orientations.inv_ornt_aff(ornt, shape)
    hu = chest(shape)
    hu[:4] = hu[:, -3:] = hu[..., :2] = -1024  # something for the crop to crop
    stored = nib.orientations.apply_orientation(hu, ornt)
    data = nifti(stored, affine, compress=False)
    spec = SPECS["reference"].model_copy(update={"grid": grid, "chunks": chunks})
    made = prepare(read(data), spec)
    assert made.voxels.shape == spec.shape
    assert made.voxels.dtype == np.float32
    np.testing.assert_allclose(made.voxels[:, 0], published(data, grid[0], grid[1], chunks), atol=2e-5)


def test_the_specs_are_what_the_presets_say():
    assert SPECS["reference"].shape == (8, 1, 32, 256, 256)
    assert SPECS["corrected"].shape == (8, 3, 32, 256, 256)
    checked = set()
    for name in config.presets():
        spec = config.load(name).data.spec
        if spec.name in SPECS:
            assert spec.hash == SPECS[spec.name].hash, name
            checked.add(spec.name)
    assert "demo" in checked


def spec(**fields: object) -> PreprocessSpec:
    return PreprocessSpec(**{"name": "test", "windows": [[-1000, 1000]], "grid": (16, 24, 24), "chunks": 4, **fields})


def ball(shape=(60, 48, 30), spacing=(1.0, 1.0, 2.0), at=(40, 20, 24), radius=5.0) -> CTVolume:
    """A ball of 900 HU at `at` (mm) in a box of water."""
    affine = np.diag([*spacing, 1.0])
    places = np.stack(np.meshgrid(*[np.arange(n) * s for n, s in zip(shape, spacing, strict=True)], indexing="ij"))
    hu = np.where(np.linalg.norm(places - np.reshape(at, (3, 1, 1, 1)), axis=0) < radius, 900, 0).astype(np.int16)
    return CTVolume(hu, affine)


@pytest.mark.parametrize("fit", ["stretch", "isotropic", "reference"])
@pytest.mark.parametrize("orientation", ["RAS", "as_stored"])
def test_the_affine_leads_back_to_the_place(fit, orientation):
    made = prepare(ball(), spec(fit=fit, orientation=orientation))
    grid = made.voxels[:, 0].reshape(16, 24, 24).astype(float)
    weight = np.clip(grid - 128, 0, None)  # 0 HU is 127.5
    centre = [(weight.sum(axis=other) * np.arange(size)).sum() / weight.sum() for other, size in
              (((0, 1), 24), ((0, 2), 24), ((1, 2), 16))]  # fmt: skip
    np.testing.assert_allclose((made.affine @ [*centre, 1])[:3], (40, 20, 24), atol=0.8)


def middle(values: np.ndarray) -> list[float]:
    """Centre of mass of (z, y, x)."""
    others = ((1, 2), (0, 2), (0, 1))
    return [
        float((values.sum(axis=rest) * np.arange(n)).sum() / values.sum())
        for n, rest in zip(values.shape, others, strict=True)
    ]


@pytest.mark.parametrize("fit", ["torchio", "monai", "tiles"])
@pytest.mark.parametrize(("axes", "spacing"), [("RAS", (2.5, 2.5, 5.0)), ("SPL", None), ("IRP", (5.0, 2.0, 3.0))])
def test_the_affine_leads_back_to_the_place_in_any_axes_and_tiles(fit, axes, spacing):
    made_by = spec(
        fit=fit, axes=axes, spacing_mm=spacing, grid=(48, 48, 48), tiles=(2, 3, 2), chunks=12, dtype="float32"
    )
    made = prepare(ball(), made_by)
    assert made.voxels.shape == (12, 1, 24, 16, 24)
    grid = whole(made.voxels, made_by)[0]
    k, h, w = middle(np.clip(grid - 0.5 - 1e-6, 0, None) * (grid > 0.6))
    np.testing.assert_allclose((made.affine @ [w, h, k, 1])[:3], (40, 20, 24), atol=0.8)
    held = whole(np.broadcast_to(made.chunk_mask[:, None, None, None, None], (12, 1, 24, 16, 24)), made_by)[0]
    assert not grid[~held].any()
    np.testing.assert_array_equal(tiled(whole(made.voxels, made_by)[None], made_by)[0], made.voxels)


def test_tiles_are_whole_and_the_first_of_the_grid():
    hu = np.arange(20 * 20 * 20, dtype=np.int16).reshape(20, 20, 20) // 8
    by_tiles = spec(fit="tiles", axes="RAS", grid=(24, 24, 24), tiles=(3, 3, 3), chunks=27, crop_foreground=False)
    made = prepare(CTVolume(hu, np.eye(4)), by_tiles)  # 20 voxels hold two tiles of 8, the middle 16
    mask = made.chunk_mask.reshape(3, 3, 3)
    assert mask[:2, :2, :2].all() and mask.sum() == 8
    low, high = by_tiles.windows[0]
    expected = np.rint(np.clip((hu[2:18, 2:18, 2:18] - low) / (high - low), 0, 1) * 255)
    np.testing.assert_array_equal(whole(made.voxels, by_tiles)[0, :16, :16, :16], expected)
    small = prepare(CTVolume(hu[:5], np.eye(4)), by_tiles)
    assert small.chunk_mask.reshape(3, 3, 3).any(axis=(1, 2)).tolist() == [True, False, False]


def test_torchio_pads_with_the_least_value_and_monai_with_black():
    hu = np.full((4, 4, 4), 200, np.int16)
    plain = {"axes": "RAS", "grid": (8, 8, 8), "chunks": 1, "crop_foreground": False, "dtype": "float32"}
    made = {fit: prepare(CTVolume(hu, np.eye(4)), spec(fit=fit, **plain)).voxels for fit in ("torchio", "monai")}
    assert len(np.unique(made["torchio"])) == 1 and made["monai"].min() == 0 < made["monai"].max()


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"axes": "RAP"}, "axes RAP do not name each axis of the body once"),
        ({"tiles": (2, 2, 2)}, "are not 4 chunks"),
        ({"fit": "monai", "orientation": "as_stored"}, "fit monai needs windows, and orientation RAS"),
    ],
)
def test_a_spec_that_contradicts_itself_is_refused(wrong, says):
    with pytest.raises(ValueError, match=says):
        spec(**wrong)


def test_isotropic_keeps_shape_in_mm_and_pads_evenly():
    made = prepare(ball(spacing=(1, 1, 4)), spec(fit="isotropic", grid=(32, 32, 32), crop_foreground=False))
    np.testing.assert_allclose(np.abs(np.diag(made.affine)[:3]), 120 / 32)  # 30 slices of 4 mm are the longest side
    filled = made.voxels[:, 0].reshape(32, 32, 32) > 0
    assert filled.any(axis=(1, 2)).sum() == 32
    rows, columns = (np.flatnonzero(filled.any(axis=axes)) for axes in ((0, 2), (0, 1)))
    assert (len(rows), len(columns)) == (13, 16)
    assert rows[0] == 32 - 1 - rows[-1] or rows[0] == 32 - 2 - rows[-1]


def test_a_spacing_is_kept_where_the_body_fits_and_scaled_where_not():
    fits = prepare(ball(), spec(fit="isotropic", grid=(32, 32, 32), spacing_mm=(4, 3, 3), crop_foreground=False))
    np.testing.assert_allclose(np.diag(fits.affine)[:3], (3, 3, 4))
    scaled = prepare(ball(), spec(fit="isotropic", grid=(32, 32, 32), spacing_mm=(1, 1, 1), crop_foreground=False))
    np.testing.assert_allclose(np.diag(scaled.affine)[:3], 60 / 32)


def test_windows_are_channels():
    windows = ((-1000, 200), (-120, 220), (100, 1100))
    volume = CTVolume(np.full((20, 20, 20), 50, np.int16), np.eye(4))
    made = prepare(volume, spec(windows=windows, fit="stretch"))
    assert made.voxels.shape == (4, 3, 4, 24, 24)
    expected = [np.clip((50 - low) / (high - low), 0, 1) * 255 for low, high in windows]
    np.testing.assert_allclose(made.voxels.mean(axis=(0, 2, 3, 4)), np.rint(expected))
    floats = prepare(volume, spec(windows=windows, fit="stretch", dtype="float16")).voxels
    np.testing.assert_allclose(floats.mean(axis=(0, 2, 3, 4), dtype=float) * 255, expected, atol=0.1)


def test_the_body_is_cropped_and_stray_voxels_are_not_body():
    hu = np.full((80, 64, 40), -1000, np.int16)
    hu[20:60, 16:48, 8:32] = 40
    hu[2, 3, 4] = hu[76, 60, 38] = 3000
    made = prepare(CTVolume(hu, np.eye(4)), spec(fit="stretch"))
    low, high = made.affine @ [-0.5, -0.5, -0.5, 1], made.affine @ [23.5, 23.5, 15.5, 1]
    np.testing.assert_allclose(low[:3], (20, 16, 8), atol=4)
    np.testing.assert_allclose(high[:3], (60, 48, 32), atol=4)


def test_chunks_of_padding_are_masked():
    made = prepare(ball((40, 40, 4)), spec(fit="isotropic", grid=(32, 32, 32), chunks=8, crop_foreground=False))
    np.testing.assert_array_equal(made.chunk_mask, [False, False, False, True, True, False, False, False])
    np.testing.assert_array_equal(made.voxels.any(axis=(1, 2, 3, 4)), made.chunk_mask)


def test_shrinking_averages_and_does_not_alias():
    stripes = np.zeros((64, 64, 8), np.int16)
    stripes[::2] = 800
    made = prepare(CTVolume(stripes, np.eye(4)), spec(fit="stretch", grid=(8, 16, 16), chunks=1, windows=[[0, 800]]))
    assert abs(made.voxels[..., 1:-1].astype(int) - 128).max() <= 2


def test_air_alone_is_not_cropped_to_nothing():
    made = prepare(CTVolume(np.full((9, 9, 9), -1024, np.int16), np.eye(4)), spec())
    assert made.voxels.max() == 0


def test_float_and_integer_volumes_and_all_orientations_give_the_same_input():
    hu = chest((30, 28, 20))
    first = prepare(read(nifti(hu)), SPECS["demo"])
    turned = prepare(read(nifti(hu[::-1].transpose(2, 0, 1), flipped(hu.shape))), SPECS["demo"])
    np.testing.assert_array_equal(first.voxels, turned.voxels)
    assert first.voxels.shape == (4, 3, 8, 64, 64)
    floats = prepare(CTVolume(hu.astype(np.float32), AFFINE), SPECS["demo"])
    np.testing.assert_array_equal(first.voxels, floats.voxels)


def flipped(shape: tuple[int, ...]) -> np.ndarray:
    affine = AFFINE @ nib.orientations.inv_ornt_aff([[0, -1], [1, 1], [2, 1]], shape)
    return affine[:, [2, 0, 1, 3]]


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    shape=st.tuples(*[st.integers(2, 40)] * 3),
    spacing=st.tuples(*[st.floats(0.3, 9)] * 3),
    grid=st.tuples(st.sampled_from([4, 8, 16]), st.integers(1, 24), st.integers(1, 24)),
    fit=st.sampled_from(["isotropic", "stretch", "reference"]),
    orientation=st.sampled_from(["RAS", "as_stored"]),
    spacing_mm=st.sampled_from([None, (1.5, 1.5, 1.5), (5, 1, 1)]),
    scaled=st.sampled_from([{"percentiles": (0.5, 99.5), "windows": None}, {}]),
    seed=st.integers(0, 9),
)
def test_any_scan_fills_any_grid(shape, spacing, grid, fit, orientation, spacing_mm, scaled, seed):
    hu = np.random.default_rng(seed).integers(-1024, 2000, shape).astype(np.int16)
    volume = CTVolume(hu, np.diag([*spacing, 1.0]), stored_axes="PIR")
    fields = {"fit": fit, "grid": grid, "orientation": orientation, "spacing_mm": spacing_mm, **scaled}
    for dtype in ("uint8", "float32"):
        made = prepare(volume, spec(dtype=dtype, **fields))
        assert made.voxels.shape == (4, 1, grid[0] // 4, *grid[1:])
        assert made.voxels.dtype == dtype
        assert np.isfinite(made.affine).all() and np.linalg.det(made.affine[:3, :3]) != 0
        assert made.voxels.min() >= 0 and made.voxels.max() <= (255 if dtype == "uint8" else 1)
        assert made.chunk_mask.any()
        assert not made.voxels[~made.chunk_mask].any()


def test_nothing_of_the_volume_is_changed():
    volume = ball()
    before = volume.hu.copy()
    for each in SPECS.values():
        prepare(volume, each.model_copy(update={"grid": (16, 16, 16), "chunks": 2}))
    np.testing.assert_array_equal(volume.hu, before)
