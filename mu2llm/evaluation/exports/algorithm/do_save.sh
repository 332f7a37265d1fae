#!/usr/bin/env bash
# Writes the two files to upload: the image, and the model as a tarball of its own.
set -euo pipefail
here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
image=${IMAGE:-mu2llm-algorithm}
"$here/do_build.sh"
docker save "$image" | gzip -c > "$here/$image.tar.gz"
tar -czf "$here/model.tar.gz" -C "$here/model" .
echo "upload $image.tar.gz as container image and model.tar.gz under Models"
