#!/usr/bin/env bash
# Runs the image on test/input as the platform does: no network, read-only input and model, an empty /tmp.
# GPUS="" runs it without a GPU.
set -euo pipefail
here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
image=${IMAGE:-mu2llm-algorithm}
"$here/do_build.sh"
output=$here/test/output
rm -rf "$output" && mkdir -p -m 777 "$output"
chmod -R a+rX "$here/test/input" "$here/model"
# shellcheck disable=SC2086
docker run --rm --platform=linux/amd64 --network none ${GPUS---gpus all} --cap-drop ALL \
  --security-opt no-new-privileges --pids-limit 256 --tmpfs /tmp:mode=1777 \
  --volume "$here/test/input":/input:ro --volume "$output":/output --volume "$here/model":/opt/ml/model:ro "$image"
test -s "$output/$(sed -n 's/.*"output": *"\([^"]*\)".*/\1/p' "$here/sockets.json")"
echo "the report is below $output"
