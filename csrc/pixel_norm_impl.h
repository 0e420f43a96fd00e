// GroupNorm with SiLU after it, and the gradient of its input, for tensors that are channels_last in memory. The channels
// of a pixel lie side by side, so a kernel goes through the pixels and keeps one sum for each channel.
//
// Sums over up to 32 pixels are added up in the dtype of the arithmetic, and those sums in double. What is summed up is
// the difference from a number near the mean, so that the sum of the squares loses no digits.
#pragma once

#include "group_norm_impl.h"

namespace {

using doodl_fast::PixelRange;

constexpr int64_t PIXELS_AT_ONCE = 32;

// Calls work(at, n, first, second) for the vectors of a row of n channels and for groups of four pixels, where first and
// second are the accumulators of the vector's channels. They go to range.sums after at most 32 pixels.
template <class T, class F>
DF_FN void sum_up(const GroupNormCall& call, const PixelRange& range, const F& work) {
  const int64_t channels = call.channels, padded = (channels + WIDTH<T> - 1) / WIDTH<T> * WIDTH<T>;
  T* const first = new T[2 * padded];
  T* const second = first + padded;
  for (int64_t begin = range.begin; begin < range.end; begin += PIXELS_AT_ONCE) {
    const int64_t end = begin + PIXELS_AT_ONCE < range.end ? begin + PIXELS_AT_ONCE : range.end;
    memset(first, 0, 2 * padded * sizeof(T));
    for (int64_t pixel = begin; pixel < end; pixel += 4) {
      const int64_t pixels = end - pixel < 4 ? end - pixel : 4;
      const int64_t row = (range.sample * call.pixels + pixel) * channels;
      by_vectors<T>(channels, [&](int64_t at, int64_t n) {
        Lanes<T> a = Memory<T>::load(first + at), b = Memory<T>::load(second + at);
        if (pixels == 4)
          for (int64_t i = 0; i < 4; ++i) work(row + i * channels + at, at, n, a, b);
        else
          for (int64_t i = 0; i < pixels; ++i) work(row + i * channels + at, at, n, a, b);
        Memory<T>::store(first + at, a);
        Memory<T>::store(second + at, b);
      });
    }
    for (int64_t c = 0; c < channels; ++c) {
      range.sums[c] += first[c];
      range.sums[channels + c] += second[c];
    }
  }
  delete[] first;
}

// Calls work(place, channel, n) for the vectors of every pixel of a range: their places in memory, their first channels,
// and how many channels they have.
template <class T, class F>
DF_FN void for_vectors(const GroupNormCall& call, const PixelRange& range, const F& work) {
  for (int64_t pixel = range.begin; pixel < range.end; ++pixel) {
    const int64_t row = (range.sample * call.pixels + pixel) * call.channels;
    by_vectors<T>(call.channels, [&](int64_t at, int64_t n) { work(row + at, at, n); });
  }
}

template <class S>
void moments_of_pixels(const GroupNormCall& call, const PixelRange& range) {
  using T = typename Memory<S>::T;
  const S* const x = static_cast<const S*>(call.x);
  const T* const center = static_cast<const T*>(range.center);
  sum_up<T>(call, range, [&](int64_t place, int64_t channel, int64_t n, Lanes<T>& sum, Lanes<T>& squares) {
    const Lanes<T> difference = load<S>(x + place, n) - load<T>(center + channel, n);
    sum = sum + difference;
    squares = madd(difference, difference, squares);
  });
}

template <class S, bool silu>
void norm_of_pixels(const GroupNormCall& call, const PixelRange& range) {
  using T = typename Memory<S>::T;
  const T *const scale = static_cast<const T*>(range.scale), *const shift = static_cast<const T*>(range.shift);
  for_vectors<T>(call, range, [&](int64_t place, int64_t channel, int64_t n) {
    const Lanes<T> x = load<S>(static_cast<const S*>(call.x) + place, n);
    const Lanes<T> z = madd(load<T>(scale + channel, n), x, load<T>(shift + channel, n));
    store<S>(static_cast<S*>(call.y) + place, silu ? silu_of(z) : z, n);
  });
}

// Returns the gradient of SiLU's argument.
template <class S, bool silu, class T>
DF_FN Lanes<T> gradient_at(const GroupNormCall& call, const PixelRange& range, int64_t place, int64_t channel,
                           int64_t n, Lanes<T> x) {
  const Lanes<T> grad = load<S>(static_cast<const S*>(call.grad_y) + place, n);
  if (!silu) return grad;
  const T *const scale = static_cast<const T*>(range.scale), *const shift = static_cast<const T*>(range.shift);
  return silu_gradient(grad, madd(load<T>(scale + channel, n), x, load<T>(shift + channel, n)));
}

template <class S, bool silu>
void backward_sums_of_pixels(const GroupNormCall& call, const PixelRange& range) {
  using T = typename Memory<S>::T;
  const T* const center = static_cast<const T*>(range.center);
  sum_up<T>(call, range, [&](int64_t place, int64_t channel, int64_t n, Lanes<T>& sum, Lanes<T>& product) {
    const Lanes<T> x = load<S>(static_cast<const S*>(call.x) + place, n);
    const Lanes<T> grad = gradient_at<S, silu, T>(call, range, place, channel, n, x);
    if (silu && sizeof(S) == sizeof(T)) store<S>(static_cast<S*>(call.grad_x) + place, grad, n);
    sum = sum + grad;
    product = madd(grad, x - load<T>(center + channel, n), product);
  });
}

template <class S, bool silu>
void backward_of_pixels(const GroupNormCall& call, const PixelRange& range) {
  using T = typename Memory<S>::T;
  const T* const by_gradient = static_cast<const T*>(range.factors);
  const T *const by_x = by_gradient + call.channels, *const shift = by_x + call.channels;
  for_vectors<T>(call, range, [&](int64_t place, int64_t channel, int64_t n) {
    const Lanes<T> x = load<S>(static_cast<const S*>(call.x) + place, n);
    S* const out = static_cast<S*>(call.grad_x) + place;
    const Lanes<T> grad = silu && sizeof(S) == sizeof(T) ? load<S>(out, n)
                                                         : gradient_at<S, silu, T>(call, range, place, channel, n, x);
    const Lanes<T> rest = madd(load<T>(by_x + channel, n), x, load<T>(shift + channel, n));
    store<S>(out, madd(load<T>(by_gradient + channel, n), grad, rest), n);
  });
}

void pixel_moments(const GroupNormCall& call, const PixelRange& range) {
  with_elements(call.dtype, [&](auto element) { moments_of_pixels<decltype(element)>(call, range); });
}

void pixel_norm(const GroupNormCall& call, const PixelRange& range) {
  with_elements(call.dtype, [&](auto element) {
    using S = decltype(element);
    (call.silu ? norm_of_pixels<S, true> : norm_of_pixels<S, false>)(call, range);
  });
}

void pixel_backward_sums(const GroupNormCall& call, const PixelRange& range) {
  with_elements(call.dtype, [&](auto element) {
    using S = decltype(element);
    (call.silu ? backward_sums_of_pixels<S, true> : backward_sums_of_pixels<S, false>)(call, range);
  });
}

void pixel_backward(const GroupNormCall& call, const PixelRange& range) {
  with_elements(call.dtype, [&](auto element) {
    using S = decltype(element);
    (call.silu ? backward_of_pixels<S, true> : backward_of_pixels<S, false>)(call, range);
  });
}

}  // namespace
