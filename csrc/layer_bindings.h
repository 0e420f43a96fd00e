// What the CPU bindings of layers of frozen networks have in common: schemas, checks of arguments, and weights in the
// dtype of the arithmetic. The schemas are those of doodl_fast/ops/signatures.py.
#pragma once

#include "bindings.h"
#include "layers.h"
#include "scalar.h"

#include <torch/csrc/stable/ops.h>

#define SCHEMA_GROUP_NORM_SILU                                                                                       \
  "group_norm_silu(Tensor(a!) y, Tensor(b!) mean, Tensor(c!) rstd, Tensor x, Tensor? weight, Tensor? bias, int "     \
  "num_groups, float eps, bool silu) -> ()"
#define SCHEMA_GROUP_NORM_SILU_BACKWARD                                                                              \
  "group_norm_silu_backward(Tensor(a!) grad_x, Tensor grad_y, Tensor x, Tensor mean, Tensor rstd, Tensor? weight, "  \
  "Tensor? bias, int num_groups, bool silu) -> ()"
#define SCHEMA_GATED_ACTIVATION "gated_activation(Tensor(a!) y, Tensor x, int activation) -> ()"
#define SCHEMA_GATED_ACTIVATION_BACKWARD \
  "gated_activation_backward(Tensor(a!) grad_x, Tensor grad_y, Tensor x, int activation) -> ()"
#define SCHEMA_QUICK_GELU "quick_gelu(Tensor(a!) y, Tensor x) -> ()"
#define SCHEMA_QUICK_GELU_BACKWARD "quick_gelu_backward(Tensor(a!) grad_x, Tensor grad_y, Tensor x) -> ()"
#define SCHEMA_MODULATED_NORM                                                                                          \
  "modulated_norm(Tensor(a!) y, Tensor(b!) mean, Tensor(c!) rstd, Tensor x, Tensor? weight, Tensor? bias, Tensor? "    \
  "scale, Tensor? shift, float eps, bool center) -> ()"
#define SCHEMA_MODULATED_NORM_BACKWARD                                                                                 \
  "modulated_norm_backward(Tensor(a!) grad_x, Tensor grad_y, Tensor x, Tensor mean, Tensor rstd, Tensor? weight, "     \
  "Tensor? scale, bool center) -> ()"
#define SCHEMA_ROTARY_EMBEDDING "rotary_embedding(Tensor(a!) y, Tensor x, Tensor cos, Tensor sin, int pairs) -> ()"
#define SCHEMA_ROTARY_EMBEDDING_BACKWARD \
  "rotary_embedding_backward(Tensor(a!) grad_x, Tensor grad_y, Tensor cos, Tensor sin, int pairs) -> ()"

namespace {

constexpr int64_t TORCH_GRAIN = 32768;  // How many elements PyTorch gives to a thread at least.

// Returns how many of n elements PyTorch gives to a thread, of which none gets fewer than `grain`.
inline int64_t torch_range(int64_t n, int64_t grain) {
  const int64_t threads = torch::stable::get_num_threads(), parts = std::min(threads, (n + grain - 1) / grain);
  return n < grain ? n : (n + parts - 1) / parts;
}

// A vector of weights in the dtype of the arithmetic: the tensor's own memory if it has that dtype, else a copy.
class Weights {
 public:
  Weights(const char* name, const MaybeTensor& tensor, const Tensor& like, int64_t n, bool is_double) {
    if (!tensor) return;
    check(name, *tensor, like, n);
    const doodl_fast::Dtype dtype = dtype_of(name, *tensor), wanted =
                                        is_double ? doodl_fast::Dtype::f64 : doodl_fast::Dtype::f32;
    data_ = tensor->const_data_ptr();
    if (dtype == wanted) return;
    STD_TORCH_CHECK(dtype != doodl_fast::Dtype::f64, name, ": expected fp64 with a tensor in fp64 alone");
    std::vector<float> floats(n);
    for (int64_t i = 0; i < n; ++i) floats[i] = element(dtype, i);
    if (is_double) {
      doubles_.assign(floats.begin(), floats.end());
      data_ = doubles_.data();
    } else {
      floats_ = std::move(floats);
      data_ = floats_.data();
    }
  }
  Weights(const Weights&) = delete;
  const void* data() const { return data_; }

 private:
  float element(doodl_fast::Dtype dtype, int64_t i) const {
    if (dtype == doodl_fast::Dtype::f32) return static_cast<const float*>(data_)[i];
    const uint16_t bits = static_cast<const uint16_t*>(data_)[i];
    return dtype == doodl_fast::Dtype::f16 ? from_half(bits) : from_bf16(bits);
  }

  const void* data_ = nullptr;
  std::vector<float> floats_;
  std::vector<double> doubles_;
};

// Whether the channels of a tensor (N, C, ...) lie side by side in memory, in dense pixels.
bool is_channels_last(const Tensor& tensor) {
  if (tensor.dim() < 3 || tensor.stride(1) != 1) return false;
  int64_t expected = tensor.size(1);
  for (int64_t i = tensor.dim() - 1; i != 1; i = i == 2 ? 0 : i - 1) {
    if (tensor.size(i) != 1 && tensor.stride(i) != expected) return false;
    expected *= tensor.size(i);
    if (i == 0) break;
  }
  return true;
}

void check_strides(const char* name, const Tensor& tensor, const Tensor& like) {
  bool same = tensor.dim() == like.dim();
  for (int64_t i = 0; same && i < like.dim(); ++i)
    same = tensor.size(i) == like.size(i) && (tensor.size(i) == 1 || tensor.stride(i) == like.stride(i));
  STD_TORCH_CHECK(same, name, ": expected the shape and the strides of x");
}

}  // namespace
