"""Parts of a scan are taken away, and what that costs a sentence is told where it is so."""

import threading
from concurrent.futures import CancelledError

import numpy as np
import pytest
import torch
from small_writer import FIRST, QUESTION, SECOND, experiment

from mu2llm import config
from mu2llm.ct import CTVolume, phantom, prepare, whole
from mu2llm.engine import occlusion
from mu2llm.engine.loading import place
from mu2llm.engine.occlusion import CONTROLS, SHOWN, Answer, Occlusion, Reader, blurred, region, top
from mu2llm.model import build
from mu2llm.model.head import next_token_logps

SENTENCES = [(10, 49), (76, 91)]
ANSWER = Answer(QUESTION, FIRST, SENTENCES)


@pytest.fixture(scope="module")
def made():
    settings = experiment()
    return build(settings.model, settings.data.spec, [FIRST, SECOND] * 4, seed=1)


def noise(spec, seed=0):
    return np.random.default_rng(seed).integers(60, 200, spec.shape, dtype=np.uint8)


def occluded(made, voxels, answer=ANSWER, **reader):
    model, processor = made
    return Occlusion(Reader(model.eval(), processor, **reader), voxels, np.ones(len(voxels), bool), answer)


def test_what_a_region_costs_is_what_the_model_says_without_it(made):
    """Against whole forward passes of scans that were changed by hand."""
    model, processor = made
    spec = processor.spec
    seen = occluded(made, noise(spec), batch_size=2)
    regions = [np.zeros((8, 8, 8), bool) for _ in range(3)]
    regions[0][0, :3] = regions[1][3:5, 2, 2] = regions[2][7] = True  # of one chunk, of both, of the other
    drops = seen.drops(regions, torch.zeros_like(seen.grid))
    for where, found in zip(regions, drops, strict=True):
        grid = whole(noise(spec), spec)
        grid[:, np.kron(where, np.ones((1, 2, 2), bool))] = 0
        voxels = np.stack([grid[:, :4], grid[:, 4:]])
        expected = by_hand(model, processor, noise(spec)) - by_hand(model, processor, voxels)
        np.testing.assert_allclose(found, expected, atol=1e-4)


def by_hand(model, processor, voxels):
    """Each sentence's log-probability."""
    batch = processor.encode([QUESTION], [FIRST])
    told = processor.tokenizer(FIRST, add_special_tokens=False, return_offsets_mapping=True)
    with torch.no_grad():
        labels = batch.pop("labels")
        hidden = model.model(**batch, volumes=torch.from_numpy(voxels)[None]).last_hidden_state
        logps = next_token_logps(hidden, labels, model.lm_head)[0]
    own = logps[labels[0, 1:] != -100]
    parts = [[i for i, (a, b) in enumerate(told.offset_mapping) if a < end and b > start] for start, end in SENTENCES]
    return np.array([float(own[part].sum()) for part in parts])


def test_a_place_weighs_where_something_is_to_be_seen(made):
    """A scan of one grey with a bright block: far from it nothing changes, whatever is taken away."""
    grid = np.full((1, 8, 16, 16), 90, np.uint8)
    grid[:, 0:2, 0:4, 0:4] = 255  # 2 × 2 × 2 of 8 × 8 × 8 cells
    seen = occluded(made, np.stack([grid[:, :4], grid[:, 4:]]))
    seen.body[:] = True
    for found in seen.influences():
        assert np.abs(found.weights[:2, :2, :2]).min() > 0
        assert not found.weights[5:].any() and not found.weights[:, 5:].any() and not found.weights[:, :, 5:].any()
        assert found.shown.sum() == round(SHOWN * 512)


def test_what_is_shown_costs_more_than_random_regions_or_is_not(made, monkeypatch):
    seen = occluded(made, noise(made[1].spec))
    for least in (0, 1e3):
        monkeypatch.setattr(occlusion, "LEAST", least)
        rng = np.random.default_rng(0)
        controls = [region(seen.body, rng, int(top(np.zeros((8, 8, 8)), seen.body).sum())) for _ in range(CONTROLS)]
        for i, found in enumerate(seen.influences()):
            own, *random = seen.drops([found.shown, *controls], seen.fill())[:, i]
            assert np.isclose(found.drop, own, atol=1e-5) and np.isclose(found.random, np.mean(random), atol=1e-5)
            assert found.holds == (own > max(least, *random))
            assert (found.shown == top(found.weights, seen.body)).all()


def test_where_a_scan_changes_nothing_no_place_is_shown(made):
    """It is one grey: whatever is taken away costs nothing."""
    empty = np.full(made[1].spec.shape, 90, np.uint8)
    for found in occluded(made, empty).influences():
        assert found.drop == found.random == 0 and not found.holds


def test_the_body_is_what_lies_within_its_outline():
    """Air around it and the couch are not of it; lungs, which are as dark as air, are."""
    settings = experiment()
    model, processor = build(settings.model, settings.data.spec, [FIRST] * 8, seed=1)
    made = phantom.make(3, 1)
    voxels = prepare(CTVolume(made.hu, made.affine), processor.spec).voxels
    body = occluded((model, processor), voxels).body
    dark = whole(voxels, processor.spec)[0].reshape(8, 1, 8, 2, 8, 2).mean((1, 3, 5)) < 60
    outer = np.ones((8, 8, 8), bool)
    outer[:, 1:-1, 1:-1] = False
    corners = body[:, [0, 0, -1, -1], [0, -1, 0, -1]]
    assert 0.4 < body.mean() < 0.95 and not corners.any()
    assert (dark & body & ~outer).sum() > 20, "the lungs are left out"
    seen = occluded((model, processor), voxels)
    fine = seen.within_outline(seen.body.astype(np.float32))
    assert fine.shape == (8, 16, 16) and not fine[:, [0, 0, -1, -1], [0, -1, 0, -1]].any()
    there = body.repeat(2, 1).repeat(2, 2)
    assert set(np.unique(fine)) == {0, 1} and not fine[~there].any() and (fine[there] == 0).any()


def test_in_half_precision_it_is_the_same(made):
    settings = experiment()
    model, processor = build(settings.model, settings.data.spec, [FIRST] * 8, seed=1)
    voxels = noise(processor.spec)
    exact = occluded((model, processor), voxels)
    regions = [region(np.ones((8, 8, 8), bool), np.random.default_rng(n), 60) for n in range(CONTROLS)]
    wanted = exact.drops(regions, torch.zeros_like(exact.grid))
    rounded = occluded((place(model, "bf16", "cpu"), processor), voxels, precision="bf16")
    found = rounded.drops(regions, torch.zeros_like(exact.grid))
    assert np.corrcoef(wanted.ravel(), found.ravel())[0, 1] > 0.8


def test_a_region_is_of_the_body_and_of_its_size():
    body = np.zeros((4, 4, 4), bool)
    body[1:, 1:, 1:] = True
    for seed in range(5):
        drawn = region(body, np.random.default_rng(seed), 7)
        assert drawn.sum() == 7 and not (drawn & ~body).any()
    weights = np.random.default_rng(0).standard_normal(body.shape)
    weights[0] = 9  # in air
    shown = top(weights, body, share=0.2)
    assert shown.sum() == 5 and not (shown & ~body).any()
    assert weights[shown].min() > weights[body & ~shown].max()


def test_what_is_blurred_keeps_its_mean_and_loses_what_is_small():
    grid = torch.full((2, 16, 16, 16), 100, dtype=torch.uint8)
    assert torch.equal(blurred(grid, (8, 8, 8)), grid.float())
    grid[0, 8, 8, 8] = 255
    soft = blurred(grid, (8, 8, 8))
    assert soft[0].max() < 102 and torch.equal(soft[1], grid[1].float())


def test_what_is_taken_away_is_filled_from_the_training_scans_where_their_mean_is_known(made):
    settings = experiment()
    vision = {**settings.model.vision.model_dump(), "standardise_input": True}
    spec = settings.data.spec
    model, processor = build(
        config.validate(
            {"model": {**settings.model.model_dump(), "vision": vision}, "data": settings.data.model_dump()}
        ).model,
        spec,
        [FIRST, SECOND] * 4,
        seed=1,
    )
    scans = torch.from_numpy(np.stack([noise(spec, seed) for seed in range(3)]))
    model.train().encode_vision(scans, torch.ones(3, 2, dtype=torch.bool))
    mean = occluded((model, processor), noise(spec, 7)).fill()
    expected = np.mean([whole(noise(spec, seed), spec) for seed in range(3)], axis=0)
    np.testing.assert_allclose(mean, expected, atol=1e-3)
    soft = occluded(made, noise(spec, 7))
    assert torch.equal(soft.fill(), blurred(soft.grid, soft.cells))


def test_it_ends_when_nobody_waits_any_more(made):
    model, processor = made
    gone = threading.Event()
    seen = Occlusion(
        Reader(model.eval(), processor), noise(processor.spec), np.ones(2, bool), ANSWER, lambda: not gone.is_set()
    )
    gone.set()
    with pytest.raises(CancelledError):
        seen.influences()
