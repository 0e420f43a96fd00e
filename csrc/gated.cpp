// The bindings of gated activations, layers of frozen networks.
#include "huge_pages.h"
#include "layer_bindings.h"

#include <torch/csrc/stable/ops.h>

namespace {

using namespace doodl_fast;

// Fills the fields that say how PyTorch's own kernels would be run.
void set_torch(GatedCall& call) {
  constexpr int64_t GELU_DIVIDED = 16384;  // GELU divides more elements than these among all threads.
  const int64_t n = call.rows * call.half;
  const bool divided = call.activation != Activation::silu && n > GELU_DIVIDED;
  call.gradient_range = torch_range(n, TORCH_GRAIN);
  call.value_range = torch_range(n, divided ? n / torch::stable::get_num_threads() : TORCH_GRAIN);
  if (call.dtype == Dtype::f64 || call.activation == Activation::gelu_tanh) return;  // These have other bits anyway.
  call.tail_step = call.dtype == Dtype::f32 ? torch_step() : 2 * torch_step();
}

GatedCall gated_call(const Tensor& x, int64_t activation) {
  GatedCall call;
  STD_TORCH_CHECK(x.dim() > 0 && x.numel() > 0, "x: expected elements and at least one dimension");
  STD_TORCH_CHECK(x.size(x.dim() - 1) % 2 == 0, "x: expected an even last dimension");
  STD_TORCH_CHECK(x.is_contiguous(), "x: expected contiguous memory");
  STD_TORCH_CHECK(activation >= 0 && activation <= int64_t(Activation::silu), "activation: expected 0, 1 or 2");
  call.x = input("x", x, x, x.numel()).data;
  call.dtype = dtype_of("x", x);
  call.activation = Activation(activation);
  call.half = x.size(x.dim() - 1) / 2;
  call.rows = x.numel() / (2 * call.half);
  set_torch(call);
  return call;
}

void run(const GatedCall& call, void (*kernel)(const GatedCall&, int64_t, int64_t)) {
  const int64_t grain = std::max<int64_t>(1, 8192 / call.half);
  torch::stable::parallel_for(0, call.rows, grain, [&](int64_t begin, int64_t end) { kernel(call, begin, end); });
}

void gated_activation(Tensor y, Tensor x, int64_t activation) {
  GatedCall call = gated_call(x, activation);
  STD_TORCH_CHECK(y.is_contiguous(), "y: expected contiguous memory");
  call.y = output("y", y, x, x.numel() / 2).data;
  advise(y);
  run(call, layers().gated);
}

void gated_activation_backward(Tensor grad_x, Tensor grad_y, Tensor x, int64_t activation) {
  GatedCall call = gated_call(x, activation);
  STD_TORCH_CHECK(grad_x.is_contiguous(), "grad_x: expected contiguous memory");
  STD_TORCH_CHECK(grad_y.is_contiguous(), "grad_y: expected contiguous memory");
  call.grad_y = input("grad_y", grad_y, x, x.numel() / 2).data;
  call.grad_x = output("grad_x", grad_x, x, x.numel()).data;
  advise(grad_x);
  run(call, layers().gated_backward);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(doodl_fast_native, library) {
  library.def(SCHEMA_GATED_ACTIVATION);
  library.def(SCHEMA_GATED_ACTIVATION_BACKWARD);
}

STABLE_TORCH_LIBRARY_IMPL(doodl_fast_native, CPU, library) {
  library.impl("gated_activation", TORCH_BOX(&gated_activation));
  library.impl("gated_activation_backward", TORCH_BOX(&gated_activation_backward));
}
