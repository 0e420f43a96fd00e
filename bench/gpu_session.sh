#!/usr/bin/env bash
# Builds the native kernels on a GPU machine without network, runs the tests on CUDA and compute-sanitizer on the small
# cases, counts launches, and runs the benchmarks, all within 8 minutes. The machine needs torch >= 2.11 with CUDA, its
# triton, a CUDA toolkit, pytest, pytest-benchmark, hypothesis and setuptools >= 77.
#
#   bench/gpu_session.sh [OUT] [WHEELS]
#
# OUT is the folder for session.json, session.md and session.log (default: gpu_session). WHEELS is a folder of wheels that
# the machine lacks (diffusers and importlib_metadata for the recorded chains); they are installed for the session alone.
# Nothing outside OUT and the build in this folder is changed. Every part has a time limit, and a part that fails does not
# stop the others. DEVICE=cpu tries the script out where there is no GPU; it leaves out the parts that need one and says
# so.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=$(realpath -m "${1:-gpu_session}")
WHEELS=${2:-}
PYTHON=${PYTHON:-python3}
DEVICE=${DEVICE:-cuda}
SESSION=465 # seconds for all parts
SCRATCH=$(mktemp -d)
trap 'rm -rf "$SCRATCH"' EXIT
mkdir -p "$OUT"
: >"$OUT/session.log"
: >"$SCRATCH/parts"
export CUDA_HOME=${CUDA_HOME:-/usr/local/cuda}
export PYTHONPATH=$PWD:$SCRATCH/site
export DOODL_FAST_TEST_DEVICE=$DEVICE
unset TRITON_INTERPRET DOODL_FAST_BACKEND

# part NAME SECONDS COMMAND...: runs a command, interrupts it after its time or the session's, and kills it 10 s later
part() {
  local name=$1 limit=$2 start=$SECONDS left=$((SESSION - SECONDS)) status
  shift 2
  ((limit > left)) && limit=$left
  if ((limit < 10)); then
    status=skipped
    echo "no time was left" >"$SCRATCH/log"
  else
    timeout -s INT -k 10 "$limit" "$@" >"$SCRATCH/log" 2>&1
    status=$?
  fi
  report "$name" "$status" "$((SECONDS - start))"
}

# report NAME STATUS SECONDS: puts a part and the last line of its log into the summary
report() {
  local last
  last=$(grep -v '^[[:space:]]*$' "$SCRATCH/log" | tail -n 1 | tr '\t' ' ')
  { echo "===== $1"; cat "$SCRATCH/log"; } >>"$OUT/session.log"
  printf '%s\t%s\t%s\t%s\n' "$1" "$2" "$3" "$last" | tee -a "$SCRATCH/parts"
}

# needs_gpu NAME SECONDS COMMAND...: as part, but leaves the part out where there is no GPU
needs_gpu() {
  if [ "$DEVICE" = cuda ]; then
    part "$@"
  else
    echo "needs a GPU; DEVICE=$DEVICE" >"$SCRATCH/log"
    report "$1" skipped 0
  fi
}

TESTS=(tests/ops/test_ops*.py tests/chain/test_chain_*.py tests/optimization/test_optimize*.py)
QUICK=()
if [ "$DEVICE" != cuda ]; then
  TESTS=(tests/ops/test_ops_cuda.py tests/chain/test_chain_golden.py)
  QUICK=(--quick --no-compile --sizes=SD)
fi
WORKERS=()
"$PYTHON" -c 'import xdist' 2>/dev/null && WORKERS=(-n "$(($(nproc) < 12 ? $(nproc) : 12))")

[ -n "$WHEELS" ] && part wheels 30 "$PYTHON" -m pip install --no-index --no-deps --no-compile --target "$SCRATCH/site" "$WHEELS"/*.whl
part build 120 "$PYTHON" setup.py build_ext --inplace
part doctor 30 "$PYTHON" -c 'from doodl_fast.cli.doctor import run; run()'
cp "$SCRATCH/log" "$SCRATCH/doctor"
part tests 130 "$PYTHON" -m pytest -q -p no:cacheprovider "${WORKERS[@]}" "${TESTS[@]}"
# Without torch's caching allocator every tensor has its own memory, so that an access beyond it is seen.
SANITIZER=$(command -v compute-sanitizer || echo "$CUDA_HOME/bin/compute-sanitizer")
SANITIZED=("$PYTHON" -m pytest -q -x -p no:cacheprovider tests/ops/test_ops_cuda.py)
needs_gpu memcheck 45 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$SANITIZER" --tool memcheck --error-exitcode 9 \
  "${SANITIZED[@]}" -k "small and native and (update or fp32-fp16 or fp64-bf16)"
# The racecheck tool looks at shared memory, which only the sums of the latent update use.
needs_gpu racecheck 30 "$SANITIZER" --tool racecheck --error-exitcode 9 "${SANITIZED[@]}" -k "small_latent_update and native"
needs_gpu launches 30 "$PYTHON" bench/launches.py
part bench 240 "$PYTHON" bench/ops.py --device="$DEVICE" --sizes=2^24,SD,SDXL,video "${QUICK[@]}" \
  --json="$SCRATCH/ops.json" --table="$SCRATCH/ops.md"

"$PYTHON" - "$OUT" "$SCRATCH" <<'END'
import json
import sys
from pathlib import Path

out, scratch = map(Path, sys.argv[1:])
keys = ("part", "exit", "seconds", "said")
parts = [dict(zip(keys, line.split("\t", 3))) for line in (scratch / "parts").read_text().splitlines()]
measured = scratch / "ops.json"
benchmarks = json.loads(measured.read_text()) if measured.is_file() and measured.stat().st_size else None
session = {"parts": parts, "doctor": (scratch / "doctor").read_text().splitlines(), "benchmarks": benchmarks}
(out / "session.json").write_text(json.dumps(session, indent=1) + "\n")
rows = ["| " + " | ".join(part[key].replace("|", "/") for key in keys) + " |" for part in parts]
page = ["# GPU session", "", "| part | exit | seconds | said |", "|---|---|---|---|", *rows, ""]
page += ["```", *session["doctor"], "```", ""]
page += [(scratch / "ops.md").read_text()] if benchmarks else ["There are no benchmarks; see the log.", ""]
(out / "session.md").write_text("\n".join(page))
END
echo "$SECONDS s; see $OUT"
