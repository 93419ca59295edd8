#!/usr/bin/env bash
# Resolves cpu.in and gpu.in to cpu.lock and gpu.lock. Versions already locked are kept; pass
# --upgrade to take newer ones. Run by `make lock`.
set -euo pipefail
cd "$(dirname "$0")"
uv=${UV:-uv}

options=(--quiet --universal --python-version 3.11 --generate-hashes --no-annotate --no-header)
"$uv" pip compile "${options[@]}" "$@" --override cpu-overrides.txt \
  --no-emit-package torch --no-emit-package torchaudio --no-emit-package torchcodec \
  --no-emit-package torchvision --no-emit-package triton \
  --output-file cpu.lock cpu.in
"$uv" pip compile "${options[@]}" "$@" --output-file gpu.lock gpu.in
