// Rotary embeddings of the heads of each token, and the gradient of their input.
//
// Each product is rounded, and in the gradient also to the dtype of the tensors, as by PyTorch's operators one by one.
#pragma once

#include "gated_impl.h"

namespace {

using doodl_fast::RotaryCall;

// Returns a vector in which the two elements of each pair have changed places.
DF_FN Floats swapped(const Floats& v) {
#if defined(DF_AVX512)
  return Floats(_mm512_permute_ps(__m512(v), 0xB1));
#elif defined(DF_FMA)
  return Floats(_mm256_permute_ps(__m256(v), 0xB1));
#else
  Floats y;
  for (int64_t i = 0; i < WIDTH<float>; ++i) y[i] = v[i ^ 1];
  return y;
#endif
}
DF_FN Doubles swapped(const Doubles& v) {
  Doubles y;
  for (int64_t i = 0; i < WIDTH<double>; ++i) y[i] = v[i ^ 1];
  return y;
}

// Calls work(head, cos, sin) for each head of the tokens [begin, end), where head is the number of its first element. The
// sines of the first channel of each pair are negated.
template <class T, class F>
DF_FN void for_heads(const RotaryCall& call, int64_t begin, int64_t end, T* sines, const F& work) {
  for (int64_t token = begin; token < end; ++token) {
    const int64_t row = (call.own_tables ? token : token % call.tokens) * call.size;
    const T *const cos = static_cast<const T*>(call.cos) + row, *const sin = static_cast<const T*>(call.sin) + row;
    if (call.halves)
      for (int64_t i = 0; i < call.size; ++i) sines[i] = i < call.size / 2 ? -sin[i] : sin[i];
    else
      for (int64_t i = 0; i < call.size; i += 2) sines[i] = -sin[i], sines[i + 1] = sin[i + 1];
    for (int64_t head = 0; head < call.heads; ++head) work((token * call.heads + head) * call.size, cos, sines);
  }
}

template <class S>
void rotary_tokens(const RotaryCall& call, int64_t begin, int64_t end, void* room) {
  using T = typename Memory<S>::T;
  const int64_t half = call.size / 2;
  for_heads<T>(call, begin, end, static_cast<T*>(room), [&](int64_t first, const T* cos, const T* sin) {
    const S* const x = static_cast<const S*>(call.x) + first;
    S* const y = static_cast<S*>(call.y) + first;
    if (!call.halves) {
      by_vectors<T>(call.size, [&](int64_t at, int64_t n) {
        const Lanes<T> value = load<S>(x + at, n);
        store<S>(y + at, value * load<T>(cos + at, n) + swapped(value) * load<T>(sin + at, n), n);
      });
      return;
    }
    by_vectors<T>(half, [&](int64_t at, int64_t n) {
      const int64_t other = at + half;
      const Lanes<T> low = load<S>(x + at, n), high = load<S>(x + other, n);
      store<S>(y + at, low * load<T>(cos + at, n) + high * load<T>(sin + at, n), n);
      store<S>(y + other, high * load<T>(cos + other, n) + low * load<T>(sin + other, n), n);
    });
  });
}

template <class S>
void rotary_backward_tokens(const RotaryCall& call, int64_t begin, int64_t end, void* room) {
  using T = typename Memory<S>::T;
  const int64_t half = call.size / 2;
  for_heads<T>(call, begin, end, static_cast<T*>(room), [&](int64_t first, const T* cos, const T* sin) {
    const S* const grad_y = static_cast<const S*>(call.x) + first;
    S* const grad_x = static_cast<S*>(call.y) + first;
    if (!call.halves) {
      by_vectors<T>(call.size, [&](int64_t at, int64_t n) {
        const Lanes<T> grad = load<S>(grad_y + at, n);
        const Lanes<T> along = rounded<S>(grad * load<T>(cos + at, n));
        store<S>(grad_x + at, along + swapped(rounded<S>(grad * load<T>(sin + at, n))), n);
      });
      return;
    }
    by_vectors<T>(half, [&](int64_t at, int64_t n) {
      const int64_t other = at + half;
      const Lanes<T> low = load<S>(grad_y + at, n), high = load<S>(grad_y + other, n);
      const Lanes<T> from_high = rounded<S>(high * load<T>(sin + other, n));
      const Lanes<T> from_low = rounded<S>(low * load<T>(sin + at, n));
      store<S>(grad_x + at, rounded<S>(low * load<T>(cos + at, n)) + from_high, n);
      store<S>(grad_x + other, rounded<S>(high * load<T>(cos + other, n)) + from_low, n);
    });
  });
}

void rotary(const RotaryCall& call, int64_t begin, int64_t end, void* room) {
  with_elements(call.dtype, [&](auto element) { rotary_tokens<decltype(element)>(call, begin, end, room); });
}

void rotary_backward(const RotaryCall& call, int64_t begin, int64_t end, void* room) {
  with_elements(call.dtype, [&](auto element) { rotary_backward_tokens<decltype(element)>(call, begin, end, room); });
}

}  // namespace
