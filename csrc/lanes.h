// Vectors of the dtype of the arithmetic, for the instruction set that the including file has chosen, and how elements of
// every dtype are read into them and written from them. `Lanes` are as long as the instruction set's vectors. `Short` have
// 32 bytes for every instruction set, and so the same number of partial sums.
//
// A multiplication and an addition are fused where `madd` says so, and nowhere else (-ffp-contract=off). The exponential
// function of floats is that of SLEEF, which PyTorch's vectors use: the same polynomial, evaluated in the same order
// (Shibata and Petrogalli, IEEE Trans. Parallel Distrib. Syst. 31(6), 2020).
#pragma once

#include "cpu_kernels.h"
#include "scalar.h"

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"  // Vectors are passed between functions of this library alone, all inlined.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // Some of GCC's own intrinsics for AVX-512 cause this warning.
#endif

namespace {

#if defined(DF_AVX512)
#define DF_BYTES 64
#else
#define DF_BYTES 32
#endif

typedef float Floats __attribute__((vector_size(DF_BYTES)));
typedef double Doubles __attribute__((vector_size(DF_BYTES)));
typedef int32_t Ints __attribute__((vector_size(DF_BYTES)));
typedef float ShortFloats __attribute__((vector_size(32)));
typedef double ShortDoubles __attribute__((vector_size(32)));

template <class T>
struct VectorsOf;
template <>
struct VectorsOf<float> {
  using lanes = Floats;
  using narrow = ShortFloats;
};
template <>
struct VectorsOf<double> {
  using lanes = Doubles;
  using narrow = ShortDoubles;
};
template <class T>
using Lanes = typename VectorsOf<T>::lanes;
template <class T>
using Short = typename VectorsOf<T>::narrow;
template <class T>
constexpr int64_t WIDTH = DF_BYTES / sizeof(T);
template <class T>
constexpr int64_t SHORT = 32 / sizeof(T);

// Arithmetic

DF_FN float exponential(float x) { return __builtin_expf(x); }
DF_FN double exponential(double x) { return __builtin_exp(x); }
DF_FN float root(float x) { return __builtin_sqrtf(x); }
DF_FN double root(double x) { return __builtin_sqrt(x); }

// Returns a b + c, with one rounding where the instruction set has fused multiply-adds.
#if defined(DF_FMA)
DF_FN float madd(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
DF_FN double madd(double a, double b, double c) { return __builtin_fma(a, b, c); }
DF_FN ShortFloats madd(ShortFloats a, ShortFloats b, ShortFloats c) {
  return ShortFloats(_mm256_fmadd_ps(__m256(a), __m256(b), __m256(c)));
}
DF_FN ShortDoubles madd(ShortDoubles a, ShortDoubles b, ShortDoubles c) {
  return ShortDoubles(_mm256_fmadd_pd(__m256d(a), __m256d(b), __m256d(c)));
}
#if defined(DF_AVX512)
DF_FN Floats madd(Floats a, Floats b, Floats c) { return Floats(_mm512_fmadd_ps(__m512(a), __m512(b), __m512(c))); }
DF_FN Doubles madd(Doubles a, Doubles b, Doubles c) {
  return Doubles(_mm512_fmadd_pd(__m512d(a), __m512d(b), __m512d(c)));
}
#endif
#else
template <class V>
DF_FN V madd(V a, V b, V c) {
  return a * b + c;
}
#endif

template <class T>
DF_FN Lanes<T> broadcast(T value) {
  return Lanes<T>{} + value;
}

DF_FN Doubles exponential(Doubles x) {
  for (int64_t i = 0; i < WIDTH<double>; ++i) x[i] = __builtin_exp(x[i]);
  return x;
}

#if defined(DF_FMA)
// Returns exp(s) for numbers of magnitude at most log(2) / 2.
DF_FN Floats small_exponential(Floats s) {
  Floats u = broadcast(0.000198527617612853646278381f);
  u = madd(u, s, broadcast(0.00139304355252534151077271f));
  u = madd(u, s, broadcast(0.00833336077630519866943359f));
  u = madd(u, s, broadcast(0.0416664853692054748535156f));
  u = madd(u, s, broadcast(0.166666671633720397949219f));
  u = madd(u, s, broadcast(0.5f));
  return 1.0f + madd(s * s, u, s);
}

DF_FN Floats exponential(Floats x) {
  const Floats scaled = x * 1.442695040888963407359924681001892137426645954152985934135449406931f;
#if defined(DF_AVX512)
  const __m512 q = _mm512_roundscale_ps(__m512(scaled), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  const __m256i whole = _mm256_cvtps_epi32(__m256(scaled));
  const __m256 q = _mm256_cvtepi32_ps(whole);
#endif
  Floats s = madd(Floats(q), broadcast(-0.693145751953125f), x);
  s = madd(Floats(q), broadcast(-1.428606765330187045e-06f), s);
  Floats u = small_exponential(s);
#if defined(DF_AVX512)
  u = Floats(_mm512_scalef_ps(__m512(u), q));
#else
  // Two steps multiply by 2^q, as 2^q alone may lie outside the range of floats.
  const Ints k = Ints(whole), half = k >> 1;
  u = u * Floats((half + 127) << 23) * Floats((k - half + 127) << 23);
#endif
  u = x < -104.0f ? Floats{} : u;
  return x > 104.0f ? broadcast(__builtin_inff()) : u;
}
#else
DF_FN Floats exponential(Floats x) {
  for (int64_t i = 0; i < WIDTH<float>; ++i) x[i] = __builtin_expf(x[i]);
  return x;
}
#endif

// Returns the sum of the lanes, added in the order of PyTorch's vectors.
DF_FN float total(ShortFloats v) {
  for (int half = 4; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) v[i] = v[i] + v[i + half];
  return v[0];
}
DF_FN double total(ShortDoubles v) { return ((v[0] + v[1]) + v[2]) + v[3]; }

// Adds the one or two short vectors of a vector to a short vector.
template <class T>
DF_FN void accumulate(Short<T>& sum, Lanes<T> v) {
#if defined(DF_AVX512)
  Short<T> parts[2];
  memcpy(parts, &v, sizeof v);
  sum = sum + parts[0];
  sum = sum + parts[1];
#else
  sum = sum + v;
#endif
}

// Memory: reads and writes vectors, n elements of a vector (with zeros after them), and single elements.

struct Half {
  uint16_t bits;
};
struct Brain {
  uint16_t bits;
};

template <class S>
struct Memory {  // float and double
  using T = S;
  static DF_FN T get(const S* from) { return *from; }
  static DF_FN void put(S* to, T value) { *to = value; }
  static DF_FN Lanes<T> load(const S* from) {
    Lanes<T> v;
    memcpy(&v, from, sizeof v);
    return v;
  }
  static DF_FN void store(S* to, Lanes<T> v) { memcpy(to, &v, sizeof v); }
  static DF_FN Lanes<T> rounded(Lanes<T> v) { return v; }
};

template <>
struct Memory<Half> {
  using T = float;
  static DF_FN float get(const Half* from) { return from_half(from->bits); }
  static DF_FN void put(Half* to, float value) { to->bits = to_half(value); }
#if defined(DF_AVX512)
  static DF_FN Floats load(const Half* from) { return Floats(_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)from))); }
  static DF_FN void store(Half* to, Floats v) {
    _mm256_storeu_si256((__m256i*)to, halves(v));
  }
  static DF_FN Floats rounded(Floats v) { return Floats(_mm512_cvtph_ps(halves(v))); }
  static DF_FN __m256i halves(Floats v) {
    return _mm512_cvtps_ph(__m512(v), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
#elif defined(DF_FMA)
  static DF_FN Floats load(const Half* from) { return Floats(_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)from))); }
  static DF_FN void store(Half* to, Floats v) {
    _mm_storeu_si128((__m128i*)to, halves(v));
  }
  static DF_FN Floats rounded(Floats v) { return Floats(_mm256_cvtph_ps(halves(v))); }
  static DF_FN __m128i halves(Floats v) {
    return _mm256_cvtps_ph(__m256(v), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
#else
  static DF_FN Floats load(const Half* from) {
    Floats v;
    for (int64_t i = 0; i < WIDTH<float>; ++i) v[i] = get(from + i);
    return v;
  }
  static DF_FN void store(Half* to, Floats v) {
    for (int64_t i = 0; i < WIDTH<float>; ++i) put(to + i, v[i]);
  }
  static DF_FN Floats rounded(Floats v) {
    for (int64_t i = 0; i < WIDTH<float>; ++i) v[i] = from_half(to_half(v[i]));
    return v;
  }
#endif
};

template <>
struct Memory<Brain> {
  using T = float;
  static DF_FN float get(const Brain* from) { return from_bf16(from->bits); }
  static DF_FN void put(Brain* to, float value) { to->bits = to_bf16(value); }
  static DF_FN Floats load(const Brain* from) {
    typedef uint16_t Words __attribute__((vector_size(DF_BYTES / 2)));
    Words words;
    memcpy(&words, from, sizeof words);
    return Floats(__builtin_convertvector(words, Ints) << 16);
  }
  static DF_FN void store(Brain* to, Floats v) {
    typedef uint16_t Words __attribute__((vector_size(DF_BYTES / 2)));
    const Words words = __builtin_convertvector((Ints(rounded(v)) >> 16) & 0xffff, Words);
    memcpy(to, &words, sizeof words);
  }
  static DF_FN Floats rounded(Floats v) {
    const Ints bits = Ints(v), nearest = (bits + 0x7fff + ((bits >> 16) & 1)) & -0x10000;
    return Floats(v != v ? Ints{} + 0x7fc00000 : nearest);
  }
};

template <class S, class T = typename Memory<S>::T>
DF_FN Lanes<T> load(const S* from, int64_t n) {
  if (n >= WIDTH<T>) return Memory<S>::load(from);
  Lanes<T> v{};
  for (int64_t i = 0; i < n; ++i) v[i] = Memory<S>::get(from + i);
  return v;
}

template <class S, class T = typename Memory<S>::T>
DF_FN void store(S* to, Lanes<T> v, int64_t n) {
  if (n >= WIDTH<T>) return Memory<S>::store(to, v);
  for (int64_t i = 0; i < n; ++i) Memory<S>::put(to + i, v[i]);
}

// Return numbers as they are after they have been written as elements S.
template <class S>
DF_FN Lanes<typename Memory<S>::T> rounded(const Lanes<typename Memory<S>::T>& v) {
  return Memory<S>::rounded(v);
}
template <class S>
DF_FN typename Memory<S>::T rounded(typename Memory<S>::T value) {
  S memory;
  Memory<S>::put(&memory, value);
  return Memory<S>::get(&memory);
}

// Calls work(at, n) for the vectors of a range of n elements, where n is how many elements the vector has: first for whole
// vectors, in a loop that tests nothing, then for the rest.
template <class T, class F>
DF_FN void by_vectors(int64_t n, const F& work) {
  int64_t at = 0;
  for (; at + WIDTH<T> <= n; at += WIDTH<T>) work(at, WIDTH<T>);
  if (at < n) work(at, n - at);
}

}  // namespace
