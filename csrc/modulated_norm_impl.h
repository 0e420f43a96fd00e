// LayerNorm or RMSNorm of rows, with a modulation after it, and the gradient of its input.
//
// For floats the operations are those of PyTorch's own kernels on x86-64 (native_layer_norm and its gradient, mul, add),
// in the same order and with the same fused multiply-adds. A row is read several times, from the cache.
#pragma once

#include "group_norm_impl.h"

namespace {

using doodl_fast::ModulatedNormCall;

// Returns the inverse deviation as PyTorch's LayerNorm computes it, in the dtype of the arithmetic.
template <class T>
DF_FN T norm_rstd(T variance, double eps) {
  return T(1) / root((variance > 0 ? variance : T(0)) + T(eps));
}

// The vectors of a row's channels: what the norm is multiplied by and what is added, before and in the modulation.
template <class T>
struct RowVectors {
  const T *weight, *bias, *scale, *shift;
  RowVectors(const ModulatedNormCall& call, int64_t row) {
    const int64_t first = row / call.tokens * call.channels;  // of the sample
    weight = static_cast<const T*>(call.weight), bias = static_cast<const T*>(call.bias);
    scale = call.scale ? static_cast<const T*>(call.scale) + first : nullptr;
    shift = call.shift ? static_cast<const T*>(call.shift) + first : nullptr;
  }
};

template <class S, bool modulated>
void modulated_norm_rows(const ModulatedNormCall& call, int64_t begin, int64_t end) {
  using T = typename Memory<S>::T;
  const int64_t channels = call.channels;
  for (int64_t row = begin; row < end; ++row) {
    const S* const x = static_cast<const S*>(call.x) + row * channels;
    S* const y = static_cast<S*>(call.y) + row * channels;
    const RowVectors<T> by(call, row);
    T mean = 0, variance = 0;
    if (call.mean) {
      group_moments<S, T>(x, channels, mean, variance);
      static_cast<T*>(call.mean)[row] = mean;
    } else {
      Short<T> squares{};
      by_vectors<T>(channels, [&](int64_t at, int64_t n) {
        const Lanes<T> value = load<S>(x + at, n);
        accumulate<T>(squares, value * value);
      });
      variance = total(squares) / T(channels);
    }
    const T rstd = norm_rstd(variance, call.eps);
    static_cast<T*>(call.rstd)[row] = rstd;
    by_vectors<T>(channels, [&](int64_t at, int64_t n) {
      Lanes<T> z = (load<S>(x + at, n) - mean) * rstd;
      if (by.weight && by.bias)
        z = madd(z, load<T>(by.weight + at, n), load<T>(by.bias + at, n));
      else if (by.weight)
        z = z * load<T>(by.weight + at, n);
      else if (by.bias)
        z = z + load<T>(by.bias + at, n);
      if (modulated) {
        if (by.scale) z = z * (1 + load<T>(by.scale + at, n));
        if (by.shift) z = z + load<T>(by.shift + at, n);
      }
      store<S>(y + at, z, n);
    });
  }
}

// Returns the gradient of the norm's result for some channels of a row.
template <class S, class T, bool modulated>
DF_FN Lanes<T> modulated_gradient(const S* grad_y, const RowVectors<T>& by, int64_t at, int64_t n) {
  const Lanes<T> grad = load<S>(grad_y + at, n);
  return modulated && by.scale ? grad * (1 + load<T>(by.scale + at, n)) : grad;
}

template <class S, bool modulated>
void modulated_norm_backward_rows(const ModulatedNormCall& call, int64_t begin, int64_t end) {
  using T = typename Memory<S>::T;
  const int64_t channels = call.channels;
  for (int64_t row = begin; row < end; ++row) {
    const S* const x = static_cast<const S*>(call.x) + row * channels;
    const S* const grad_y = static_cast<const S*>(call.grad_y) + row * channels;
    S* const grad_x = static_cast<S*>(call.grad_x) + row * channels;
    const RowVectors<T> by(call, row);
    const T mean = call.mean ? static_cast<const T*>(call.mean)[row] : T(0);
    const T rstd = static_cast<const T*>(call.rstd)[row];
    Short<T> sums{}, products{};
    by_vectors<T>(channels, [&](int64_t at, int64_t n) {
      Lanes<T> grad = modulated_gradient<S, T, modulated>(grad_y, by, at, n), product = grad * load<S>(x + at, n);
      if (by.weight) {
        const Lanes<T> weight = load<T>(by.weight + at, n);
        grad = grad * weight, product = product * weight;
      }
      accumulate<T>(sums, grad);
      accumulate<T>(products, product);
    });
    const T sum = call.mean ? total(sums) : T(0), product = total(products), part = T(1) / T(channels);
    const T by_x = madd(sum, mean, -product) * rstd * rstd * rstd * part;
    const T added = madd(-by_x, mean, -(sum * rstd * part));
    by_vectors<T>(channels, [&](int64_t at, int64_t n) {
      Lanes<T> grad = rstd * modulated_gradient<S, T, modulated>(grad_y, by, at, n);
      if (by.weight) grad = grad * load<T>(by.weight + at, n);
      store<S>(grad_x + at, madd(broadcast<T>(by_x), load<S>(x + at, n), grad) + added, n);
    });
  }
}

void modulated_norm(const ModulatedNormCall& call, int64_t begin, int64_t end) {
  with_elements(call.dtype, [&](auto element) {
    using S = decltype(element);
    (call.scale || call.shift ? modulated_norm_rows<S, true> : modulated_norm_rows<S, false>)(call, begin, end);
  });
}

void modulated_norm_backward(const ModulatedNormCall& call, int64_t begin, int64_t end) {
  with_elements(call.dtype, [&](auto element) {
    using S = decltype(element);
    (call.scale ? modulated_norm_backward_rows<S, true> : modulated_norm_backward_rows<S, false>)(call, begin, end);
  });
}

}  // namespace
