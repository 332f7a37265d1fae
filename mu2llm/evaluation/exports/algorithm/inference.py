"""The container's entry point. What it does: mu2llm/evaluation/exports/container.py."""

from pathlib import Path

from mu2llm.evaluation.exports.container import main

if __name__ == "__main__":
    raise SystemExit(main(Path(__file__).parent))
