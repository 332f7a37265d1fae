"""`mu2llm model summary` and `model probe`, run in this process."""

import json
import sys

import pytest
from typer.testing import CliRunner

from mu2llm import cli
from mu2llm.errors import UserError


def test_the_summary_reads_as_a_table_and_as_json(monkeypatch, capsys):
    told = []
    for more in ([], ["--json"]):
        monkeypatch.setattr(sys, "argv", ["mu2llm", "model", "summary", "--preset", "tiny", *more])
        cli.main()
        told.append(capsys.readouterr().out)
    steps, parts, memory = told[0].split("\n\n")
    assert "visual tokens   1 × 4 × 32" in steps and "volume          1 × 4 × 3 × 8 × 64 × 64" in steps
    assert "language model" in parts and "GFLOP a scan" in parts and "activations" in memory and "GiB" in memory
    values = json.loads(told[1])
    assert list(values) == ["steps", "parameters", "flops", "bytes"]
    assert values["parameters"]["all"] == sum(n for part, n in values["parameters"].items() if part != "all")


@pytest.mark.parametrize("given", [[], ["--checkpoint", "c", "--weights", "w"], ["--checkpoint", "c", "--set", "a=b"]])
def test_a_probe_is_of_a_checkpoint_or_of_weights(tmp_path, given):
    done = CliRunner().invoke(cli.app, ["model", "probe", "--data", str(tmp_path), *given])
    assert isinstance(done.exception, UserError) and "give a --checkpoint, or the --weights" in str(done.exception)
