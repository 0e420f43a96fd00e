#!/usr/bin/env bash
# Collects the wheels that a GPU machine without network lacks for bench/gpu_session.sh, beside torch, triton,
# transformers, accelerate, numpy, pillow, safetensors, pytest, pytest-benchmark and hypothesis.
#
#   bench/gpu_wheels.sh FOLDER [PYTHON_VERSION]
set -euo pipefail
FOLDER=${1:?usage: bench/gpu_wheels.sh FOLDER [PYTHON_VERSION]}
VERSION=${2:-3.12}
"${PYTHON:-python3}" -m pip download -q --no-deps --only-binary=:all: --python-version "$VERSION" --implementation cp \
  --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
  -d "$FOLDER" diffusers importlib_metadata zipp pytest-xdist execnet 'setuptools>=77'
du -sh "$FOLDER"
