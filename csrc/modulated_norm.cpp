// The bindings of LayerNorm and RMSNorm with a modulation, layers of frozen networks.
#include "huge_pages.h"
#include "layer_bindings.h"

#include <torch/csrc/stable/ops.h>

namespace {

using namespace doodl_fast;

ModulatedNormCall norm_call(const Tensor& x, const Tensor& mean, const Tensor& rstd, bool center) {
  ModulatedNormCall call;
  STD_TORCH_CHECK(x.dim() >= 2 && x.numel() > 0, "x: expected elements and at least two dimensions");
  STD_TORCH_CHECK(x.is_contiguous(), "x: expected contiguous memory");
  call.x = input("x", x, x, x.numel()).data;
  call.dtype = dtype_of("x", x);
  call.samples = x.size(0), call.channels = x.size(x.dim() - 1);
  call.rows = x.numel() / call.channels, call.tokens = call.rows / call.samples;
  const Dtype wide = call.dtype == Dtype::f64 ? Dtype::f64 : Dtype::f32;
  check("rstd", rstd, x, call.rows), check("mean", mean, x, center ? call.rows : 0);
  STD_TORCH_CHECK(rstd.is_contiguous() && dtype_of("rstd", rstd) == wide && dtype_of("mean", mean) == wide,
                  "mean, rstd: expected contiguous memory in the dtype of the arithmetic");
  return call;
}

void run(const ModulatedNormCall& call, void (*kernel)(const ModulatedNormCall&, int64_t, int64_t)) {
  const int64_t grain = std::max<int64_t>(1, 16384 / call.channels);
  torch::stable::parallel_for(0, call.rows, grain, [&](int64_t begin, int64_t end) { kernel(call, begin, end); });
}

void modulated_norm(Tensor y, Tensor mean, Tensor rstd, Tensor x, MaybeTensor weight, MaybeTensor bias, MaybeTensor scale,
                    MaybeTensor shift, double eps, bool center) {
  ModulatedNormCall call = norm_call(x, mean, rstd, center);
  const bool is_double = call.dtype == Dtype::f64;
  const int64_t all = call.samples * call.channels;
  const Weights weights("weight", weight, x, call.channels, is_double), biases("bias", bias, x, call.channels, is_double);
  const Weights scales("scale", scale, x, all, is_double), shifts("shift", shift, x, all, is_double);
  STD_TORCH_CHECK(y.is_contiguous(), "y: expected contiguous memory");
  call.y = output("y", y, x, x.numel()).data;
  call.mean = center ? mean.mutable_data_ptr() : nullptr, call.rstd = rstd.mutable_data_ptr();
  call.weight = weights.data(), call.bias = biases.data(), call.scale = scales.data(), call.shift = shifts.data();
  call.eps = eps;
  advise(y);
  run(call, layers().modulated_norm);
}

void modulated_norm_backward(Tensor grad_x, Tensor grad_y, Tensor x, Tensor mean, Tensor rstd, MaybeTensor weight,
                             MaybeTensor scale, bool center) {
  ModulatedNormCall call = norm_call(x, mean, rstd, center);
  const bool is_double = call.dtype == Dtype::f64;
  const Weights weights("weight", weight, x, call.channels, is_double);
  const Weights scales("scale", scale, x, call.samples * call.channels, is_double);
  STD_TORCH_CHECK(grad_x.is_contiguous(), "grad_x: expected contiguous memory");
  STD_TORCH_CHECK(grad_y.is_contiguous(), "grad_y: expected contiguous memory");
  call.grad_y = input("grad_y", grad_y, x, x.numel()).data;
  call.grad_x = output("grad_x", grad_x, x, x.numel()).data;
  call.mean = center ? const_cast<void*>(mean.const_data_ptr()) : nullptr;
  call.rstd = const_cast<void*>(rstd.const_data_ptr());
  call.weight = weights.data(), call.scale = scales.data();
  advise(grad_x);
  run(call, layers().modulated_norm_backward);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(doodl_fast_native, library) {
  library.def(SCHEMA_MODULATED_NORM);
  library.def(SCHEMA_MODULATED_NORM_BACKWARD);
}

STABLE_TORCH_LIBRARY_IMPL(doodl_fast_native, CPU, library) {
  library.impl("modulated_norm", TORCH_BOX(&modulated_norm));
  library.impl("modulated_norm_backward", TORCH_BOX(&modulated_norm_backward));
}
