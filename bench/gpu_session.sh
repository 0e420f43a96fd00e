#!/usr/bin/env bash
# Measures and tests everything on a GPU machine without network, unattended: the most valuable parts first, each with a
# time limit of its own. The machine needs torch >= 2.11 with CUDA, its triton, a CUDA toolkit, pytest, pytest-benchmark,
# hypothesis and setuptools >= 77.
#
#   bench/gpu_session.sh [OUT] [WHEELS]
#
# OUT is a folder (default: gpu_session). session.md, session.json and session.tar.gz, which has all files of OUT, are
# written anew after every part. session.log gets what the parts say, and tests.jsonl the result of each test, while they
# run, so that a part which is killed loses nothing. WHEELS is a folder of wheels that the machine lacks, such as
# bench/gpu_wheels.sh collects; they are installed for the session alone. Nothing outside OUT and the build in this folder
# is changed. A part that fails does not stop the others.
#
# LEASE=1450 is the number of seconds for all parts; the rest of a runner's limit is for the last part to end.
# PARTS="build chains" runs these alone, so that a session may be spread over several leases, each with an OUT of its own,
# and TESTS="tests/solvers tests/diffusion" is what the part `tests` runs then. REFERENCE=DIR is a checkout of
# github.com/salesforce/DOODL, for the comparison with its layers. DEVICE=cpu tries the script out where there is no GPU:
# every part runs in small, but for those that need compute-sanitizer or a profile of the GPU, which say so.
#
# First come the facts that no session has given yet: which tests pass, what the sanitizers say, 50 steps, the reference,
# compiled networks. Those that docs/results/h200.md has already follow.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=$(realpath -m "${1:-gpu_session}")
WHEELS=${2:-}
PYTHON=${PYTHON:-python3}
DEVICE=${DEVICE:-cuda}
LEASE=${LEASE:-1450}
PARTS=${PARTS:-}
TESTS=${TESTS:-}
REFERENCE=${REFERENCE:-}
SCRATCH=$(mktemp -d)
trap 'rm -rf "$SCRATCH"' EXIT
mkdir -p "$OUT"
: >"$OUT/session.log"
: >"$SCRATCH/parts"
export CUDA_HOME=${CUDA_HOME:-/usr/local/cuda}
export PYTHONPATH=$PWD:$SCRATCH/site
export DOODL_FAST_TEST_DEVICE=$DEVICE
export PYTHONUNBUFFERED=1  # what a part has said is in the log when it is killed
unset TRITON_INTERPRET DOODL_FAST_BACKEND

# part NAME SECONDS COMMAND...: runs a command, interrupts it after its time or the lease's, and kills it 10 s later
part() {
  local name=$1 limit=$2 start=$SECONDS left=$((LEASE - SECONDS)) status
  shift 2
  wanted "$name" || return 0
  ((limit > left)) && limit=$left
  begin "$name"
  if ((limit < 10)); then
    status=skipped
    echo "no time was left" >>"$OUT/session.log"
  else
    timeout -s INT -k 10 "$limit" "$@" >>"$OUT/session.log" 2>&1
    status=$?
  fi
  report "$name" "$status" "$((SECONDS - start))"
}

# wanted NAME: whether PARTS names a part, or nothing
wanted() { [ -z "$PARTS" ] || [[ " $PARTS " == *" $1 "* ]]; }

# begin NAME: puts a part's name into the log, and remembers where its own lines start
begin() {
  echo "===== $1" >>"$OUT/session.log"
  BEGUN=$(($(wc -c <"$OUT/session.log") + 1))
}

# report NAME STATUS SECONDS: puts a part and the last line that it said into the summary, and writes that and the archive
report() {
  local last
  tail -c "+$BEGUN" "$OUT/session.log" >"$SCRATCH/log"
  [ "$1" = doctor ] && cp "$SCRATCH/log" "$SCRATCH/doctor"
  last=$(grep -v '^[[:space:]]*$' "$SCRATCH/log" | tail -n 1 | tr '\t' ' ' | cut -c1-300)
  printf '%s\t%s\t%s\t%s\n' "$1" "$2" "$3" "$last" | tee -a "$SCRATCH/parts"
  "$PYTHON" bench/gpu_summary.py "$OUT" "$SCRATCH"
  tar -C "$OUT" --exclude=session.tar.gz -czf "$SCRATCH/session.tar.gz" . && mv "$SCRATCH/session.tar.gz" "$OUT/"
}

# needs_gpu NAME SECONDS COMMAND...: as part, but leaves the part out where there is no GPU
needs_gpu() {
  if [ "$DEVICE" = cuda ]; then
    part "$@"
  elif wanted "$1"; then
    begin "$1"
    echo "needs a GPU; DEVICE=$DEVICE" >>"$OUT/session.log"
    report "$1" skipped 0
  fi
}

# end_to_end NAME SECONDS: a part of bench/end_to_end.py, whose rows are kept one by one
end_to_end() { part "$1" "$2" "$PYTHON" bench/end_to_end.py "$1" --device "$DEVICE" --json "$OUT/end_to_end.json"; }

# The first tests are those whose failure would make the figures below worthless.
SELECTED=(tests/ops tests/frozen tests/chain/test_chain_*.py tests/optimization/test_optimize*.py)
SIZES=(--sizes=SD,2^24)
LAYERS=(--device "$DEVICE" --dtype fp16)
COMPARED=(--sizes=sd15 --dtype=fp16 --steps=3 --rounds=1)  # 4 steps did not end in 90 s on an H200
if [ "$DEVICE" != cuda ]; then
  SELECTED=(tests/ops/test_ops_cuda.py tests/chain/test_chain_golden.py -k "native or latent_update or unaligned or golden")
  SIZES=(--sizes=SD --quick --no-compile)
  LAYERS=(--rounds 1)
  COMPARED=(--sizes=tiny --steps=3 --rounds=1)
  export DOODL_FAST_REHEARSE=1
fi
[ -z "$TESTS" ] || read -ra SELECTED <<<"$TESTS"
WORKERS=()
"$PYTHON" -c 'import xdist' 2>/dev/null && WORKERS=(-n "$(($(nproc) < 12 ? $(nproc) : 12))")
STREAMED=(-p bench.streamed --streamed="$OUT/tests.jsonl")
# Without torch's caching allocator every tensor has its own memory, so that an access beyond it is seen.
SANITIZER=$(command -v compute-sanitizer || echo "$CUDA_HOME/bin/compute-sanitizer")
SANITIZED=("$PYTHON" -m pytest -q -x -p no:cacheprovider tests/ops/test_ops_cuda.py)

[ -n "$WHEELS" ] && part wheels 60 "$PYTHON" -m pip install --no-index --no-deps --no-compile --target "$SCRATCH/site" "$WHEELS"/*.whl
part build 240 env TORCH_CUDA_ARCH_LIST="${TORCH_CUDA_ARCH_LIST:-9.0}" "$PYTHON" setup.py build_ext --inplace
part doctor 30 "$PYTHON" -c 'from doodl_fast.cli.doctor import run; run()'
part tests 240 "$PYTHON" -m pytest -q -p no:cacheprovider "${WORKERS[@]}" "${STREAMED[@]}" "${SELECTED[@]}"
needs_gpu memcheck 60 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$SANITIZER" --tool memcheck --error-exitcode 9 \
  "${SANITIZED[@]}" -k "small and native and (update or fp32-fp16 or fp64-bf16)"
# The racecheck tool looks at shared memory, which only the sums of the latent update use.
needs_gpu racecheck 40 "$SANITIZER" --tool racecheck --error-exitcode 9 "${SANITIZED[@]}" -k "small_latent_update and native"
end_to_end optimize 60
end_to_end chains 150
[ -n "$REFERENCE" ] && part reference 240 "$PYTHON" bench/against_reference.py --reference "$REFERENCE" --device "$DEVICE" "${COMPARED[@]}"
end_to_end compile 240
end_to_end evaluation 90
end_to_end graphs 60
end_to_end replayed 240
end_to_end lean 150
end_to_end decode 30
needs_gpu launches 60 "$PYTHON" bench/launches.py
needs_gpu layers-replayed 60 "$PYTHON" bench/layers.py "${LAYERS[@]}" --op lean_norm --op lean_gated --op lean_quick_gelu --replayed
part layers-NCHW 130 "$PYTHON" bench/layers.py "${LAYERS[@]}" --layout contiguous
part layers-NHWC 70 "$PYTHON" bench/layers.py "${LAYERS[@]}" --op group_norm_silu --op lean_norm --layout channels_last
part ops 180 "$PYTHON" bench/ops.py --device="$DEVICE" "${SIZES[@]}" --json="$OUT/ops.json" --table="$SCRATCH/ops.md"
echo "$SECONDS s; see $OUT"
