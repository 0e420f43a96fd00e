// The scalar maths of every op, included by the C++ and by the CUDA kernels: what CPU tests cover is what a GPU computes.
//
// Floating-point contract, the same in all backends (doodl_fast/ops/coupling_op.py states it for each op):
//   * arithmetic in T = double if any operand is double, else float; coefficients are rounded to T first;
//   * operations in the order written here; a multiplication is NEVER contracted with an addition into a fused
//     multiply-add. C++ is compiled with -ffp-contract=off, CUDA with -fmad=false, Triton with enable_fp_fusion=False;
//   * no fast-math, no flushing of subnormals; every output is rounded once, to nearest even.
// Everything is in an anonymous namespace: this header is compiled for several instruction sets, and the linker must not
// pick one's function for another.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define DF_FN __host__ __device__ __forceinline__
#else
#define DF_FN inline __attribute__((always_inline))
#endif

namespace {

// Which operands a coupling has; a template argument, so that a kernel reads nothing that it does not need.
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

// eps from the network's output: u alone, or u (uncond) and v (cond) under guidance.
template <class T, Eps eps>
DF_FN T combine(T u, T v, T g) {
  if (eps == Eps::guided) {
    const T difference = v - u;
    const T pushed = g * difference;
    return u + pushed;
  }
  return u;
}

// a t + c s + b eps
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

// first <- a0 first + c0 second; second <- a1 second + c1 first. A zero coefficient leaves its term out, as 0 inf = NaN.
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

template <class T>
DF_FN void mix(T& t, T& s, const Mix<T>& m) {
  if (m.target_first)
    mix_pair(t, s, m);
  else
    mix_pair(s, t, m);
}

// The transpose of mix_pair, applied to the cotangents.
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

template <class T>
DF_FN void mix_transposed(T& gt, T& gs, const Mix<T>& m) {
  if (m.target_first)
    transpose_pair(gt, gs, m);
  else
    transpose_pair(gs, gt, m);
}

// eps's cotangent: q alone, or both halves of a guided batch.
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

// The momentum step of one latent; `gradient` is scaled by the rate, and tied, already.
template <class T>
DF_FN T descend(T z, T& m, T gradient, T noise, const Momentum<T>& k) {
  gradient = gradient < -k.clip ? -k.clip : (gradient > k.clip ? k.clip : gradient);  // NaN stays NaN
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

// Conversions between storage and arithmetic, on bits, so that they are the same everywhere

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

// double -> float, rounded to odd: a rounding to fp16 or bf16 after it is then the only one that counts
// (Boldo and Melquiond, IEEE Trans. Comput. 57(4), 2008).
DF_FN float odd_float(double value) {
  const float nearest = float(value);
  const double back = nearest;
  const double size = back < 0 ? -back : back, wanted = value < 0 ? -value : value;
  uint32_t bits = bits_of(nearest);
  bits -= size > wanted ? 1u : 0u;  // towards zero, whatever the sign
  bits |= back != value ? 1u : 0u;
  return float_of(bits);
}

}  // namespace
