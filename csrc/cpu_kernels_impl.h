// The CPU kernels, for the instruction set that the including file has chosen. Blocks of operands are converted to the
// dtype of the arithmetic in small arrays (an operand that has that dtype is not copied), and plain loops, which the
// compiler vectorises, run over them.
#pragma once

#include "cpu_kernels.h"
#include "scalar.h"

#if defined(DF_AVX2)
#include <immintrin.h>
#endif

namespace {

using doodl_fast::CouplingCall;
using doodl_fast::Dtype;
using doodl_fast::In;
using doodl_fast::Out;
using doodl_fast::UpdateCall;
using doodl_fast::VjpCall;

constexpr int64_t BLOCK = 512;  // Six operands of doubles take 24 KiB, which fits into the first-level cache.

template <class T>
constexpr Dtype dtype_of() {
  return sizeof(T) == 8 ? Dtype::f64 : Dtype::f32;
}

// Conversions of blocks between fp16 and float

void halves_to_floats(const uint16_t* from, float* to, int64_t n) {
  int64_t i = 0;
#if defined(DF_AVX2)
  for (; i + 8 <= n; i += 8)
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
#endif
  for (; i < n; ++i) to[i] = from_half(from[i]);
}

void floats_to_halves(const float* from, uint16_t* to, int64_t n) {
  int64_t i = 0;
#if defined(DF_AVX2)
  for (; i + 8 <= n; i += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i),
                     _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#endif
  for (; i < n; ++i) to[i] = to_half(from[i]);
}

// Reading and writing blocks. A block that is read is returned in place if it has the dtype of the arithmetic.

const float* load(const In& in, int64_t at, int64_t n, float* scratch) {
  if (in.dtype == Dtype::f32) return static_cast<const float*>(in.data) + at;
  const uint16_t* from = static_cast<const uint16_t*>(in.data) + at;
  if (in.dtype == Dtype::f16) {
    halves_to_floats(from, scratch, n);
  } else {
    for (int64_t i = 0; i < n; ++i) scratch[i] = from_bf16(from[i]);
  }
  return scratch;
}

const double* load(const In& in, int64_t at, int64_t n, double* scratch) {
  if (in.dtype == Dtype::f64) return static_cast<const double*>(in.data) + at;
  float narrow[BLOCK];
  const float* from = load(in, at, n, narrow);
  for (int64_t i = 0; i < n; ++i) scratch[i] = from[i];
  return scratch;
}

// Where the results of a block are computed: in the output itself if it has the dtype of the arithmetic.
template <class T>
T* place(const Out& out, int64_t at, T* scratch) {
  return out.dtype == dtype_of<T>() ? static_cast<T*>(out.data) + at : scratch;
}

// Rounds a block of results to the output, unless `place` has put it there.
void finish(const Out& out, int64_t at, int64_t n, const float* block) {
  if (out.dtype == Dtype::f32) return;
  uint16_t* to = static_cast<uint16_t*>(out.data) + at;
  if (out.dtype == Dtype::f16) {
    floats_to_halves(block, to, n);
  } else {
    for (int64_t i = 0; i < n; ++i) to[i] = to_bf16(block[i]);
  }
}

void finish(const Out& out, int64_t at, int64_t n, const double* block) {
  if (out.dtype == Dtype::f64) return;
  if (out.dtype == Dtype::f32) {
    float* to = static_cast<float*>(out.data) + at;
    for (int64_t i = 0; i < n; ++i) to[i] = float(block[i]);
    return;
  }
  float narrow[BLOCK];
  for (int64_t i = 0; i < n; ++i) narrow[i] = odd_float(block[i]);
  finish(out, at, n, narrow);
}

// Coupling, with and without the mixing

template <class T, bool source, Eps eps>
void couple_block(T* __restrict out, const T* __restrict t, const T* __restrict s, const T* __restrict u,
                  const T* __restrict v, const Coefficients<T>& given, int64_t n) {
  const Coefficients<T> k = given;
  for (int64_t i = 0; i < n; ++i)
    out[i] = couple<T, source, eps>(t[i], source ? s[i] : T(0), eps != Eps::none ? u[i] : T(0),
                                    eps == Eps::guided ? v[i] : T(0), k);
}

template <class T, bool source, Eps eps, bool target_first>
void couple_mix_block(T* __restrict out_t, T* __restrict out_s, const T* __restrict t, const T* __restrict s,
                      const T* __restrict u, const T* __restrict v, const Coefficients<T>& given,
                      const Mix<T>& mixing, int64_t n) {
  const Coefficients<T> k = given;
  Mix<T> m = mixing;
  m.target_first = target_first;
  for (int64_t i = 0; i < n; ++i) {
    T first = couple<T, source, eps>(t[i], s[i], eps != Eps::none ? u[i] : T(0), eps == Eps::guided ? v[i] : T(0), k);
    T other = s[i];
    mix(first, other, m);
    out_t[i] = first;
    out_s[i] = other;
  }
}

template <class T, bool source, Eps eps>
void run_coupling(const CouplingCall& call, int64_t begin, int64_t end) {
  alignas(64) T t_[BLOCK], s_[BLOCK], u_[BLOCK], v_[BLOCK], out_[BLOCK], other_[BLOCK];
  const Coefficients<T> k{T(call.a), T(call.c), T(call.b), T(call.g)};
  const Mix<T> m{call.target_first, T(call.a0), T(call.c0), T(call.a1), T(call.c1)};
  for (int64_t at = begin; at < end; at += BLOCK) {
    const int64_t n = end - at < BLOCK ? end - at : BLOCK;
    const T* t = load(call.target, at, n, t_);
    const T* s = source || call.mixes ? load(call.source, at, n, s_) : nullptr;
    const T* u = eps != Eps::none ? load(call.eps, at, n, u_) : nullptr;
    const T* v = eps == Eps::guided ? load(call.eps, call.n + at, n, v_) : nullptr;
    T* out = place(call.out, at, out_);
    if (call.mixes) {
      T* other = place(call.out_source, at, other_);
      (m.target_first ? couple_mix_block<T, source, eps, true> : couple_mix_block<T, source, eps, false>)(
          out, other, t, s, u, v, k, m, n);
      finish(call.out_source, at, n, other);
    } else {
      couple_block<T, source, eps>(out, t, s, u, v, k, n);
    }
    finish(call.out, at, n, out);
  }
}

template <class T, bool source>
void run_coupling_eps(const CouplingCall& call, int64_t begin, int64_t end) {
  if (!call.eps.data) return run_coupling<T, source, Eps::none>(call, begin, end);
  if (call.guided) return run_coupling<T, source, Eps::guided>(call, begin, end);
  return run_coupling<T, source, Eps::plain>(call, begin, end);
}

template <class T>
void run_coupling_source(const CouplingCall& call, int64_t begin, int64_t end) {
  if (call.source.data && call.c != 0) return run_coupling_eps<T, true>(call, begin, end);
  return run_coupling_eps<T, false>(call, begin, end);
}

void coupling(const CouplingCall& call, int64_t begin, int64_t end) {
  const bool wide = call.target.dtype == Dtype::f64 || (call.eps.data && call.eps.dtype == Dtype::f64);
  wide ? run_coupling_source<double>(call, begin, end) : run_coupling_source<float>(call, begin, end);
}

// Vector-Jacobian products

template <class T>
void scaled_block(T* __restrict out, const T* __restrict from, T factor, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = factor * from[i];
}

// Computes the cotangents of target and source. gt gets the cotangent of the result of the coupling alone, from which
// the cotangent of eps is computed.
template <class T, bool target_first>
void transpose_block(T* __restrict gt, const T* __restrict from_t, const T* __restrict from_s, const Mix<T>& given, T a,
                     T c, T* __restrict out_t, T* __restrict out_s, int64_t n) {
  Mix<T> m = given;
  m.target_first = target_first;
  for (int64_t i = 0; i < n; ++i) {
    T first = from_t[i], other = from_s[i];
    mix_transposed(first, other, m);
    gt[i] = first;
    if (c != 0) {
      const T term = c * first;
      other = other + term;
    }
    out_s[i] = other;
    out_t[i] = a * first;
  }
}

template <class T, Eps eps>
void eps_block(T* __restrict u, T* __restrict v, const T* __restrict gt, T scale, const Coefficients<T>& given,
               int64_t n) {
  const Coefficients<T> k = given;
  for (int64_t i = 0; i < n; ++i) {
    T to_u, to_v = 0;
    eps_cotangent<T, eps>(gt[i], scale, k, to_u, to_v);
    u[i] = to_u;
    if (eps == Eps::guided) v[i] = to_v;
  }
}

template <class T>
void run_vjp(const VjpCall& call, int64_t begin, int64_t end) {
  alignas(64) T t_[BLOCK], s_[BLOCK], g_[BLOCK], u_[BLOCK], v_[BLOCK], out_[BLOCK], other_[BLOCK];
  const Coefficients<T> k{T(call.a), T(call.c), T(call.b), T(call.g)};
  const Mix<T> m{call.target_first, T(call.a0), T(call.c0), T(call.a1), T(call.c1)};
  for (int64_t at = begin; at < end; at += BLOCK) {
    const int64_t n = end - at < BLOCK ? end - at : BLOCK;
    const T* gt = load(call.grad, at, n, t_);
    T* out = place(call.out, at, out_);
    T* other = call.out_source.data ? place(call.out_source, at, other_) : nullptr;
    if (call.mixes) {
      const T* gs = load(call.grad_source, at, n, s_);
      (m.target_first ? transpose_block<T, true> : transpose_block<T, false>)(g_, gt, gs, m, k.a, k.c, out, other, n);
      gt = g_;
    } else {
      scaled_block(out, gt, k.a, n);
      if (other) scaled_block(other, gt, k.c, n);
    }
    if (call.out_eps.data) {
      T* u = place(call.out_eps, at, u_);
      T* v = call.guided ? place(call.out_eps, call.n + at, v_) : nullptr;
      if (call.guided) {
        eps_block<T, Eps::guided>(u, v, gt, T(call.scale), k, n);
        finish(call.out_eps, call.n + at, n, v);
      } else {
        eps_block<T, Eps::plain>(u, v, gt, T(call.scale), k, n);
      }
      finish(call.out_eps, at, n, u);
    }
    finish(call.out, at, n, out);
    if (other) finish(call.out_source, at, n, other);
  }
}

void vjp(const VjpCall& call, int64_t begin, int64_t end) {
  const bool wide = call.grad.dtype == Dtype::f64 || (call.out_eps.data && call.out_eps.dtype == Dtype::f64);
  wide ? run_vjp<double>(call, begin, end) : run_vjp<float>(call, begin, end);
}

// The latent update

template <class T>
double sum_of_squares(const T* values, int64_t n) {
  constexpr int LANES = 8;  // These partial sums fit vector registers and are added in a fixed order.
  double sums[LANES] = {};
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES)
    for (int lane = 0; lane < LANES; ++lane) {
      const double value = values[i + lane];
      sums[lane] += value * value;
    }
  for (int lane = 0; i < n; ++i, ++lane) {
    const double value = values[i];
    sums[lane] += value * value;
  }
  return ((sums[0] + sums[4]) + (sums[2] + sums[6])) + ((sums[1] + sums[5]) + (sums[3] + sums[7]));
}

template <class T, bool nesterov, bool tied, bool noisy>
void update_block(T* __restrict x, T* __restrict y, T* __restrict mx, T* __restrict my, const T* __restrict in_x,
                  const T* __restrict in_y, const T* __restrict in_mx, const T* __restrict in_my,
                  const T* __restrict gx, const T* __restrict gy, const T* __restrict noise, const Momentum<T>& given,
                  int64_t n) {
  Momentum<T> k = given;
  k.nesterov = nesterov;
  k.tied = tied;
  k.noisy = noisy;
  for (int64_t i = 0; i < n; ++i) {
    T new_x = in_x[i], new_y = in_y[i], new_mx = in_mx[i], new_my = in_my[i];
    update(new_x, new_y, new_mx, new_my, gx[i], gy[i], noisy ? noise[i] : T(0), k);
    x[i] = new_x;
    y[i] = new_y;
    mx[i] = new_mx;
    my[i] = new_my;
  }
}

template <class T>
void run_update(const UpdateCall& call, int64_t begin, int64_t end, double* square_x, double* square_y) {
  const Momentum<T> k{T(call.rate), T(call.clip), T(call.momentum), T(call.sigma), call.nesterov, call.tied,
                      call.noise != nullptr};
  const auto in = [](const void* data, int64_t at) { return static_cast<const T*>(data) + at; };
  const auto out = [](void* data, int64_t at) { return static_cast<T*>(data) + at; };
  using Block = void (*)(T*, T*, T*, T*, const T*, const T*, const T*, const T*, const T*, const T*, const T*,
                         const Momentum<T>&, int64_t);
  static constexpr Block blocks[8] = {
      update_block<T, false, false, false>, update_block<T, false, false, true>, update_block<T, false, true, false>,
      update_block<T, false, true, true>,   update_block<T, true, false, false>, update_block<T, true, false, true>,
      update_block<T, true, true, false>,   update_block<T, true, true, true>};
  const Block block = blocks[4 * k.nesterov + 2 * k.tied + k.noisy];
  double sum_x = 0, sum_y = 0;
  for (int64_t at = begin; at < end; at += BLOCK) {
    const int64_t n = end - at < BLOCK ? end - at : BLOCK;
    block(out(call.x, at), out(call.y, at), out(call.mx, at), out(call.my, at), in(call.in_x, at), in(call.in_y, at),
          in(call.in_mx, at), in(call.in_my, at), in(call.gx, at), in(call.gy, at),
          call.noise ? in(call.noise, at) : nullptr, k, n);
    if (square_x) {  // The block is still in the cache.
      sum_x += sum_of_squares(in(call.x, at), n);
      sum_y += sum_of_squares(in(call.y, at), n);
    }
  }
  if (square_x) {
    *square_x = sum_x;
    *square_y = sum_y;
  }
}

void update_range(const UpdateCall& call, int64_t begin, int64_t end, double* square_x, double* square_y) {
  call.is_double ? run_update<double>(call, begin, end, square_x, square_y)
                 : run_update<float>(call, begin, end, square_x, square_y);
}

template <class T>
void run_scale(const UpdateCall& call, T factor_x, T factor_y, int64_t begin, int64_t end) {
  T *const x = static_cast<T*>(call.x), *const y = static_cast<T*>(call.y);
  for (int64_t i = begin; i < end; ++i) x[i] *= factor_x;
  for (int64_t i = begin; i < end; ++i) y[i] *= factor_y;
}

void scale_range(const UpdateCall& call, double factor_x, double factor_y, int64_t begin, int64_t end) {
  call.is_double ? run_scale<double>(call, factor_x, factor_y, begin, end)
                 : run_scale<float>(call, float(factor_x), float(factor_y), begin, end);
}

}  // namespace
