// The bindings of rotary embeddings, which rotate the queries and keys of frozen networks.
#include "huge_pages.h"
#include "layer_bindings.h"

#include <torch/csrc/stable/ops.h>

namespace {

using namespace doodl_fast;

// Checks the arguments of both kernels, which read the one tensor and write the other.
RotaryCall rotary_call(const char* to, const Tensor& y, const char* from, const Tensor& x, const Tensor& cos,
                       const Tensor& sin, int64_t pairs) {
  RotaryCall call;
  STD_TORCH_CHECK(x.dim() == 4 && x.numel() > 0, from, ": expected elements and four dimensions");
  STD_TORCH_CHECK(x.size(3) % 2 == 0, from, ": expected an even last dimension");
  STD_TORCH_CHECK(x.is_contiguous(), from, ": expected contiguous memory");
  STD_TORCH_CHECK(y.is_contiguous(), to, ": expected contiguous memory");
  STD_TORCH_CHECK(pairs == 0 || pairs == 1, "pairs: expected 0 or 1");
  call.x = input(from, x, x, x.numel()).data, call.y = output(to, y, x, x.numel()).data;
  call.dtype = dtype_of(from, x);
  call.samples = x.size(0), call.tokens = x.size(1), call.heads = x.size(2), call.size = x.size(3);
  call.halves = pairs == 1, call.own_tables = cos.dim() == 3;
  const int64_t rows = call.tokens * (call.own_tables ? call.samples : 1);
  const Dtype wide = call.dtype == Dtype::f64 ? Dtype::f64 : Dtype::f32;
  for (const auto& [name, table] : {std::pair<const char*, const Tensor*>{"cos", &cos}, {"sin", &sin}}) {
    check(name, *table, x, rows * call.size);
    STD_TORCH_CHECK(table->is_contiguous() && dtype_of(name, *table) == wide,
                    name, ": expected contiguous memory in the dtype of the arithmetic");
  }
  call.cos = cos.const_data_ptr(), call.sin = sin.const_data_ptr();
  return call;
}

void run(const RotaryCall& call, void (*kernel)(const RotaryCall&, int64_t, int64_t, void*)) {
  const int64_t grain = std::max<int64_t>(1, 16384 / (call.heads * call.size));
  torch::stable::parallel_for(0, call.samples * call.tokens, grain, [&](int64_t begin, int64_t end) {
    std::vector<double> room(call.size);  // For the sines of a token, in whatever dtype.
    kernel(call, begin, end, room.data());
  });
}

void rotary_embedding(Tensor y, Tensor x, Tensor cos, Tensor sin, int64_t pairs) {
  const RotaryCall call = rotary_call("y", y, "x", x, cos, sin, pairs);
  advise(y);
  run(call, layers().rotary);
}

void rotary_embedding_backward(Tensor grad_x, Tensor grad_y, Tensor cos, Tensor sin, int64_t pairs) {
  const RotaryCall call = rotary_call("grad_x", grad_x, "grad_y", grad_y, cos, sin, pairs);
  advise(grad_x);
  run(call, layers().rotary_backward);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(doodl_fast_native, library) {
  library.def(SCHEMA_ROTARY_EMBEDDING);
  library.def(SCHEMA_ROTARY_EMBEDDING_BACKWARD);
}

STABLE_TORCH_LIBRARY_IMPL(doodl_fast_native, CPU, library) {
  library.impl("rotary_embedding", TORCH_BOX(&rotary_embedding));
  library.impl("rotary_embedding_backward", TORCH_BOX(&rotary_embedding_backward));
}
