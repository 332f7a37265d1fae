"""Weights over the patches come back to the place in the body that they were taken from."""

import nibabel as nib
import numpy as np
import pytest
import torch
from small_writer import FIRST, QUESTION, experiment

from mu2llm.ct import SPECS, CTVolume, prepare
from mu2llm.engine.loading import numerics, place
from mu2llm.model import build
from mu2llm.serving.saliency import overlay, sentence_maps, spans

AFFINE = np.array([[2.0, 0, 0, -71], [0, 2.5, 0, 33], [0, 0, 5, -412], [0, 0, 0, 1]])
TURNED = np.array([[0, -2.5, 0, 90], [2.0, 0, 0, -20], [0, 0, 5, 7], [0, 0, 0, 1.0]])
PATCH = (4, 8, 8)


def body(place):
    """A block of soft tissue in air, off the centre, with one bright voxel's neighbourhood."""
    hu = np.full((60, 50, 40), -1000, np.int16)
    hu[8:55, 5:40, 3:38] = 40
    x, y, z = place
    hu[x - 2 : x + 3, y - 2 : y + 3, z - 1 : z + 2] = 1100
    return hu


@pytest.mark.parametrize("affine", [AFFINE, TURNED], ids=["straight", "turned"])
@pytest.mark.parametrize("fit", ["stretch", "isotropic"])
@pytest.mark.parametrize("place", [(20, 15, 12), (45, 30, 30)])
def test_a_bright_spot_is_found_where_it_is_in_the_world(affine, fit, place):
    spacing = (2.0, 2.0, 2.0) if fit == "isotropic" else None
    spec = SPECS["demo"].model_copy(update={"fit": fit, "spacing_mm": spacing})
    prepared = prepare(CTVolume(body(place), affine), spec)
    bone = prepared.voxels[:, 2].astype(float)  # (T, K, H, W)
    chunks, depth, height, width = bone.shape
    patches = bone.reshape(chunks, depth // 4, 4, height // 8, 8, width // 8, 8).max(axis=(2, 4, 6))
    image = nib.Nifti1Image.from_bytes(overlay(patches, prepared.affine, PATCH))
    values = np.asarray(image.dataobj)
    assert values.shape == (8, 8, 8) and values.dtype == np.uint8 and values.max() == 255
    index = np.unravel_index(values.argmax(), values.shape)
    there = image.affine @ [*index, 1]
    true = affine @ [*place, 1]
    half = nib.affines.voxel_sizes(image.affine) / 2
    reach = np.abs(image.affine[:3, :3] / nib.affines.voxel_sizes(image.affine)) @ half  # along the world's axes
    assert (np.abs(there - true)[:3] <= reach + 2 * np.abs(affine[:3, :3]).sum(axis=1)).all()


def test_the_first_patch_is_centred_within_its_voxels():
    image = nib.Nifti1Image.from_bytes(overlay(np.ones((2, 2, 2, 2)), np.eye(4), PATCH))
    np.testing.assert_allclose(image.affine @ [0, 0, 0, 1], [3.5, 3.5, 1.5, 1])
    np.testing.assert_allclose(image.affine @ [1, 1, 3, 1], [11.5, 11.5, 13.5, 1])


def test_nothing_is_nowhere():
    image = nib.Nifti1Image.from_bytes(overlay(np.zeros((1, 2, 2, 2)), np.eye(4), PATCH))
    assert np.asarray(image.dataobj).max() == 0


def test_sentences_are_where_they_stand():
    report = "Findings:  A  nodule of 3.5 mm. A nodule of 3.5 mm.\nImpression: Nodule."
    found = spans(report)
    assert [report[s.start : s.end] for s in found] == [s.text for s in found]
    assert [s.text.split() for s in found] == [["A", "nodule", "of", "3.5", "mm."]] * 2 + [["Nodule."]]
    assert found[1].start > found[0].end


def test_each_sentence_gets_what_it_depends_on():
    """Against a gradient by finite differences (smaller steps drown in the norms, which are taken in fp32): a visual
    token weighs ‖gradient‖·‖token‖."""
    settings = experiment()
    model, processor = build(settings.model, settings.data.spec, [FIRST] * 8, seed=1)
    model.eval().requires_grad_(False)
    voxels = torch.randint(0, 256, (1, *settings.data.spec.shape), dtype=torch.uint8)
    mask = torch.ones(1, 2, dtype=torch.bool)
    features = model.encode_vision(voxels, mask)
    maps = sentence_maps(model, processor, features, mask, QUESTION, FIRST)
    assert maps[0][0].text == "There is a large left pleural effusion."
    expected = by_differences(model, processor, features, mask, maps[1][0])
    np.testing.assert_allclose(maps[1][1], expected, rtol=0.02)


def by_differences(model, processor, features, mask, span, step=1e-3):
    inputs = processor.encode([QUESTION])
    asked = {name: inputs[name] for name in ("question_ids", "question_mask")}
    visual = model.encode_volumes(vision_features=features, chunk_mask=mask, return_selection=True, **asked)
    told = processor.tokenizer(FIRST, add_special_tokens=False, return_offsets_mapping=True)
    part = [i for i, (a, b) in enumerate(told.offset_mapping) if a < span.end and b > span.start]
    ids, tokens = torch.tensor(told.input_ids), visual.tokens.double()
    model.double()
    queries, width = tokens.shape[1:]
    shifts = step * torch.eye(queries * width, dtype=torch.float64).view(-1, queries, width)

    def likelihoods(some):
        full = torch.cat([inputs["input_ids"][0], ids]).expand(len(some), -1)
        logits = model(input_ids=full, visual_tokens=some).logits[:, -len(ids) - 1 : -1]
        return logits.log_softmax(-1).gather(-1, ids.expand(len(some), -1)[..., None])[:, part, 0].sum(1)

    gradient = (likelihoods(tokens + shifts) - likelihoods(tokens - shifts)) / (2 * step)
    weights = gradient.view(queries, width).norm(dim=-1) * tokens[0].norm(dim=-1)
    return torch.einsum("q,qtzyx->tzyx", weights, visual.selection[0].double()).numpy()


def test_in_half_precision_each_sentence_still_gets_its_map(tmp_path):
    """Linear layers are in bf16 there and embeddings in fp32: without autocast every such request failed."""
    settings = experiment()
    model, processor = build(settings.model, settings.data.spec, [FIRST] * 8, seed=1)
    voxels = torch.randint(0, 256, (1, *settings.data.spec.shape), dtype=torch.uint8)
    mask = torch.ones(1, 2, dtype=torch.bool)
    whole = sentence_maps(model.eval(), processor, model.encode_vision(voxels, mask).detach(), mask, QUESTION, FIRST)
    model = place(model, "bf16", "cpu")
    with numerics(model.device, "bf16"):
        features = model.encode_vision(voxels, mask)
    rounded = sentence_maps(model, processor, features.clone(), mask, QUESTION, FIRST, "bf16")
    for (_, exact), (_, half) in zip(whole, rounded, strict=True):
        assert np.corrcoef(exact.ravel(), half.ravel())[0, 1] > 0.95
