// The arithmetic of one element of the couplings on a lattice of integers. The C++ and the CUDA kernels include it. The
// order of the operations is stated in doodl_fast/ops/lattice_coupling_op.py and lattice_mix_op.py. The rules for
// floating point are those of scalar.h, and all floating-point arithmetic is in double.
#pragma once

#include "cpu_kernels.h"
#include "scalar.h"

namespace {

// One coupling of the mixing: n <- n by / over, exactly, with the remainder in the buffer, and n <- n + rint(c other).
// It is undone in the opposite order.
struct LatticeStage {
  uint32_t by = 1, over = 1;
  double c = 0;
};

// A call of lattice_coupling or, with `mixes`, of lattice_mix, on flat memory. The words of a buffer have 31 bits each;
// the lowest comes first, and those of one element are n places apart. faults: two integers, which become 1 if an
// element is out of range, and if eps is not finite.
struct LatticeCall {
  void *out = nullptr, *out_source = nullptr;
  int32_t *out_words = nullptr, *out_source_words = nullptr;
  const void *target = nullptr, *source = nullptr;
  const int32_t *words = nullptr, *source_words = nullptr;
  doodl_fast::In eps;
  int32_t* faults = nullptr;
  bool wide = false, mixes = false, guided = false, undo = false, target_first = true;
  double c = 0, b = 0, g = 0;
  LatticeStage first, second;
  int64_t n = 0;
  int num_words = 0;
};

struct LatticeFaults {
  bool outside = false, infinite = false;
};

#if defined(__CUDACC__)
#define DF_ROLLED _Pragma("unroll 1")
#else
#define DF_ROLLED
#endif

constexpr int WORD_BITS = 31;
constexpr int64_t LARGEST_FACTOR = 10000;            // It is below 2^14, as `scaled` needs.
constexpr double LARGEST_MOVE = 2251799813685248.0;  // This is 2^51.
constexpr double ROUNDER = 6755399441055744.0;       // This is 1.5 2^52, whose unit in the last place is 1.

// The largest |n|. In int64 it is 2^49, so that n, and its sum with the largest move, are exact as doubles.
template <class S>
DF_FN constexpr int64_t lattice_limit() {
  return sizeof(S) == 4 ? int64_t(2147483647) : int64_t(1) << 49;
}

DF_FN int64_t double_bits(double value) {
  int64_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

// Returns n if it is good and in range, else 0, and notes a fault. What is computed after a fault is never used, but it
// must not overflow.
DF_FN int64_t within(int64_t n, int64_t limit, bool good, LatticeFaults& faults) {
  good = good && n <= limit && n >= -limit;
  faults.outside = faults.outside || !good;
  return good ? n : 0;
}

// Returns n + rint(v), or minus with `undo`; ties go to even. A double that is out of range is not converted to an
// integer, which would be undefined behaviour.
DF_FN int64_t moved(int64_t n, double v, bool undo, int64_t limit, LatticeFaults& faults) {
  const bool good = v < LARGEST_MOVE && v > -LARGEST_MOVE;  // This is false for NaN.
  const double rounded = (good ? v : 0.0) + ROUNDER;
  const int64_t step = double_bits(rounded) - double_bits(ROUNDER);
  return within(undo ? n - step : n + step, limit, good, faults);
}

// Returns floor(n / over), and the remainder in `rest`. It divides 16 bits at a time, so that all divisions are of 32
// bits: a GPU has no wider ones, and the subroutine that stands in for them needs a stack.
template <class S>
DF_FN int64_t divided(int64_t n, uint32_t over, uint32_t& rest) {
  const uint64_t size = uint64_t(n < 0 ? ~n : n);
  uint64_t quotient = 0;
  rest = 0;
  for (int shift = sizeof(S) == 4 ? 16 : 48; shift >= 0; shift -= 16) {
    const uint32_t part = (rest << 16) | (uint32_t(size >> shift) & 0xffffu);
    const uint32_t digit = part / over;
    quotient = (quotient << 16) | digit;
    rest = part - digit * over;
  }
  if (n < 0) rest = over - 1 - rest;
  return n < 0 ? ~int64_t(quotient) : int64_t(quotient);
}

// Returns n by / over: rest = buffer mod by; buffer /= by; n, carry = divmod(n by + rest, over); buffer = buffer over +
// carry. `in` and `out` point to the lowest word of an element; the next ones are `stride` places apart each. `out`
// holds the quotients of the first loop until the second one reads them.
template <class S>
DF_FN int64_t scaled(int64_t n, const int32_t* in, int32_t* out, int64_t stride, int num_words, uint32_t by,
                     uint32_t over) {
  uint32_t rest = 0;
  DF_ROLLED
  for (int w = num_words - 1; w >= 0; --w) {
    const uint32_t word = uint32_t(in[w * stride]);
    const uint32_t high = (rest << 15) | (word >> 16), first = high / by;
    const uint32_t low = ((high - first * by) << 16) | (word & 0xffffu), second = low / by;
    out[w * stride] = int32_t((first << 16) | second);
    rest = low - second * by;
  }
  uint32_t left;
  const int64_t whole = divided<S>(n, over, left);
  const uint32_t extra = left * by + rest, more = extra / over;
  uint32_t carry = extra - more * over;
  DF_ROLLED
  for (int w = 0; w < num_words; ++w) {
    const uint64_t part = uint64_t(uint32_t(out[w * stride])) * over + carry;
    out[w * stride] = int32_t(part & 0x7fffffffu);
    carry = uint32_t(part >> WORD_BITS);
  }
  return whole * int64_t(by) + more;
}

// Returns n after one coupling of the mixing, or with `undo` before it.
template <class S>
DF_FN int64_t mixed(int64_t n, int64_t other, const LatticeStage& k, const LatticeCall& call, const int32_t* in,
                    int32_t* out, LatticeFaults& faults) {
  const double v = k.c * double(other);
  if (call.undo) {
    n = moved(n, v, true, lattice_limit<S>(), faults);
    return within(scaled<S>(n, in, out, call.n, call.num_words, k.by, k.over), lattice_limit<S>(), true, faults);
  }
  return moved(scaled<S>(n, in, out, call.n, call.num_words, k.by, k.over), v, false, lattice_limit<S>(), faults);
}

// Computes element i of a call. u and v: what the network returned for it.
template <class S, Eps eps, bool mixes>
DF_FN void lattice_element(const LatticeCall& call, int64_t i, double u, double v, LatticeFaults& faults) {
  int64_t t = static_cast<const S*>(call.target)[i], s = static_cast<const S*>(call.source)[i];
  double move = call.c * double(s);
  if (eps != Eps::none) {
    const double e = combine<double, eps>(u, v, call.g);
    faults.infinite = faults.infinite || !(e - e == 0);
    const double term = call.b * e;
    move = move + term;
  }
  t = moved(t, move, call.undo, lattice_limit<S>(), faults);
  if (mixes) {
    const int32_t *in_t = call.words + i, *in_s = call.source_words + i;
    int32_t *out_t = call.out_words + i, *out_s = call.out_source_words + i;
    if (call.target_first) {
      t = mixed<S>(t, s, call.first, call, in_t, out_t, faults);
      s = mixed<S>(s, t, call.second, call, in_s, out_s, faults);
    } else {
      s = mixed<S>(s, t, call.first, call, in_s, out_s, faults);
      t = mixed<S>(t, s, call.second, call, in_t, out_t, faults);
    }
    static_cast<S*>(call.out_source)[i] = S(s);
  }
  static_cast<S*>(call.out)[i] = S(t);
}

}  // namespace
