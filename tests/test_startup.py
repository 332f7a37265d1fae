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


def loads(code: str, *arguments: str) -> list[set[str]]:
    """What a fresh process writes to stderr while it runs the code, line by line: the modules that it has loaded."""
    command = [sys.executable, "-c", f"import sys\n{code}", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return [set(line.split()) for line in done.stderr.splitlines() if line.startswith("sys ")]


def imported(code: str, *arguments: str) -> set[str]:
    """The modules of a fresh process once it has run the code."""
    return loads(f"{code}\nsys.stderr.write('\\n' + ' '.join(sys.modules))", *arguments)[-1]


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


CASES = MODELS | TEXTS | SERVICE | {"mlflow", "optuna", "boto3", "ray.train", "sklearn", "matplotlib"}
MODEL = CLUSTER - {"boto3"} | TEXTS | SERVICE | {"trl", "datasets", "transformers.trainer", "sklearn"}
EVALUATE = TEXTS | SERVICE | NOT_TO_TRAIN | {"trl", "datasets", "transformers.trainer"}
NOTHING_HEAVY = MODELS | CLUSTER | NUMBERS | TEXTS | SERVICE


@pytest.mark.parametrize(
    "modules",
    [
        {
            "mu2llm.tracking": NOTHING_HEAVY,
            "mu2llm.evaluation.leaderboard": NOTHING_HEAVY,
            "mu2llm.evaluation.promotion": NOTHING_HEAVY,
            "mu2llm.evaluation.scoring": NOTHING_HEAVY,
            "mu2llm.model": MODEL,
        },
        {"mu2llm.cases": CASES, "mu2llm.evaluation.evaluate": EVALUATE},
        {"mu2llm.stages.sft": TEXTS | SERVICE | NOT_TO_TRAIN | {"trl", "sklearn"}},
    ],
    ids=["model", "evaluate", "sft"],
)
def test_a_module_loads_only_what_it_needs(modules):
    """In one process, each after those above it: none may have loaded what one below does without."""
    code = "".join(f"import {module}\nsys.stderr.write('\\n' + ' '.join(sys.modules))\n" for module in modules)
    for (module, without), loaded in zip(modules.items(), loads(code), strict=True):
        assert module in loaded and loaded & without == set(), module
