#!/usr/bin/env bash
# Builds the C++ kernels with AddressSanitizer and UndefinedBehaviorSanitizer (GCC or Clang on Linux) into
# build/sanitize, and runs their tests against that build. Any report ends the run.
#   .ci/sanitize.sh [PYTHON] [tests or options of pytest...]
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-python3}
shift || true
[ $# -gt 0 ] || set -- tests/ops
out=build/sanitize
compiler=${CXX:-g++}
flags="-fsanitize=address,undefined -fno-sanitize=vptr -fno-sanitize-recover=all -fno-omit-frame-pointer -g1"
# Python itself is not built with the sanitizers, so their libraries have to be there before everything else. What
# Python never frees is no leak of ours.
preload="$("$compiler" -print-file-name=libasan.so) $("$compiler" -print-file-name=libubsan.so)"
export ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1

rm -rf "$out"
mkdir -p "$out"
CXXFLAGS="$flags" CFLAGS="$flags" LDFLAGS="$flags" DOODL_FAST_NO_CUDA=1 \
  "$python" setup.py -q build --build-base "$out" --build-lib "$out/lib"
grep -q '"cpu": "built"' "$out/lib/doodl_fast/_native_build.json" ||
  { echo "the kernels were not built:"; cat "$out/lib/doodl_fast/_native_build.json"; exit 1; } >&2
export PYTHONPATH="$PWD/$out/lib${PYTHONPATH:+:$PYTHONPATH}"

# Two controls: a fault that each sanitizer must find, so that their silence means something.
cat >"$out/faults.cpp" <<'CPP'
extern "C" int read_behind(int n) { int* p = new int[4](); int v = p[n]; delete[] p; return v; }
extern "C" int overflow(int n) { return n + 2147483647; }
CPP
"$compiler" $flags -shared -fPIC "$out/faults.cpp" -o "$out/faults.so"
for fault in read_behind:4:heap-buffer-overflow "overflow:4:signed integer overflow"; do
  IFS=: read -r name argument report <<<"$fault"
  code="import ctypes; ctypes.CDLL('$out/faults.so').$name($argument)"
  if LD_PRELOAD="$preload" "$python" -c "$code" >"$out/$name.log" 2>&1 || ! grep -q "$report" "$out/$name.log"; then
    echo "the sanitizers did not find a $report that was made on purpose:" >&2
    cat "$out/$name.log" >&2
    exit 1
  fi
done
echo "both sanitizers find the faults that were made on purpose"

cat >"$out/which.py" <<'PY'
import doodl_fast
from doodl_fast import ops

assert "build/sanitize" in doodl_fast.__file__, doodl_fast.__file__
assert ops.resolve("cpu") == "native", ops.why_not("native", "cpu")
PY
LD_PRELOAD="$preload" "$python" "$out/which.py"

# Only the tests of what is compiled: torch.compile runs none of it, and Triton is hidden, because its interpreter is
# slow. pytest is started as a program and not by -m, which would put the sources before the build.
echo 'raise ImportError("hidden by .ci/sanitize.sh")' >"$out/lib/triton.py"
LD_PRELOAD="$preload" "$(dirname "$python")/pytest" -q -p no:cacheprovider -n 0 -k "not triton and not compile" "$@"
