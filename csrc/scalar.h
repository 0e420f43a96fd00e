// The arithmetic of one element of every floating-point op. The C++ and the CUDA kernels include it, so that what the
// tests on a CPU cover is what a GPU computes.
//
// The rules for floating point are the same in all backends (the files in doodl_fast/ops/ state them for each op):
//   * The arithmetic is done in T, which is double if any operand is double, else float. Coefficients are first rounded
//     to T.
//   * The operations have the order written here. A multiplication is NEVER contracted with an addition into a fused
//     multiply-add: C++ is compiled with -ffp-contract=off, CUDA with -fmad=false, Triton with enable_fp_fusion=False.
//   * Fast-math and the flushing of subnormals are off. Every output is rounded once, to nearest even.
// Everything is in an anonymous namespace, because this header is compiled for several instruction sets, and the linker
// must not use a function of one of them for another.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define DF_FN __host__ __device__ __forceinline__
#else
#define DF_FN inline __attribute__((always_inline))
#endif

namespace {

// Whether a coupling has eps, and whether it is guided. It is a template argument, so that a kernel does not read what
// it does not need.
enum class Eps : int { none, plain, guided };

template <class T>
struct Coefficients {
  T a, c, b, g;
};

template <class T>
struct Mix {
  bool target_first;
  T a0, c0, a1, c1;
};

template <class T>
struct Momentum {
  T rate, clip, momentum, sigma;
  bool nesterov, tied, noisy;
};

// Returns eps from the network's output: from u alone, or under guidance from u (uncond) and v (cond).
template <class T, Eps eps>
DF_FN T combine(T u, T v, T g) {
  if (eps == Eps::guided) {
    const T difference = v - u;
    const T pushed = g * difference;
    return u + pushed;
  }
  return u;
}

// Returns a t + c s + b eps.
template <class T, bool source, Eps eps>
DF_FN T couple(T t, T s, T u, T v, const Coefficients<T>& k) {
  T r = k.a * t;
  if (source) {
    const T term = k.c * s;
    r = r + term;
  }
  if (eps != Eps::none) {
    const T term = k.b * combine<T, eps>(u, v, k.g);
    r = r + term;
  }
  return r;
}

// Computes first <- a0 first + c0 second, second <- a1 second + c1 first. A term with a zero coefficient is left out,
// because 0 times infinity would be NaN.
template <class T>
DF_FN void mix_pair(T& first, T& second, const Mix<T>& m) {
  T f = m.a0 * first;
  if (m.c0 != 0) {
    const T term = m.c0 * second;
    f = f + term;
  }
  T o = m.a1 * second;
  if (m.c1 != 0) {
    const T term = m.c1 * f;
    o = o + term;
  }
  first = f;
  second = o;
}

// Computes the mixing of target and source in the order that m states.
template <class T>
DF_FN void mix(T& t, T& s, const Mix<T>& m) {
  if (m.target_first)
    mix_pair(t, s, m);
  else
    mix_pair(s, t, m);
}

// Applies the transpose of mix_pair to the cotangents.
template <class T>
DF_FN void transpose_pair(T& first, T& second, const Mix<T>& m) {
  T f = first;
  if (m.c1 != 0) {
    const T term = m.c1 * second;
    f = f + term;
  }
  T o = m.a1 * second;
  if (m.c0 != 0) {
    const T term = m.c0 * f;
    o = o + term;
  }
  first = m.a0 * f;
  second = o;
}

// Applies the transpose of the mixing to the cotangents of target and source.
template <class T>
DF_FN void mix_transposed(T& gt, T& gs, const Mix<T>& m) {
  if (m.target_first)
    transpose_pair(gt, gs, m);
  else
    transpose_pair(gs, gt, m);
}

// Computes the cotangent of eps: u alone, or u and v for the two halves of a guided batch.
template <class T, Eps eps>
DF_FN void eps_cotangent(T grad, T scale, const Coefficients<T>& k, T& u, T& v) {
  T q = k.b * grad;
  q = q * scale;
  if (eps == Eps::guided) {
    v = k.g * q;
    u = q - v;
  } else {
    u = q;
  }
}

// Returns a latent after a momentum step, and changes its momentum. `gradient` has been multiplied by the rate, and
// tied.
template <class T>
DF_FN T descend(T z, T& m, T gradient, T noise, const Momentum<T>& k) {
  gradient = gradient < -k.clip ? -k.clip : (gradient > k.clip ? k.clip : gradient);  // NaN stays NaN.
  const T kept = m * k.momentum;
  m = kept + gradient;
  T move = m;
  if (k.nesterov) {
    const T ahead = m * k.momentum;
    move = ahead + gradient;
  }
  z = z - move;
  if (k.noisy) {
    const T shift = noise * k.sigma;
    z = z + shift;
  }
  return z;
}

// Computes one update of a pair of latents and their momenta, without the scaling to start norms.
template <class T>
DF_FN void update(T& x, T& y, T& mx, T& my, T gx, T gy, T noise, const Momentum<T>& k) {
  gx = gx * k.rate;
  gy = gy * k.rate;
  if (k.tied) {
    const T sum = gx + gy;
    gx = sum * T(0.5);
    gy = gx;
  }
  x = descend(x, mx, gx, noise, k);
  y = descend(y, my, gy, noise, k);
  if (k.tied) {
    const T sum = x + y;
    x = sum * T(0.5);
    y = x;
  }
}

// Conversions between dtypes, which work on the bits, so that they are the same everywhere

DF_FN uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

DF_FN float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

DF_FN float from_bf16(uint16_t bits) { return float_of(uint32_t(bits) << 16); }

DF_FN uint16_t to_bf16(float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t nearest = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return uint16_t(value != value ? 0x7fc0u : nearest);
}

DF_FN float from_half(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000u) << 16, exponent = (h >> 10) & 31u, mantissa = h & 0x3ffu;
  if (exponent == 31u) return float_of(sign | 0x7f800000u | (mantissa << 13));
  if (exponent) return float_of(sign | ((exponent + 112u) << 23) | (mantissa << 13));
  const float size = float(mantissa) * 5.9604644775390625e-8f;  // The product with 2^-24 is exact.
  return sign ? -size : size;
}

DF_FN uint16_t to_half(float value) {
  const uint32_t bits = bits_of(value), sign = (bits >> 16) & 0x8000u, size = bits & 0x7fffffffu;
  if (size > 0x7f800000u) return uint16_t(sign | 0x7e00u);
  if (size >= 0x477ff000u) return uint16_t(sign | 0x7c00u);  // 65520 and above round to infinity.
  if (size >= 0x38800000u) {                                 // The result is normal.
    const uint32_t shifted = size - 0x38000000u;
    return uint16_t(sign | ((shifted + 0xfffu + ((shifted >> 13) & 1u)) >> 13));
  }
  // The result is subnormal: adding 0.5 makes the addition round to multiples of 2^-24, to nearest even.
  return uint16_t(sign | (bits_of(float_of(size) + 0.5f) - 0x3f000000u));
}

// Returns a double as a float, rounded to odd. If it is then rounded to fp16 or bf16, the result is as if there were
// that rounding alone (Boldo and Melquiond, IEEE Trans. Comput. 57(4), 2008).
DF_FN float odd_float(double value) {
  const float nearest = float(value);
  const double back = nearest;
  const double size = back < 0 ? -back : back, wanted = value < 0 ? -value : value;
  uint32_t bits = bits_of(nearest);
  bits -= size > wanted ? 1u : 0u;  // This goes towards zero for both signs.
  bits |= back != value ? 1u : 0u;
  return float_of(bits);
}

}  // namespace
