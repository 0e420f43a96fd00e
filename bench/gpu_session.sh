#!/usr/bin/env bash
# On a GPU machine without network (torch >= 2.11 with CUDA, its triton, a CUDA toolkit): builds the native kernels, runs the
# tests on CUDA, the sanitizer on small cases, and the benchmarks. Leaves one JSON and one table in the folder given.
#   bench/gpu_session.sh [OUT] [folder of wheels that the machine lacks: diffusers, hypothesis, ...]
# Every part has a time limit and none stops the others: what did run is reported.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=$(realpath -m "${1:-gpu_session}")
WHEELS=${2:-}
PYTHON=${PYTHON:-python3}
mkdir -p "$OUT"
export CUDA_HOME=${CUDA_HOME:-/usr/local/cuda}
unset TRITON_INTERPRET

part() { # part NAME SECONDS COMMAND...
  local name=$1 limit=$2 start=$SECONDS
  shift 2
  timeout "$limit" "$@" >"$OUT/$name.log" 2>&1
  local status=$?
  printf '%-12s exit %3d  %4d s  %s\n' "$name" "$status" "$((SECONDS - start))" "$(tail -n 1 "$OUT/$name.log")" | tee -a "$OUT/summary.txt"
}

: >"$OUT/summary.txt"
[ -n "$WHEELS" ] && part wheels 60 "$PYTHON" -m pip install -q --no-index --no-deps "$WHEELS"/*.whl
part build 180 "$PYTHON" -m pip install -v --no-index --no-deps --no-build-isolation -e .
part doctor 30 "$PYTHON" -c 'from doodl_fast.doctor import main; main()'
part tests 120 "$PYTHON" -m pytest -q tests/test_ops_cuda.py tests/test_ops.py tests/test_chain_golden.py
SANITIZER=$(command -v compute-sanitizer || echo "$CUDA_HOME/bin/compute-sanitizer")
for tool in memcheck racecheck; do
  part "$tool" 45 "$SANITIZER" --tool "$tool" --error-exitcode 9 \
    "$PYTHON" -m pytest -q -x tests/test_ops_cuda.py -k "small"
done
part bench 120 "$PYTHON" bench/ops.py --device cuda --json "$OUT/ops.json" --table "$OUT/ops.md"
cat "$OUT/summary.txt"
