// The CPU kernels of layers for AVX2 with fused multiply-adds, which are chosen at run time if the processor has both.
#include <cstdint>
#include <cstring>

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#define DF_FMA 1
#include "gated_impl.h"
#include "modulated_norm_impl.h"
#include "pixel_norm_impl.h"
#include "quick_gelu_impl.h"
#include "rotary_impl.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#else
#include "layers.h"
#endif

namespace doodl_fast {

const LayerKernels* layer_kernels_avx2() {
#if defined(DF_FMA)
  static constexpr LayerKernels table{"avx2",        group_norm, group_norm_backward,
                                      pixel_moments, pixel_norm, pixel_backward_sums,
                                      pixel_backward, gated,      gated_backward,
                                      quick_gelu, quick_gelu_backward,
                                      modulated_norm, modulated_norm_backward,
                                      rotary, rotary_backward};
  return &table;
#else
  return nullptr;
#endif
}

}  // namespace doodl_fast
