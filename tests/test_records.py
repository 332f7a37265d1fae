"""Records survive their tables; specs are known by their hash; checkpoints by their description."""

import pickle

import pytest

from mu2llm.errors import UserError
from mu2llm.records import (
    Case,
    Checkpoint,
    Correction,
    Finding,
    Judgement,
    Lineage,
    PreprocessSpec,
    Question,
    Rejection,
)

CASE = Case(
    id="a",
    patient="p",
    volume="scans/a.nii.gz",
    report="No nodule.",
    questions=(Question(question="Lungs?", answer="Clear."),),
    findings=(Finding(name="lung nodule", side="left", size_mm=12),),
    labels={"Lung nodule": 1},
    rescale=(1.0, -1024.0),
)


def test_cases_survive_their_table():
    table = Case.table([CASE, CASE.model_copy(update={"findings": None, "labels": None, "rescale": None})])
    first, second = (Case.from_row(row) for row in table.to_pylist())
    assert first == CASE
    assert second.findings is None


def test_an_empty_table_has_the_schema():
    assert Judgement.table([]).schema.equals(Judgement.arrow_schema)


def test_a_rejection_travels_between_processes():
    rejection = pickle.loads(pickle.dumps(Rejection("s3://b/x", "truncated", "it ends early", "a")))
    assert rejection.row() == {"uri": "s3://b/x", "reason": "truncated", "message": "it ends early", "case_id": "a"}


def spec(**changes):
    values = {"name": "s", "windows": [[-1000, 200]], "grid": [8, 16, 16], "chunks": 2}
    return PreprocessSpec.model_validate({**values, **changes})


def test_a_spec_is_known_by_what_it_does_and_not_by_its_name():
    assert spec().hash == spec(name="other").hash
    assert spec().hash != spec(grid=[8, 32, 32]).hash
    assert spec().shape == (2, 1, 4, 16, 16)


@pytest.mark.parametrize("change", [{"percentiles": [0.5, 99.5]}, {"windows": None}, {"chunks": 3}])
def test_contradicting_specs_are_refused(change):
    with pytest.raises(ValueError, match="spec s"):
        spec(**change)


def test_a_checkpoint_is_whole_once_it_describes_itself(tmp_path):
    (tmp_path / "local").mkdir()
    (tmp_path / "local" / "model.safetensors").write_bytes(b"weights")
    out = str(tmp_path / "out")
    with pytest.raises(UserError, match="not a checkpoint"):
        Checkpoint.open(out)
    Checkpoint(uri=out, experiment={"seed": 1}, lineage=Lineage(stage="sft", spec_hash="abc")).publish(
        str(tmp_path / "local")
    )
    assert Checkpoint.open(out).lineage.stage == "sft"
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == b"weights"


CORRECTION = Correction(
    id="c",
    scan_sha256="ab",
    volume="s3://b/a.nii.gz",
    question="Write.",
    chosen="No nodule.",
    rejected="A nodule.",
    time="2026-01-01T00:00:00+00:00",
)


def test_corrections_are_read_from_a_file_or_a_folder_of_files(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text(CORRECTION.model_copy(update={"id": name}).model_dump_json() + "\n")
    assert [each.id for each in Correction.read(str(tmp_path))] == ["a", "b"]
    assert Correction.read(str(tmp_path / "b.jsonl"))[0].chosen == "No nodule."


def test_a_line_that_is_no_correction_is_named(tmp_path):
    (tmp_path / "a.jsonl").write_text(CORRECTION.model_dump_json() + "\n{}\n")
    with pytest.raises(UserError, match=r"a\.jsonl, line 2"):
        Correction.read(str(tmp_path / "a.jsonl"))
    with pytest.raises(UserError, match="holds no corrections"):
        Correction.read(str(tmp_path / "nowhere"))
