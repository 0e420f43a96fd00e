// GroupNorm with SiLU after it, and the gradient of its input, for tensors that are contiguous in memory.
//
// For floats the operations are those of PyTorch's own kernels on x86-64 (native_group_norm, silu and their gradients),
// in the same order and with the same fused multiply-adds, so that the results have the same bits. PyTorch's kernels of
// GroupNorm work on vectors of 32 bytes on every x86-64 processor. What is fused follows from how GCC compiles them.
#pragma once

#include "lanes.h"
#include "layers.h"

namespace {

using doodl_fast::Dtype;
using doodl_fast::GroupNormCall;

// SiLU and its derivative

template <class V>
DF_FN V silu_of(V z) {
  return z / (1 + exponential(-z));
}

template <class V>
DF_FN V silu_gradient(V grad, V z) {
  const V sigmoid = 1 / (1 + exponential(-z));
  return (grad * sigmoid) * madd(z, 1 - sigmoid, V{} + 1);
}

// Calls work(i) for the elements [begin, end) of memory that PyTorch's kernels, whose tensor has `numel` elements, compute
// with the C library's exp: those after the last multiple of tail_step in each of its threads' ranges.
template <class Call, class F>
DF_FN void for_tails(const Call& call, int64_t numel, int64_t begin, int64_t end, const F& work) {
  for (int64_t start = begin / call.tail_chunk * call.tail_chunk; start < end; start += call.tail_chunk) {
    const int64_t stop = start + call.tail_chunk < numel ? start + call.tail_chunk : numel;
    const int64_t tail = stop - (stop - start) % call.tail_step;
    for (int64_t i = tail > begin ? tail : begin; i < stop && i < end; ++i) work(i);
  }
}

// Mean and variance, by Welford's algorithm in each lane over blocks of 16 vectors, whose moments are combined like the
// nodes of a binary tree (as in PyTorch's RowwiseMoments).

template <class V>
struct Moments {
  int64_t count = 0;
  V mean{}, squares{};  // squares: the sum of the squared differences from the mean
};

template <class T>
DF_FN void add(Moments<Short<T>>& to, const Moments<Short<T>>& from) {
  const int64_t count = to.count + from.count;
  const T part = count == 0 ? T(0) : T(from.count) / T(count);
  const Short<T> delta = from.mean - to.mean;
  const Short<T> step = part * delta, scaled = delta * T(to.count), squares = to.squares + from.squares;
  to.mean = to.mean + step;
  to.squares = madd(scaled, step, squares);
  to.count = count;
}

template <class T>
DF_FN void add(Moments<T>& to, int64_t from_count, T from_mean, T from_squares) {
  const int64_t count = to.count + from_count;
  const T part = count == 0 ? T(0) : T(from_count) / T(count);
  const T delta = from_mean - to.mean;
  to.mean = madd(part, delta, to.mean);
  to.squares = to.squares + madd(delta * delta * part, T(to.count), from_squares);
  to.count = count;
}

// Reads a short vector.
template <class S, class T>
DF_FN Short<T> load_short(const S* from) {
  Short<T> v;
  if (sizeof(S) == sizeof(T)) {
    memcpy(&v, from, sizeof v);
    return v;
  }
  const Lanes<T> lanes = load<S>(from, SHORT<T>);
  memcpy(&v, &lanes, sizeof v);
  return v;
}

constexpr int64_t MOMENTS_BLOCK = 16;

// The weights of the elements of a block in its running mean.
template <class T>
constexpr T PARTS[MOMENTS_BLOCK] = {T(1),           T(1) / T(2),  T(1) / T(3),  T(1) / T(4),
                                    T(1) / T(5),    T(1) / T(6),  T(1) / T(7),  T(1) / T(8),
                                    T(1) / T(9),    T(1) / T(10), T(1) / T(11), T(1) / T(12),
                                    T(1) / T(13),   T(1) / T(14), T(1) / T(15), T(1) / T(16)};

// Computes the moments of blocks of `vectors` short vectors. Their chains of operations do not wait for each other.
template <class S, int blocks, class T>
DF_FN void block_moments(const S* x, int64_t vectors, Moments<Short<T>>* found) {
  Short<T> mean[blocks] = {}, squares[blocks] = {};
  for (int64_t i = 0; i < vectors; ++i) {
    const Short<T> part = Short<T>{} + PARTS<T>[i];
#pragma GCC unroll 4
    for (int b = 0; b < blocks; ++b) {
      const Short<T> value = load_short<S, T>(x + (b * MOMENTS_BLOCK + i) * SHORT<T>), delta = value - mean[b];
      mean[b] = madd(part, delta, mean[b]);
      squares[b] = madd(delta, value - mean[b], squares[b]);
    }
  }
  for (int b = 0; b < blocks; ++b) found[b] = {vectors, mean[b], squares[b]};
}

template <class S, class T>
void group_moments(const S* x, int64_t n, T& mean, T& variance) {
  const int64_t vectors = n / SHORT<T>, blocks = (vectors + MOMENTS_BLOCK - 1) / MOMENTS_BLOCK;
  int64_t depth = 0;
  while ((int64_t(1) << depth) < blocks) ++depth;
  Moments<Short<T>> levels[64], ready[4];
  for (int64_t i = 0; i < blocks; ++i) {
    const S* at = x + i * MOMENTS_BLOCK * SHORT<T>;
    const int64_t left = vectors - i * MOMENTS_BLOCK;
    if ((i / 4 * 4 + 4) * MOMENTS_BLOCK > vectors)
      block_moments<S, 1, T>(at, left < MOMENTS_BLOCK ? left : MOMENTS_BLOCK, &ready[i % 4]);
    else if (i % 4 == 0)
      block_moments<S, 4, T>(at, MOMENTS_BLOCK, ready);
    add<T>(levels[0], ready[i % 4]);
    int64_t mask = i + 1;
    for (int64_t level = 1; level < depth && (mask & 1) == 0; ++level, mask >>= 1) {
      add<T>(levels[level], levels[level - 1]);
      levels[level - 1] = {};
    }
  }
  for (int64_t level = 1; level < depth; ++level) add<T>(levels[0], levels[level]);
  Moments<T> all;
  for (int64_t i = vectors * SHORT<T>; i < n; ++i) {
    const T value = Memory<S>::get(x + i), delta = value - all.mean;
    ++all.count;
    all.mean = all.mean + delta / T(all.count);
    all.squares = all.squares + delta * (value - all.mean);
  }
  for (int lane = 0; lane < SHORT<T>; ++lane) add<T>(all, vectors, levels[0].mean[lane], levels[0].squares[lane]);
  mean = all.mean;
  variance = all.squares / T(n);
}

template <class T>
DF_FN T inverse_deviation(T variance, double eps) {
  return T(1 / __builtin_sqrt(double(variance > 0 ? variance : T(0)) + eps));
}

// The forward pass

// What turns x into the argument of SiLU, in one channel of one sample: scale x + shift.
template <class T>
struct Affine {
  T scale, shift;
};

template <class T>
DF_FN Affine<T> affine(const GroupNormCall& call, int64_t channel, T mean, T rstd) {
  const T weight = call.weight ? static_cast<const T*>(call.weight)[channel] : T(1);
  const T bias = call.bias ? static_cast<const T*>(call.bias)[channel] : T(0);
  const T scale = rstd * weight;
  return {scale, madd(-scale, mean, bias)};
}

// Returns the argument of SiLU.
template <class V, class T>
DF_FN V normalised(V x, const Affine<T>& by) {
  return madd(V{} + by.scale, x, V{} + by.shift);
}

template <class S, bool silu>
void forward_groups(const GroupNormCall& call, int64_t begin, int64_t end) {
  using T = typename Memory<S>::T;
  const int64_t per_group = call.channels / call.groups, pixels = call.pixels;
  for (int64_t i = begin; i < end; ++i) {
    T mean, variance;
    group_moments<S, T>(static_cast<const S*>(call.x) + i * per_group * pixels, per_group * pixels, mean, variance);
    const T rstd = inverse_deviation(variance, call.eps);
    static_cast<T*>(call.mean)[i] = mean;
    static_cast<T*>(call.rstd)[i] = rstd;
    for (int64_t row = i * per_group; row < (i + 1) * per_group; ++row) {
      const Affine<T> by = affine<T>(call, row % call.channels, mean, rstd);
      const S* x = static_cast<const S*>(call.x) + row * pixels;
      S* y = static_cast<S*>(call.y) + row * pixels;
      by_vectors<T>(pixels, [&](int64_t at, int64_t n) {
        const Lanes<T> z = normalised(load<S>(x + at, n), by);
        store<S>(y + at, silu ? silu_of(z) : z, n);
      });
      if (silu)
        for_tails(call, call.n * call.channels * pixels, row * pixels, (row + 1) * pixels, [&](int64_t index) {
          const T z = normalised(Memory<S>::get(static_cast<const S*>(call.x) + index), by);
          Memory<S>::put(static_cast<S*>(call.y) + index, silu_of(z));
        });
    }
  }
}

// The backward pass

// Sums over the pixels of one channel, of the gradient and of its product with x.
template <class T>
struct Sums {
  T gradient, product;
};

template <class T>
struct Summation {
  Short<T> gradient = Short<T>{} - T(0), product = gradient;  // These are -0, to which a number is added exactly.

  // Adds a block of n elements. Only the last block of a channel may have another length than a multiple of WIDTH.
  template <class G, class S>
  DF_FN void add(const G* grad, const S* x, int64_t n) {
    Short<T> sum = gradient, products = product;
    by_vectors<T>(n, [&](int64_t at, int64_t count) {
      const Lanes<T> g = load<G>(grad + at, count);
      accumulate<T>(products, g * load<S>(x + at, count));
      accumulate<T>(sum, g);
    });
    gradient = sum, product = products;
  }

  // Returns the sums. A channel of fewer elements than a short vector has lanes is added up in order.
  DF_FN Sums<T> result(int64_t n) const {
    if (n >= SHORT<T>) return {total(gradient), total(product)};
    Sums<T> sums{gradient[0], product[0]};
    for (int64_t i = 1; i < n; ++i) sums = {sums.gradient + gradient[i], sums.product + product[i]};
    return sums;
  }
};

constexpr int64_t BACKWARD_BLOCK = 1024;

// Computes the gradient of SiLU's argument for elements [begin, end) of memory, in one channel.
template <class S, class T>
DF_FN void argument_gradient(const GroupNormCall& call, int64_t begin, int64_t end, const Affine<T>& by, T* out) {
  const S *x = static_cast<const S*>(call.x), *grad = static_cast<const S*>(call.grad_y);
  by_vectors<T>(end - begin, [&](int64_t at, int64_t n) {
    const Lanes<T> z = normalised(load<S>(x + begin + at, n), by);
    store<T>(out + at, silu_gradient(load<S>(grad + begin + at, n), z), n);
  });
  for_tails(call, call.n * call.channels * call.pixels, begin, end, [&](int64_t i) {
    const T z = normalised(Memory<S>::get(x + i), by);
    out[i - begin] = silu_gradient(Memory<S>::get(grad + i), z);
  });
}

// Adds a group's sums up over its channels, each with its weight: whole vectors first, then one channel after the other
// with fused multiply-adds, but on a single thread four channels at a time without them.
template <class T>
DF_FN Sums<T> weighted_total(const Sums<T>* sums, const T* weight, int64_t n, bool threaded) {
  const auto weight_of = [&](int64_t i) { return weight ? weight[i] : T(1); };
  T gradient[SHORT<T>] = {}, product[SHORT<T>] = {};
  int64_t i = 0;
  for (; i + SHORT<T> <= n; i += SHORT<T>)
    for (int64_t lane = 0; lane < SHORT<T>; ++lane) {
      product[lane] = madd(sums[i + lane].product, weight_of(i + lane), product[lane]);
      gradient[lane] = madd(sums[i + lane].gradient, weight_of(i + lane), gradient[lane]);
    }
  Sums<T> all{0, 0};
  for (int64_t lane = 0; lane < SHORT<T>; ++lane)
    all = {all.gradient + gradient[lane], all.product + product[lane]};
  for (; !threaded && i + 4 <= n; i += 4)
    for (int64_t j = i; j < i + 4; ++j)
      all = {all.gradient + sums[j].gradient * weight_of(j), all.product + sums[j].product * weight_of(j)};
  for (; i < n; ++i)
    all = {madd(sums[i].gradient, weight_of(i), all.gradient), madd(sums[i].product, weight_of(i), all.product)};
  return all;
}

// The sums of one group, channel by channel. For floats and doubles the gradient of SiLU's argument is left in grad_x.
template <class S, bool silu, class T>
DF_FN void channel_sums(const GroupNormCall& call, int64_t group, T mean, T rstd, Sums<T>* sums) {
  const int64_t per_group = call.channels / call.groups, pixels = call.pixels;
  alignas(64) T scratch[BACKWARD_BLOCK];
  for (int64_t row = group * per_group; row < (group + 1) * per_group; ++row) {
    const Affine<T> by = affine<T>(call, row % call.channels, mean, rstd);
    Summation<T> summation;
    const S *x = static_cast<const S*>(call.x) + row * pixels, *grad = static_cast<const S*>(call.grad_y) + row * pixels;
    if (!silu) {
      summation.add(grad, x, pixels);
      *sums++ = summation.result(pixels);
      continue;
    }
    for (int64_t at = 0; at < pixels; at += BACKWARD_BLOCK) {
      const int64_t n = pixels - at < BACKWARD_BLOCK ? pixels - at : BACKWARD_BLOCK, first = row * pixels + at;
      T* out = sizeof(S) == sizeof(T) ? static_cast<T*>(call.grad_x) + first : scratch;
      argument_gradient<S>(call, first, first + n, by, out);
      summation.add(out, x + at, n);
    }
    *sums++ = summation.result(pixels);
  }
}

template <class S, bool silu>
void backward_groups(const GroupNormCall& call, int64_t begin, int64_t end) {
  using T = typename Memory<S>::T;
  constexpr bool kept = silu && sizeof(S) == sizeof(T);  // channel_sums has left the gradient in grad_x.
  const int64_t per_group = call.channels / call.groups, pixels = call.pixels;
  const S* const x = static_cast<const S*>(call.x);
  const S* const grad = static_cast<const S*>(kept ? call.grad_x : call.grad_y);
  S* const out = static_cast<S*>(call.grad_x);
  Sums<T>* const sums = new Sums<T>[per_group];
  for (int64_t i = begin; i < end; ++i) {
    const T mean = static_cast<const T*>(call.mean)[i], rstd = static_cast<const T*>(call.rstd)[i];
    channel_sums<S, silu>(call, i, mean, rstd, sums);
    const T* weight = call.weight ? static_cast<const T*>(call.weight) + i % call.groups * per_group : nullptr;
    const Sums<T> all = weighted_total(sums, weight, per_group, call.threaded);
    const T part = T(1) / T(per_group * pixels);
    const T by_x = madd(all.gradient, mean, -all.product) * rstd * rstd * rstd * part;
    const T shift = madd(-(all.gradient * rstd), part, -by_x * mean);
    for (int64_t row = i * per_group; row < (i + 1) * per_group; ++row) {
      const Affine<T> by = affine<T>(call, row % call.channels, mean, rstd);
      const Lanes<T> scale = broadcast<T>(rstd * (weight ? weight[row - i * per_group] : T(1)));
      const int64_t first = row * pixels;
      by_vectors<T>(pixels, [&](int64_t at, int64_t n) {
        const Lanes<T> value = load<S>(x + first + at, n);
        Lanes<T> g = load<S>(grad + first + at, n);
        if (silu && !kept) g = silu_gradient(g, normalised(value, by));
        store<S>(out + first + at, madd(scale, g, by_x * value) + shift, n);
      });
    }
  }
  delete[] sums;
}

// The choice of the template


// Calls function(S()) for the type S of a dtype's elements.
template <class F>
void with_elements(Dtype dtype, const F& function) {
  switch (dtype) {
    case Dtype::f16:
      return function(Half());
    case Dtype::bf16:
      return function(Brain());
    case Dtype::f32:
      return function(float());
    case Dtype::f64:
      return function(double());
  }
}

void group_norm(const GroupNormCall& call, int64_t begin, int64_t end) {
  with_elements(call.dtype, [&](auto element) {
    using S = decltype(element);
    (call.silu ? forward_groups<S, true> : forward_groups<S, false>)(call, begin, end);
  });
}

void group_norm_backward(const GroupNormCall& call, int64_t begin, int64_t end) {
  with_elements(call.dtype, [&](auto element) {
    using S = decltype(element);
    (call.silu ? backward_groups<S, true> : backward_groups<S, false>)(call, begin, end);
  });
}

}  // namespace
