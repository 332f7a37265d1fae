"""What a process imports before it works: only what it needs. Modules are counted here, seconds nowhere."""

import subprocess
import sys

import nibabel
import numpy as np
import pytest

MODELS = {"torch", "transformers", "peft", "trl", "datasets", "sentence_transformers", "monai"}
CLUSTER = {"ray", "mlflow", "optuna", "boto3"}
NUMBERS = {"pandas", "sklearn", "scipy.ndimage", "scipy.sparse", "scipy.stats", "matplotlib"}
TEXTS = {"nltk", "sacrebleu", "rouge_score"}
SERVICE = {"ray.serve", "fastapi", "fhir"}
NOT_TO_TRAIN = {"mlflow", "optuna", "ray.tune", "monai", "sentence_transformers", "matplotlib", "scipy.stats"}


def imported(code: str, *arguments: str) -> set[str]:
    """The modules of a fresh process once it has run the code."""
    whole = f"import sys\n{code}\nsys.stderr.write('\\n' + ' '.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", whole, *arguments], capture_output=True, text=True, check=True)
    return set(done.stderr.splitlines()[-1].split())


def test_help_loads_nothing_heavy():
    loaded = imported("from mu2llm.cli import main\nmain()", "--help")
    assert "mu2llm.cli.stages" in loaded
    assert loaded & (MODELS | CLUSTER | NUMBERS | TEXTS | SERVICE | {"nibabel", "pydicom"}) == set()


def test_inspect_loads_the_readers_alone(tmp_path):
    scan = tmp_path / "scan.nii.gz"
    nibabel.save(nibabel.Nifti1Image(np.zeros((4, 4, 4), np.int16), np.eye(4)), scan)
    loaded = imported("from mu2llm.cli import main\nmain()", "inspect", str(scan), "--json")
    assert "mu2llm.ct.nifti" in loaded
    assert loaded & (MODELS | CLUSTER | NUMBERS | TEXTS | SERVICE) == set()


@pytest.mark.parametrize(
    ("module", "without"),
    [
        ("mu2llm.tracking", MODELS | CLUSTER | NUMBERS | TEXTS | SERVICE),
        ("mu2llm.evaluation.leaderboard", MODELS | CLUSTER | NUMBERS | TEXTS | SERVICE),
        ("mu2llm.evaluation.promotion", MODELS | CLUSTER | NUMBERS | TEXTS | SERVICE),
        ("mu2llm.evaluation.scoring", MODELS | CLUSTER | NUMBERS | TEXTS | SERVICE),
        (
            "mu2llm.cases",
            MODELS | TEXTS | SERVICE | {"mlflow", "optuna", "boto3", "ray.train", "sklearn", "matplotlib"},
        ),
        (
            "mu2llm.model",
            CLUSTER - {"boto3"} | TEXTS | SERVICE | {"trl", "datasets", "transformers.trainer", "sklearn"},
        ),
        ("mu2llm.evaluation.evaluate", TEXTS | SERVICE | NOT_TO_TRAIN | {"trl", "datasets", "transformers.trainer"}),
        ("mu2llm.stages.sft", TEXTS | SERVICE | NOT_TO_TRAIN | {"trl", "sklearn"}),
    ],
)
def test_a_module_loads_only_what_it_needs(module, without):
    loaded = imported(f"import {module}")
    assert module in loaded and loaded & without == set()
