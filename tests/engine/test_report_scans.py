"""Reports of scans by themselves, and whether these are like those of the training."""

import shutil

import pytest
import torch
from ct_scans import chest, slices, to_bytes
from small_runs import least, write_checkpoint

from mu2llm import config
from mu2llm import model as models
from mu2llm.ct.phantom.making import make
from mu2llm.engine.features import encode_scans, scan_features
from mu2llm.engine.scans import ScanPlace, report_scans
from mu2llm.errors import UserError
from mu2llm.model.configuration import Mu2ContrastiveConfig
from mu2llm.model.familiarity import Familiarity, pooled
from mu2llm.records import Case, Series
from mu2llm.settings.evaluation import EvaluationConfig

SETTINGS = EvaluationConfig(max_new_tokens=4)


@pytest.fixture
def phantom(tmp_path):
    path = tmp_path / "phantom.nii.gz"
    path.write_bytes(make(0, 0).nifti())
    return ScanPlace(str(path))


def test_a_scan_among_noise_is_unlike_it_and_among_its_like_it_is_not(checkpoints, phantom, tmp_path):
    checkpoint = str(shutil.copytree(checkpoints["sft"], tmp_path / "c"))
    model, processor = models.load(checkpoint, torch.float32)
    noise = torch.randint(0, 256, (60, *processor.spec.shape), dtype=torch.uint8)
    rows = {"voxels": noise.numpy(), "chunk_mask": torch.ones(60, processor.spec.chunks, dtype=bool).numpy()}
    of_noise = pooled(*scan_features(model.eval(), rows))
    Familiarity.of(of_noise).write(checkpoint)
    (entry,) = report_scans(checkpoint, [phantom], SETTINGS)
    assert entry["familiarity"] == {"percentile": 100.0, "unlike": True} and "report" in entry
    Familiarity.of(of_noise + 50 * torch.randn(of_noise.shape)).write(checkpoint)
    (entry,) = report_scans(checkpoint, [phantom], SETTINGS)
    assert not entry["familiarity"]["unlike"]


def test_an_older_checkpoint_says_that_it_does_not_know(checkpoints, phantom):
    (entry,) = report_scans(checkpoints["sft"], [phantom], SETTINGS)
    assert entry["familiarity"] is None and entry["finding_probabilities"] is None and "report" in entry


def test_several_series_give_one_report_and_fewer_are_told(checkpoints, shards, phantom, tmp_path):
    values = least().model_dump(mode="json")
    values["data"]["spec"]["series"] = 2
    checkpoint = write_checkpoint(str(tmp_path / "two"), 0, experiment=config.validate(values))
    other = tmp_path / "other.nii.gz"
    other.write_bytes(make(1, 1).nifti())
    both = phantom._replace(further=(Series(volume=str(other)),))
    broken = phantom._replace(further=(Series(volume=str(tmp_path / "gone.nii.gz")),))
    told, one, none = report_scans(checkpoint, [both, phantom, broken], SETTINGS)
    assert "report" in told and "series_missing" not in told["warnings"]
    assert "report" in one and "series_missing" in one["warnings"]
    assert none["rejected"] == "not_found"
    with pytest.raises(UserError, match=r"expects spec \w+, 2 series, .* has least \(\w+\)"):
        encode_scans(checkpoint, shards, SETTINGS)
    (entry,) = report_scans(checkpoints["sft"], [phantom], SETTINGS)
    assert "series_missing" not in entry["warnings"]


def test_the_series_of_a_study_are_found_or_named(checkpoints, tmp_path):
    spec = {**least().data.spec.model_dump(mode="json"), "series": 2}
    values = least().model_dump(mode="json")
    values["data"]["spec"] = spec
    checkpoint = write_checkpoint(str(tmp_path / "two"), 0, experiment=config.validate(values))
    study = tmp_path / "study"
    study.mkdir()
    for name, depth in {"1.1": 16, "1.2": 14, "1.3": 12}.items():
        for number, each in enumerate(slices(chest((24, 20, depth)), SeriesInstanceUID=name)):
            (study / f"{name}-{number}.dcm").write_bytes(to_bytes(each))
    asked = [(), ("1.3", "1.1"), ("1.2",), ("1.1", "1.9")]
    found, named, one, wrong = report_scans(checkpoint, [ScanPlace.given(str(study), each) for each in asked], SETTINGS)
    assert found["series"] == ["1.1", "1.2"] and found["warnings"] == ["files_set_aside"]
    assert named["series"] == ["1.3", "1.1"] and "series_missing" not in named["warnings"]
    assert one["series"] == ["1.2"] and "series_missing" in one["warnings"]
    assert wrong["rejected"] == "no_series"
    with pytest.raises(UserError, match="3 series of an examination"):
        report_scans(checkpoint, [ScanPlace.given(str(study), ("1.1", "1.2", "1.3"))], SETTINGS)
    (alone,) = report_scans(checkpoints["sft"], [ScanPlace.given(str(study))], SETTINGS)
    assert alone["series"] == ["1.1"]
    row = Case(id="1", patient="1", volume=str(study), report="")
    for together, series in ((True, ["1.1", "1.2"]), (False, ["1.1"])):
        (entry,) = report_scans(checkpoint, [ScanPlace.of(row, together)], SETTINGS)
        assert entry["series"] == series


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_diagnostic_prior_is_told_as_the_model_has_it(checkpoints, phantom, tmp_path, precision):
    model, processor = models.load(checkpoints["sft"], torch.float32)
    vision = model.config.vision
    head = Mu2ContrastiveConfig(
        hidden_size=vision.hidden_size, chunks=vision.chunks, text_width=3, head_width=8, num_heads=2
    ).head
    model.model.put_prior(["left pneumothorax", "renal cyst"], head)
    torch.nn.init.normal_(model.model.prior.texts)
    processor.queries = model.config.visual_tokens
    model.save_pretrained(tmp_path / "told")
    processor.save_pretrained(tmp_path / "told")
    (entry,) = report_scans(str(tmp_path / "told"), [phantom], SETTINGS.model_copy(update={"precision": precision}))
    scan = processor.prepare(phantom.path)
    features = model.eval().encode_vision(scan["volumes"], scan["chunk_mask"])
    expected = model.finding_probabilities(features, scan["chunk_mask"])[0]
    assert entry["finding_probabilities"] == pytest.approx(expected, abs=1e-4 if precision == "fp32" else 0.02)
    assert list(entry["finding_probabilities"]) == ["left pneumothorax", "renal cyst"] and "report" in entry
