#!/usr/bin/env bash
# Writes each serve.yaml anew, by the command that stands in the kustomization beside it.
set -euo pipefail
cd "$(dirname "$0")/.."
for folder in cluster/base cluster/overlays/kind/nodes cluster/overlays/gke/nodes; do
  command=$(sed -n '/MLFLOW_TRACKING_URI=/,/^ *- /{s/^ *# *//p}' "$folder/kustomization.yaml")
  bash -c "$command" > "$folder/serve.yaml"
done
