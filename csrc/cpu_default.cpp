// The CPU kernels for the instruction set that the compiler targets by default (SSE2 on x86-64, NEON on arm64).
#include "cpu_kernels_impl.h"

namespace doodl_fast {

const Kernels& kernels_default() {
  static constexpr Kernels table{"baseline", coupling, vjp, update_range, scale_range};
  return table;
}

}  // namespace doodl_fast
