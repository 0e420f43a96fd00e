#!/usr/bin/env bash
# Installs a wheel into an empty environment and runs README's example there, outside of the repository.
#   .ci/check_wheel.sh PYTHON WHEEL
# PYTHON is that of the development environment: what the wheel depends on is taken from there and not downloaded again.
set -euo pipefail
python=$(cd "$(dirname "$1")" && pwd)/$(basename "$1")
wheel=$(realpath "$2")
repository=$(cd "$(dirname "$0")/.." && pwd)
out=$repository/build/wheel
rm -rf "$out"
mkdir -p "$out/empty"
"$python" -m venv --without-pip "$out/env"
# A line in a .pth file adds a folder without the .pth files in it, so the repository itself is not added.
packages=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
installed=$("$out/env/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
echo "$packages" >"$installed/dependencies.pth"
"$python" -m pip --python "$out/env/bin/python" install -q --no-deps --no-index --force-reinstall "$wheel"
unset PYTHONPATH
cd "$out/empty"
"$out/env/bin/python" - "$installed" <<'PY'
import importlib.metadata, pathlib, sys
import doodl_fast
from doodl_fast import ops

where = pathlib.Path(doodl_fast.__file__)
assert where.is_relative_to(sys.argv[1]), where
assert importlib.metadata.version("doodl-fast") == doodl_fast.__version__
print(f"doodl_fast {doodl_fast.__version__} in {where.parent}, kernels: {ops.resolve('cpu')}")
PY
"$out/env/bin/doodl-fast" doctor
# The test writes README's example word for word into an interpreter, with few steps and the embedded pipeline.
"$out/env/bin/python" -m pytest -q -p no:cacheprovider -n 0 "$repository/tests/test_readme.py"
