// What the bindings for the CPU and for CUDA have in common: the schemas of the kernels, checks of their arguments, and
// the conversion of tensors to the structs of cpu_kernels.h. An error names the argument.
//
// The schemas are those of the table in doodl_fast/ops/signatures.py; tests/ops/test_signatures.py compares them.
// The kernels take memory as flat, so a tensor has to fill its memory without gaps and overlaps (dense). The caller has
// to make sure that all tensors of a call have the same layout (doodl_fast/ops/layout.py).
#pragma once

#include "cpu_kernels.h"

#include <algorithm>
#include <array>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#define DF_COUPLING "float a, float c, float b, float? g"
#define DF_MIXING "bool target_first, float a0, float c0, float a1, float c1, "
#define SCHEMA_COUPLING "coupling(Tensor(a!) out, Tensor target, Tensor? source, Tensor? eps, " DF_COUPLING ") -> ()"
#define SCHEMA_COUPLING_VJP                                                                                   \
  "coupling_vjp(Tensor(a!) out, Tensor(b!)? out_source, Tensor(c!)? out_eps, Tensor grad, Tensor? scale, " DF_COUPLING \
  ") -> ()"
#define SCHEMA_COUPLING_MIX                                                                                \
  "coupling_mix(Tensor(a!) out_target, Tensor(b!) out_source, Tensor target, Tensor source, Tensor? eps, " \
  DF_MIXING DF_COUPLING ") -> ()"
#define SCHEMA_COUPLING_MIX_VJP                                                                                   \
  "coupling_mix_vjp(Tensor(a!) out_target, Tensor(b!) out_source, Tensor(c!)? out_eps, Tensor grad_target, Tensor " \
  "grad_source, Tensor? scale, " DF_MIXING DF_COUPLING ") -> ()"
#define SCHEMA_LATENT_UPDATE                                                                                         \
  "latent_update(Tensor(a!) out_x, Tensor(b!) out_y, Tensor(c!) out_mx, Tensor(d!) out_my, Tensor x, Tensor y, "     \
  "Tensor mx, Tensor my, Tensor gx, Tensor gy, Tensor? noise, Tensor? starts, float rate, float clip, float "        \
  "momentum, bool nesterov, bool tied, float sigma) -> ()"

namespace {

using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

doodl_fast::Dtype dtype_of(const char* name, const Tensor& tensor) {
  using torch::headeronly::ScalarType;
  switch (tensor.scalar_type()) {
    case ScalarType::Half:
      return doodl_fast::Dtype::f16;
    case ScalarType::BFloat16:
      return doodl_fast::Dtype::bf16;
    case ScalarType::Float:
      return doodl_fast::Dtype::f32;
    case ScalarType::Double:
      return doodl_fast::Dtype::f64;
    default:
      STD_TORCH_CHECK(false, name, ": expected fp16, bf16, fp32 or fp64");
  }
}

// Whether the elements fill one range of memory, each place once, in some order of the dimensions.
bool is_dense(const Tensor& tensor) {
  if (tensor.numel() == 0 || tensor.is_contiguous()) return true;
  std::vector<std::pair<int64_t, int64_t>> dims;  // (stride, size)
  for (int64_t i = 0; i < tensor.dim(); ++i)
    if (tensor.size(i) != 1) dims.emplace_back(tensor.stride(i), tensor.size(i));
  std::sort(dims.begin(), dims.end());
  int64_t expected = 1;
  for (const auto& [stride, size] : dims) {
    if (stride != expected) return false;
    expected *= size;
  }
  return true;
}

// Raises an error unless the tensor is dense, has `numel` elements and is on the device of `like`.
void check(const char* name, const Tensor& tensor, const Tensor& like, int64_t numel) {
  STD_TORCH_CHECK(tensor.numel() == numel, name, ": expected ", numel, " elements, got ", tensor.numel());
  STD_TORCH_CHECK(tensor.is_cuda() == like.is_cuda() && tensor.is_cpu() == like.is_cpu() &&
                      tensor.get_device_index() == like.get_device_index(),
                  name, ": expected the other tensors' device");
  STD_TORCH_CHECK(is_dense(tensor), name, ": expected dense memory, got expanded or strided; use contiguous()");
}

// Checks a tensor that is read. It must be on the device of `like` and, with `same`, have its dtype.
doodl_fast::In input(const char* name, const Tensor& tensor, const Tensor& like, int64_t numel, bool same = true) {
  check(name, tensor, like, numel);
  const doodl_fast::In in{tensor.const_data_ptr(), dtype_of(name, tensor)};
  STD_TORCH_CHECK(!same || in.dtype == dtype_of(name, like), name, ": expected the target's dtype");
  return in;
}

// Checks a tensor that is written, like `input`.
doodl_fast::Out output(const char* name, const Tensor& tensor, const Tensor& like, int64_t numel, bool same = true) {
  check(name, tensor, like, numel);
  const doodl_fast::Out out{tensor.mutable_data_ptr(), dtype_of(name, tensor)};
  STD_TORCH_CHECK(!same || out.dtype == dtype_of(name, like), name, ": expected the target's dtype");
  return out;
}

doodl_fast::CouplingCall coupling_call(const Tensor& out, const Tensor& target, const MaybeTensor& source,
                                       const MaybeTensor& eps, double a, double c, double b,
                                       const std::optional<double>& g) {
  doodl_fast::CouplingCall call;
  call.n = target.numel();
  call.target = input("target", target, target, call.n);
  call.out = output("out", out, target, call.n);
  if (source) call.source = input("source", *source, target, call.n);
  call.guided = g.has_value();
  if (eps) call.eps = input("eps", *eps, target, call.guided ? 2 * call.n : call.n, false);
  call.a = a, call.c = c, call.b = b, call.g = g.value_or(0);
  return call;
}

doodl_fast::VjpCall vjp_call(const Tensor& out, const MaybeTensor& out_source, const MaybeTensor& out_eps,
                             const Tensor& grad, double a, double c, double b, const std::optional<double>& g) {
  doodl_fast::VjpCall call;
  call.n = grad.numel();
  call.grad = input("grad", grad, grad, call.n);
  call.out = output("out", out, grad, call.n);
  if (out_source) call.out_source = output("out_source", *out_source, grad, call.n);
  call.guided = g.has_value();
  if (out_eps) call.out_eps = output("out_eps", *out_eps, grad, call.guided ? 2 * call.n : call.n, false);
  call.a = a, call.c = c, call.b = b, call.g = g.value_or(0);
  return call;
}

template <class Call>
void add_mixing(Call& call, bool target_first, double a0, double c0, double a1, double c1) {
  call.mixes = true;
  call.target_first = target_first;
  call.a0 = a0, call.c0 = c0, call.a1 = a1, call.c1 = c1;
}

doodl_fast::UpdateCall update_call(const std::array<Tensor, 4>& outs, const std::array<Tensor, 6>& ins,
                                   const MaybeTensor& noise, const MaybeTensor& starts) {
  const Tensor& like = ins[0];
  const int64_t n = like.numel();
  doodl_fast::UpdateCall call;
  call.is_double = dtype_of("x", like) == doodl_fast::Dtype::f64;
  STD_TORCH_CHECK(call.is_double || dtype_of("x", like) == doodl_fast::Dtype::f32, "x: expected fp32 or fp64");
  STD_TORCH_CHECK(n > 0 && like.dim() > 0, "x: expected elements and a batch dimension");
  call.batch = like.size(0);
  call.sample = n / call.batch;
  void** out_at[] = {&call.x, &call.y, &call.mx, &call.my};
  for (size_t i = 0; i < outs.size(); ++i) *out_at[i] = output("outputs", outs[i], like, n).data;
  const void** in_at[] = {&call.in_x, &call.in_y, &call.in_mx, &call.in_my, &call.gx, &call.gy};
  for (size_t i = 0; i < ins.size(); ++i) *in_at[i] = input("inputs", ins[i], like, n).data;
  if (noise) call.noise = input("noise", *noise, like, n).data;
  if (starts) {
    const doodl_fast::In in = input("starts", *starts, like, 2 * call.batch, false);
    STD_TORCH_CHECK(in.dtype == doodl_fast::Dtype::f64, "starts: expected fp64");
    call.starts = static_cast<const double*>(in.data);
  }
  return call;
}

}  // namespace
