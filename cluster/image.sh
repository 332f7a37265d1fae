#!/usr/bin/env bash
# Builds the image without a daemon and without a registry, as root on Debian: cluster/image.sh [cpu|cuda]
# Needs buildah, crun and mmdebstrap (apt-get install). The base is made from Debian's mirror where it isn't there, under
# the name in FROM; pip's, npm's and apt's own configuration of this machine are lent to the build, and are not in it.
set -euo pipefail
cd "$(dirname "$0")/.."
torch=${1:-cpu}
version=$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
base=$(sed -n 's/^ARG BASE=\(.*\)@sha256:.*/\1/p' cluster/Dockerfile)
export BUILDAH_ISOLATION=chroot

if ! buildah inspect --type image "$base" > /dev/null 2>&1; then
  archive=$(mktemp --suffix=.tar)
  trap 'rm -f "$archive"' EXIT
  mmdebstrap --quiet --variant=minbase --include=python3,python3-venv,python3-pip,ca-certificates bookworm "$archive"
  made=$(buildah from scratch)
  buildah add --quiet "$made" "$archive" /
  buildah run "$made" -- sh -c 'ln -s python3 /usr/bin/python; rm -f /usr/lib/python3*/EXTERNALLY-MANAGED'
  buildah commit --quiet --rm "$made" "$base"
fi

lent=()
lend() { # a file or folder of this machine, at the same place or another
  if [ -e "$1" ]; then lent+=(--volume "$(readlink -f "$1"):${2:-$1}:ro"); fi
}
lend /etc/pip.conf
lend /etc/xdg/pip
lend "$HOME/.config/pip" /root/.config/pip
lend "$HOME/.npmrc" /root/.npmrc
lend /etc/ssl/certs
lend /usr/local/share/ca-certificates
lend /etc/apt
folders() { pip config list 2>/dev/null | grep -E '(find-links|index-url)=' | grep -oE '(file://|[ '"'"'])/[^ '"'"']+' |
  sed -E "s,^(file://|[ '\"]),," | cut -d/ -f1-3 | sort -u; }
for folder in $(folders); do lend "$folder"; done
arguments=()
# where pip of this machine finds a wheel of torch without CUDA by itself: TORCH_INDEX= cluster/image.sh
if [ -n "${TORCH_INDEX+set}" ]; then arguments+=(--build-arg "TORCH_INDEX=$TORCH_INDEX"); fi

buildah bud --pull-never --layers --format docker --file cluster/Dockerfile --build-arg "BASE=$base" --build-arg "TORCH=$torch" \
  --build-arg "VERSION=$version" --build-arg "REVISION=$(git rev-parse HEAD 2>/dev/null || true)" \
  "${arguments[@]}" "${lent[@]}" --tag "mu2llm:$version-$torch" .
