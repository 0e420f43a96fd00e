// The CPU kernels for AVX2, which are chosen at run time if the processor has it. The FMA instructions are not enabled,
// because a multiplication must not be contracted with an addition (see scalar.h).
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC target("avx2,f16c")
#define DF_AVX2 1
#elif defined(__x86_64__) && defined(__clang__)
#include <cstdint>
#include <cstring>

#include <immintrin.h>
#pragma clang attribute push(__attribute__((target("avx2,f16c"))), apply_to = function)
#define DF_AVX2 1
#endif

#if defined(DF_AVX2)
#include "cpu_kernels_impl.h"
#else
#include "cpu_kernels.h"
#endif

#if defined(__clang__) && defined(DF_AVX2)
#pragma clang attribute pop
#endif

namespace doodl_fast {

const Kernels* kernels_avx2() {
#if defined(DF_AVX2)
  static constexpr Kernels table{"avx2", coupling, vjp, update_range, scale_range};
  return &table;
#else
  return nullptr;
#endif
}

}  // namespace doodl_fast
