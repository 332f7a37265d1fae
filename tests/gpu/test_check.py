"""The check for a machine with a GPU, on a CPU at the least size: that all of its table is there and its numbers agree.

Nothing here is about times.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import rows as table

CHECK = Path(__file__).with_name("check.py")
STAGES = ("contrast", "SFT", "SFT with LoRA", "DPO")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    out = tmp_path_factory.mktemp("gpu-check")
    command = [sys.executable, str(CHECK), "--device", "cpu", "--small", "--out", str(out)]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return out


@pytest.fixture(scope="module")
def found(written):
    return json.loads((written / "gpu-check.json").read_text())["rows"]


@pytest.mark.slow
def test_every_check_is_in_the_table(found, written):
    counted = {row["check"]: 0 for row in found}
    for row in found:
        counted[row["check"]] += 1
        allowed = {"ok", "measured"} | ({"skipped"} if row["what"] == "golden files" else set())
        assert row["verdict"] in allowed, row
    names = ("parity", "tokenizer", "attention", "a training step", "memory model", "writing", "learning")
    assert set(counted) == set(names)
    lines = (written / "gpu-check.md").read_text().splitlines()
    assert "| check | what | aim | measured | verdict |" in lines
    assert sum(line.startswith("| ") for line in lines) == 1 + len(found)
    assert any(line.startswith("device: CPU") for line in lines)


@pytest.mark.slow
def test_both_precisions_agree_with_fp32(found):
    parity = {row["what"]: row["value"] for row in found if row["check"] == "parity"}
    for kind in ("SFT loss", "SFT gradient", "contrastive loss", "DPO loss", "log-probabilities", "visual tokens"):
        exact, rounded = (parity[f"{kind}, {mode} against the CPU's fp32: relative error"] for mode in ("fp32", "bf16"))
        assert exact < 1e-6 < rounded < 0.05
    assert parity["first tokens of 32 that are the same, written greedily in fp32"] == 32


@pytest.mark.slow
def test_each_stage_has_its_memory_its_waits_and_learns(found):
    by_name = {row["what"]: row for row in found}
    for stage in STAGES:
        assert by_name[f"{stage}: memory model, GiB"]["value"] > 0
        assert by_name[f"{stage}: waits for the device, a step"]["value"] <= 5
        assert by_name[f"{stage}: share of its own matmul (MFU)"]["value"] > 0
    learned = [row for row in found if row["check"] == "learning"]
    assert len(learned) == 5 and all(row["verdict"] == "ok" for row in learned)
    kernels = [row["measured"] for row in found if row["check"] == "attention"]
    assert len(kernels) >= 8 and "flash" in kernels


def test_a_row_says_whether_its_aim_is_met():
    met, missed = table.within("a", "b", 0.1, 0.2), table.within("a", "b", 0.3, 0.2)
    assert (met.verdict, missed.verdict) == ("ok", "missed")
    assert (table.at_least("a", "b", 9, 8).verdict, table.at_least("a", "b", 7, 8).verdict) == ("ok", "missed")
    assert table.within("a", "b", float("nan"), 0.2).verdict == "missed"
    assert table.markdown({"device": "x|y"}, [missed]).endswith("| a | b | ≤ 0.2 | 0.3 | missed |\n")


def test_without_a_gpu_it_says_so(tmp_path):
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, str(CHECK), "--out", str(tmp_path)], env=environment, capture_output=True)
    assert done.returncode == 2 and b"torch sees no GPU" in done.stderr
