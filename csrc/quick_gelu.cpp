// The bindings of quick GELU, a layer of frozen networks.
#include "huge_pages.h"
#include "layer_bindings.h"

namespace {

using namespace doodl_fast;

QuickGeluCall quick_gelu_call(const Tensor& x) {
  QuickGeluCall call;
  STD_TORCH_CHECK(x.numel() > 0, "x: expected elements");
  STD_TORCH_CHECK(x.is_contiguous(), "x: expected contiguous memory");
  call.x = input("x", x, x, x.numel()).data;
  call.dtype = dtype_of("x", x);
  call.n = x.numel();
  call.tail_chunk = torch_range(call.n, TORCH_GRAIN);
  if (call.dtype != Dtype::f64) call.tail_step = call.dtype == Dtype::f32 ? torch_step() : 2 * torch_step();
  return call;
}

void run(const QuickGeluCall& call, void (*kernel)(const QuickGeluCall&, int64_t, int64_t)) {
  torch::stable::parallel_for(0, call.n, 8192, [&](int64_t begin, int64_t end) { kernel(call, begin, end); });
}

void quick_gelu(Tensor y, Tensor x) {
  QuickGeluCall call = quick_gelu_call(x);
  STD_TORCH_CHECK(y.is_contiguous(), "y: expected contiguous memory");
  call.y = output("y", y, x, x.numel()).data;
  advise(y);
  run(call, layers().quick_gelu);
}

void quick_gelu_backward(Tensor grad_x, Tensor grad_y, Tensor x) {
  QuickGeluCall call = quick_gelu_call(x);
  STD_TORCH_CHECK(grad_x.is_contiguous(), "grad_x: expected contiguous memory");
  STD_TORCH_CHECK(grad_y.is_contiguous(), "grad_y: expected contiguous memory");
  call.grad_y = input("grad_y", grad_y, x, x.numel()).data;
  call.grad_x = output("grad_x", grad_x, x, x.numel()).data;
  advise(grad_x);
  run(call, layers().quick_gelu_backward);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(doodl_fast_native, library) {
  library.def(SCHEMA_QUICK_GELU);
  library.def(SCHEMA_QUICK_GELU_BACKWARD);
}

STABLE_TORCH_LIBRARY_IMPL(doodl_fast_native, CPU, library) {
  library.impl("quick_gelu", TORCH_BOX(&quick_gelu));
  library.impl("quick_gelu_backward", TORCH_BOX(&quick_gelu_backward));
}
