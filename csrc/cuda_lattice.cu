// The lattice couplings on CUDA. Each thread computes one element at a time by lattice.h. Integer divisions take more
// time than the memory traffic, so wider loads would not help. The network's dtype is a branch that all threads take in
// the same way, instead of a template argument.
#include "lattice_bindings.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

namespace {

using namespace doodl_fast;

constexpr int THREADS = 128;

__device__ __forceinline__ double value_at(const In& in, int64_t i) {
  switch (in.dtype) {
    case Dtype::f16:
      return double(__half2float(static_cast<const __half*>(in.data)[i]));
    case Dtype::bf16:
      return double(from_bf16(static_cast<const uint16_t*>(in.data)[i]));
    case Dtype::f32:
      return double(static_cast<const float*>(in.data)[i]);
    default:
      return static_cast<const double*>(in.data)[i];
  }
}

template <class S, Eps eps, bool mixes>
__global__ void __launch_bounds__(THREADS) lattice_kernel(LatticeCall call) {
  LatticeFaults faults;
  const int64_t stride = int64_t(gridDim.x) * THREADS;
  for (int64_t i = int64_t(blockIdx.x) * THREADS + threadIdx.x; i < call.n; i += stride) {
    const double u = eps != Eps::none ? value_at(call.eps, i) : 0;
    const double v = eps == Eps::guided ? value_at(call.eps, call.n + i) : 0;
    lattice_element<S, eps, mixes>(call, i, u, v, faults);
  }
  if (faults.outside) call.faults[0] = 1;  // Every thread that writes it writes the same value.
  if (faults.infinite) call.faults[1] = 1;
}

void run_lattice(const LatticeCall& call, const Tensor& like) {
  if (!call.n) return;
  void* current = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(like.get_device(), &current));
  const unsigned blocks = unsigned(std::min<int64_t>((call.n + THREADS - 1) / THREADS, 1 << 16));
  with_lattice_kind(call, [&](auto integer, auto eps, auto mixes) {
    lattice_kernel<decltype(integer), decltype(eps)::value, decltype(mixes)::value>
        <<<blocks, THREADS, 0, static_cast<cudaStream_t>(current)>>>(call);
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

void lattice_coupling(Tensor out, Tensor target, Tensor source, MaybeTensor eps, Tensor faults, int64_t row, double c,
                      double b, std::optional<double> g, bool undo) {
  const torch::stable::accelerator::DeviceGuard guard(target.get_device());
  run_lattice(lattice_call(out, target, source, eps, faults, row, c, b, g, undo), target);
}

void lattice_mix(Tensor out_target, Tensor out_source, Tensor out_target_buffer, Tensor out_source_buffer,
                 Tensor target, Tensor source, Tensor target_buffer, Tensor source_buffer, MaybeTensor eps,
                 Tensor faults, int64_t row, bool target_first, int64_t by0, int64_t over0, double c0, int64_t by1,
                 int64_t over1, double c1, double c, double b, std::optional<double> g, bool undo) {
  const torch::stable::accelerator::DeviceGuard guard(target.get_device());
  LatticeCall call = lattice_call(out_target, target, source, eps, faults, row, c, b, g, undo);
  add_lattice_mixing(call, target, {out_source, out_target_buffer, out_source_buffer}, {target_buffer, source_buffer},
                     target_first, stage(by0, over0, c0), stage(by1, over1, c1));
  run_lattice(call, target);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(doodl_fast_native, CUDA, library) {
  library.impl("lattice_coupling", TORCH_BOX(&lattice_coupling));
  library.impl("lattice_mix", TORCH_BOX(&lattice_mix));
}
