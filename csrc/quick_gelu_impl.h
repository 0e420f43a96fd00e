// Quick GELU, x sigmoid(1.702 x), and the gradient of its input.
//
// The operations are those of PyTorch's own kernels on x86-64 (mul, sigmoid, sigmoid_backward, add) in the same order, each
// with its result rounded as if it were written, so that the results have the same bits in float32, bfloat16 and float16.
#pragma once

#include "group_norm_impl.h"

namespace {

using doodl_fast::QuickGeluCall;

// Whether PyTorch's sigmoid_backward rounds after each operation in elements S, or once at its end.
template <class S>
constexpr bool ROUNDS_EACH = false;
template <>
constexpr bool ROUNDS_EACH<Half> = true;

// Quick GELU of vectors, or of single numbers, V, that were read from elements S: its value, and `grad` times its
// derivative.
template <class S, class V>
struct QuickGelu {
  static constexpr typename Memory<S>::T FACTOR = 1.702;
  const V x, sigmoid;
  DF_FN explicit QuickGelu(const V& x) : x(x), sigmoid(sigmoid_of(rounded<S>(x * FACTOR))) {}
  static DF_FN V sigmoid_of(const V& z) { return rounded<S>(1 / (1 + exponential(-z))); }
  DF_FN V value() const { return x * sigmoid; }
  DF_FN V gradient(const V& grad) const {
    const V of_sigmoid = rounded<S>(grad * x), rest = 1 - sigmoid;
    const V of_argument = ROUNDS_EACH<S> ? rounded<S>(rounded<S>(of_sigmoid * rounded<S>(rest)) * sigmoid)
                                         : rounded<S>(of_sigmoid * rest * sigmoid);
    return rounded<S>(grad * sigmoid) + rounded<S>(of_argument * FACTOR);
  }
};

template <class S>
void quick_gelu_elements(const QuickGeluCall& call, int64_t begin, int64_t end) {
  using T = typename Memory<S>::T;
  const S* const x = static_cast<const S*>(call.x);
  S* const y = static_cast<S*>(call.y);
  by_vectors<T>(end - begin, [&](int64_t at, int64_t n) {
    at += begin;
    store<S>(y + at, QuickGelu<S, Lanes<T>>(load<S>(x + at, n)).value(), n);
  });
  for_tails(call, call.n, begin, end,
            [&](int64_t i) { Memory<S>::put(y + i, QuickGelu<S, T>(Memory<S>::get(x + i)).value()); });
}

template <class S>
void quick_gelu_backward_elements(const QuickGeluCall& call, int64_t begin, int64_t end) {
  using T = typename Memory<S>::T;
  const S *const x = static_cast<const S*>(call.x), *const grad_y = static_cast<const S*>(call.grad_y);
  S* const grad_x = static_cast<S*>(call.grad_x);
  by_vectors<T>(end - begin, [&](int64_t at, int64_t n) {
    at += begin;
    store<S>(grad_x + at, QuickGelu<S, Lanes<T>>(load<S>(x + at, n)).gradient(load<S>(grad_y + at, n)), n);
  });
  for_tails(call, call.n, begin, end, [&](int64_t i) {
    Memory<S>::put(grad_x + i, QuickGelu<S, T>(Memory<S>::get(x + i)).gradient(Memory<S>::get(grad_y + i)));
  });
}

void quick_gelu(const QuickGeluCall& call, int64_t begin, int64_t end) {
  with_elements(call.dtype, [&](auto element) { quick_gelu_elements<decltype(element)>(call, begin, end); });
}

void quick_gelu_backward(const QuickGeluCall& call, int64_t begin, int64_t end) {
  with_elements(call.dtype, [&](auto element) { quick_gelu_backward_elements<decltype(element)>(call, begin, end); });
}

}  // namespace
