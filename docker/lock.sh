#!/usr/bin/env bash
# Pins what the images install, from pyproject.toml; a target's file holds what it adds to the first:
#   pip install uv && docker/lock.sh
set -euo pipefail
cd "$(dirname "$0")"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
compile() {
  uv pip compile --quiet --no-annotate --no-header --python-version 3.11 --python-platform x86_64-manylinux_2_31 "$@"
}
echo "jax[cuda12]" >"$work/cuda" # CUDA 12 runs on the drivers that Dataflow installs; 13 wants 580 or newer
compile --extra gcp ../pyproject.toml --output-file requirements.txt
compile --extra gcp --extra tpu ../pyproject.toml --constraint requirements.txt --output-file "$work/tpu.txt"
compile --extra gcp ../pyproject.toml "$work/cuda" --constraint requirements.txt --output-file "$work/cuda.txt"
for target in tpu cuda; do
  comm -13 <(sort requirements.txt) <(sort "$work/$target.txt") >"requirements-$target.txt"
done
