#!/usr/bin/env bash
# Builds the image.
set -euo pipefail
here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
docker build --platform=linux/amd64 --tag "${IMAGE:-mu2llm-algorithm}" "$here"
