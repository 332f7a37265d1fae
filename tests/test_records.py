"""Records survive their tables; specs are known by their hash; checkpoints by their description."""

import pickle

import pytest

from mu2llm.errors import Rejection
from mu2llm.records import Case, Finding, Judgement, PreprocessSpec, Question

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
