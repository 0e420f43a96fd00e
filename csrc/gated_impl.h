// The first half of each row times an activation of the second half, and the gradient of both halves.
//
// The operations are those of PyTorch's own kernels on x86-64 (gelu, silu, their gradients, mul), in the same order and with
// the same fused multiply-adds and the same roundings in between, so that the results have the same bits in float32,
// bfloat16 and float16. PyTorch's vectors have the error
// function of Abramowitz and Stegun, Handbook of Mathematical Functions, 7.1.26. The GELU of the hyperbolic tangent is
// written as x sigmoid(2 u), which is the same function, but has other bits than PyTorch's.
#pragma once

#include "group_norm_impl.h"

namespace {

using doodl_fast::Activation;
using doodl_fast::GatedCall;

DF_FN float error_function(float x) { return __builtin_erff(x); }
DF_FN double error_function(double x) { return __builtin_erf(x); }

DF_FN Doubles error_function(const Doubles& x) {
  Doubles y;
  for (int64_t i = 0; i < WIDTH<double>; ++i) y[i] = __builtin_erf(x[i]);
  return y;
}

#if defined(DF_FMA)
DF_FN Floats error_function(const Floats& x) {
  const Ints sign = Ints(x) & INT32_MIN;
  const Floats t = 1.0f / madd(broadcast(0.3275911f), Floats(Ints(x) ^ sign), broadcast(1.0f));
  Floats sum = madd(broadcast(1.061405429f), t, broadcast(-1.453152027f));
  sum = madd(sum, t, broadcast(1.421413741f));
  sum = madd(sum, t, broadcast(-0.284496736f));
  sum = madd(sum, t, broadcast(0.254829592f));
  return Floats(Ints(madd(-exponential(-(x * x)) * t, sum, broadcast(1.0f))) ^ sign);
}
#else
DF_FN Floats error_function(const Floats& x) {
  Floats y;
  for (int64_t i = 0; i < WIDTH<float>; ++i) y[i] = __builtin_erff(x[i]);
  return y;
}
#endif

// An activation of vectors, or of single numbers, V, in the arithmetic T of elements S: its value, and `grad` times its
// derivative.
template <class V, class T, class S>
struct Gelu {
  static constexpr T ROOT_HALF = T(0.70710678118654752440), DENSITY = T(0.39894228040143267794);
  const V x, twice;  // twice: two times the share of the normal distribution below x
  DF_FN explicit Gelu(const V& gate) : x(gate), twice(T(1) + error_function(gate * ROOT_HALF)) {}
  DF_FN V value() const { return x * T(0.5) * twice; }
  DF_FN V gradient(const V& grad) const {
    const V density = DENSITY * exponential(x * x * T(-0.5));
    const V share = T(0.5) * twice;
    constexpr bool fused = sizeof(V) > sizeof(T) && sizeof(S) == sizeof(T);  // So it is in PyTorch's own binary.
    return grad * (fused ? madd(x, density, share) : x * density + share);
  }
};

template <class V, class T, class S>
struct GeluTanh {
  static constexpr T SLOPE = T(1.59576912160573071176), CUBIC = T(0.044715);  // SLOPE: sqrt(8 / pi)
  const V x, square, sigmoid;
  DF_FN explicit GeluTanh(const V& gate)
      : x(gate), square(gate * gate), sigmoid(1 / (1 + exponential(-SLOPE * gate * (1 + CUBIC * square)))) {}
  DF_FN V value() const { return x * sigmoid; }
  DF_FN V gradient(const V& grad) const {
    return grad * (sigmoid + x * sigmoid * (1 - sigmoid) * SLOPE * (1 + 3 * CUBIC * square));
  }
};

template <class V, class T, class S>
struct Silu {
  const V x;
  DF_FN explicit Silu(const V& gate) : x(gate) {}
  DF_FN V value() const { return silu_of(x); }
  DF_FN V gradient(const V& grad) const { return silu_gradient(grad, x); }
};

// Calls work(i) for the elements of a row, which are [begin, end) of a tensor of halves, that PyTorch computes with the C
// library: those after the last multiple of tail_step in each of its threads' ranges, which have `range` elements.
template <class F>
DF_FN void for_row_tails(const GatedCall& call, int64_t range, int64_t begin, int64_t end, const F& work) {
  for (int64_t first = begin, stop; first < end; first = stop) {
    stop = (first / range + 1) * range < end ? (first / range + 1) * range : end;
    for (int64_t i = stop - (stop - first) % call.tail_step; i < stop; ++i) work(i);
  }
}

// In these, `first` is where a row begins in a tensor of halves; in x it begins at 2 first.

template <class S, template <class, class, class> class Act>
void gated_rows(const GatedCall& call, int64_t begin, int64_t end) {
  using T = typename Memory<S>::T;
  for (int64_t first = begin * call.half; first < end * call.half; first += call.half) {
    const S *const hidden = static_cast<const S*>(call.x) + 2 * first, *const gate = hidden + call.half;
    S* const y = static_cast<S*>(call.y) + first;
    by_vectors<T>(call.half, [&](int64_t at, int64_t n) {
      const Lanes<T> value = Act<Lanes<T>, T, S>(load<S>(gate + at, n)).value();
      store<S>(y + at, load<S>(hidden + at, n) * rounded<S>(value), n);
    });
    for_row_tails(call, call.value_range, first, first + call.half, [&](int64_t i) {
      i -= first;
      const T value = Act<T, T, S>(Memory<S>::get(gate + i)).value();
      Memory<S>::put(y + i, Memory<S>::get(hidden + i) * rounded<S>(value));
    });
  }
}

template <class S, template <class, class, class> class Act>
void gated_backward_rows(const GatedCall& call, int64_t begin, int64_t end) {
  using T = typename Memory<S>::T;
  for (int64_t first = begin * call.half; first < end * call.half; first += call.half) {
    const S *const hidden = static_cast<const S*>(call.x) + 2 * first, *const gate = hidden + call.half;
    const S* const grad_y = static_cast<const S*>(call.grad_y) + first;
    S *const of_hidden = static_cast<S*>(call.grad_x) + 2 * first, *const of_gate = of_hidden + call.half;
    by_vectors<T>(call.half, [&](int64_t at, int64_t n) {
      const Lanes<T> grad = load<S>(grad_y + at, n), factor = load<S>(hidden + at, n);
      const Act<Lanes<T>, T, S> act(load<S>(gate + at, n));
      store<S>(of_hidden + at, grad * rounded<S>(act.value()), n);
      store<S>(of_gate + at, act.gradient(rounded<S>(grad * factor)), n);
    });
    for_row_tails(call, call.value_range, first, first + call.half, [&](int64_t i) {
      i -= first;
      const T value = Act<T, T, S>(Memory<S>::get(gate + i)).value();
      Memory<S>::put(of_hidden + i, Memory<S>::get(grad_y + i) * rounded<S>(value));
    });
    for_row_tails(call, call.gradient_range, first, first + call.half, [&](int64_t i) {
      i -= first;
      const T grad = rounded<S>(Memory<S>::get(grad_y + i) * Memory<S>::get(hidden + i));
      Memory<S>::put(of_gate + i, Act<T, T, S>(Memory<S>::get(gate + i)).gradient(grad));
    });
  }
}

void gated(const GatedCall& call, int64_t begin, int64_t end) {
  with_elements(call.dtype, [&](auto element) {
    using S = decltype(element);
    if (call.activation == Activation::gelu) return gated_rows<S, Gelu>(call, begin, end);
    if (call.activation == Activation::gelu_tanh) return gated_rows<S, GeluTanh>(call, begin, end);
    gated_rows<S, Silu>(call, begin, end);
  });
}

void gated_backward(const GatedCall& call, int64_t begin, int64_t end) {
  with_elements(call.dtype, [&](auto element) {
    using S = decltype(element);
    if (call.activation == Activation::gelu) return gated_backward_rows<S, Gelu>(call, begin, end);
    if (call.activation == Activation::gelu_tanh) return gated_backward_rows<S, GeluTanh>(call, begin, end);
    gated_backward_rows<S, Silu>(call, begin, end);
  });
}

}  // namespace
