#!/usr/bin/env bash
# Writes the lock files of the image, requirements.txt and build.txt, with uv (pip install uv): the versions of
# constraints.txt and the newest of everything else, for Python 3.11 on x86-64, each file with its hashes.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

export UV_CUSTOM_COMPILE_COMMAND=docker/lock.sh
compile=(uv pip compile --quiet --upgrade --generate-hashes --python-version 3.11 --python-platform x86_64-manylinux_2_28)
"${compile[@]}" --constraint constraints.txt --extra ffcv --extra slurm --extra dev pyproject.toml -o docker/requirements.txt
"${compile[@]}" --constraint docker/requirements.txt docker/build.in -o docker/build.txt
