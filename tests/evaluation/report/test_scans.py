"""Planes lie as a radiologist expects them."""

import base64
import io

import numpy as np
from PIL import Image

from mu2llm.evaluation.report.scans import planes


def picture(plane):
    """(rows, tiles · columns, 3)"""
    head, _, data = plane.picture.partition(",")
    assert head == "data:image/jpeg;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))).astype(int)


def scan():
    """A grid of 2 × 8 slices of 16 rows and 24 columns, 3 channels, 2 × 3 × 4 mm."""
    return np.zeros((2, 3, 8, 16, 24), np.uint8), np.diag([4.0, 3.0, 2.0, 1.0])


def tile(plane, number):
    image = picture(plane)
    width = image.shape[1] // plane.tiles
    return image[:, number * width : (number + 1) * width]


def test_right_is_left_front_is_up_and_head_is_up():
    voxels, affine = scan()
    # the patient's right, front and head: highest column, row and slice in RAS+
    voxels[:, 0, :, :, 18:] = 255
    voxels[:, 1, :, 12:, :] = 255
    voxels[1, 2, 4:] = 255
    axial, coronal, sagittal = planes(voxels, affine)
    top = tile(axial, axial.tiles - 1)
    assert top[:, :5, 0].mean() > 200 > 60 > top[:, 8:, 0].mean()  # right at the left
    assert top[:3, :, 1].mean() > 200 > 60 > top[6:, :, 1].mean()  # front up
    assert top[..., 2].mean() > 200 > 60 > tile(axial, 0)[..., 2].mean()  # from feet to head
    middle = tile(coronal, coronal.tiles // 2)
    assert middle[:3, :, 2].mean() > 200 > 60 > middle[6:, :, 2].mean()  # head up
    side = tile(sagittal, 0)
    assert side[:3, :, 2].mean() > 200 and side[:, :3, 1].mean() > 200 > 60 > side[:, 6:, 1].mean()  # front at the left


def test_sizes_are_in_mm():
    voxels, affine = scan()
    axial, coronal, sagittal = planes(voxels, affine)
    assert (axial.width, axial.height) == (96, 48)
    assert (coronal.width, coronal.height) == (96, 32)
    assert (sagittal.width, sagittal.height) == (48, 32)
    assert (axial.tiles, coronal.tiles, sagittal.tiles) == (16, 16, 24)


def test_large_scans_and_one_float_channel():
    voxels = np.full((4, 1, 16, 400, 360), 0.5, np.float32)
    axial, *_ = planes(voxels, np.eye(4))
    assert axial.tiles == 32
    image = tile(axial, 3)
    assert max(image.shape) <= 160
    assert abs(image.mean() - 127) < 3 and np.ptp(image.mean(axis=(0, 1))) < 3  # grey in all three
