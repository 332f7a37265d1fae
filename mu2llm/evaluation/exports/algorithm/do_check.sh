#!/usr/bin/env bash
# Runs the entry point here, without a container, on test/input: needs mu2llm in this environment's Python.
set -euo pipefail
here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
output=$(mktemp -d)
trap 'rm -rf "$output"' EXIT
MU2LLM_INPUT=$here/test/input MU2LLM_OUTPUT=$output MU2LLM_MODEL=$here/model HF_HUB_OFFLINE=1 \
  HF_HUB_DISABLE_PROGRESS_BARS=1 \
  "${PYTHON:-python}" "$here/inference.py"
find "$output" -name '*.json' -print -exec cat {} +
