// The CPU kernels of layers for the instruction set that the compiler targets by default.
#include "gated_impl.h"
#include "modulated_norm_impl.h"
#include "pixel_norm_impl.h"
#include "quick_gelu_impl.h"
#include "rotary_impl.h"

namespace doodl_fast {

const LayerKernels& layer_kernels_default() {
  static constexpr LayerKernels table{"baseline",    group_norm, group_norm_backward,
                                      pixel_moments, pixel_norm, pixel_backward_sums,
                                      pixel_backward, gated,      gated_backward,
                                      quick_gelu, quick_gelu_backward,
                                      modulated_norm, modulated_norm_backward,
                                      rotary, rotary_backward};
  return table;
}

}  // namespace doodl_fast
