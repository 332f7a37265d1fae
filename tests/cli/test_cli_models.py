"""`mu2llm model summary`, run in this process."""

import json
import sys

from mu2llm import cli


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
