// What the bindings of the lattice couplings for the CPU and for CUDA have in common: schemas, checks of arguments, and
// the conversion of tensors to the struct of lattice.h. The rules are those of bindings.h.
#pragma once

#include "bindings.h"
#include "lattice.h"

#define SCHEMA_LATTICE_COUPLING                                                                                    \
  "lattice_coupling(Tensor(a!) out, Tensor target, Tensor source, Tensor? eps, Tensor(b!) faults, int row, float c, " \
  "float b, float? g, bool undo) -> ()"
#define SCHEMA_LATTICE_MIX                                                                                          \
  "lattice_mix(Tensor(a!) out_target, Tensor(b!) out_source, Tensor(c!) out_target_buffer, Tensor(d!) "             \
  "out_source_buffer, Tensor target, Tensor source, Tensor target_buffer, Tensor source_buffer, Tensor? eps, "      \
  "Tensor(e!) faults, int row, bool target_first, int by0, int over0, float c0, int by1, int over1, float c1, float " \
  "c, float b, float? g, bool undo) -> ()"

namespace {

bool is_wide(const char* name, const Tensor& tensor) {
  using torch::headeronly::ScalarType;
  const ScalarType type = tensor.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Int || type == ScalarType::Long, name, ": expected int32 or int64");
  return type == ScalarType::Long;
}

// Checks a tensor of integers. It must be int32 if it holds `words`, and else have the dtype of `like`.
void check_integers(const char* name, const Tensor& tensor, const Tensor& like, int64_t numel, bool words = false) {
  check(name, tensor, like, numel);
  STD_TORCH_CHECK(is_wide(name, tensor) == (!words && is_wide("target", like)), name,
                  words ? ": expected int32" : ": expected the target's dtype");
}

LatticeCall lattice_call(const Tensor& out, const Tensor& target, const Tensor& source, const MaybeTensor& eps,
                         const Tensor& faults, int64_t row, double c, double b, const std::optional<double>& g,
                         bool undo) {
  LatticeCall call;
  call.n = target.numel();
  call.wide = is_wide("target", target);
  check_integers("target", target, target, call.n);
  check_integers("out", out, target, call.n);
  check_integers("source", source, target, call.n);
  call.out = out.mutable_data_ptr();
  call.target = target.const_data_ptr();
  call.source = source.const_data_ptr();
  call.guided = g.has_value();
  if (eps) call.eps = input("eps", *eps, target, call.guided ? 2 * call.n : call.n, false);
  STD_TORCH_CHECK(row >= 0 && row < faults.numel() / 2, "row: expected one of the faults' rows, got ", row);
  check_integers("faults", faults, target, faults.numel(), true);
  call.faults = static_cast<int32_t*>(faults.mutable_data_ptr()) + 2 * row;
  call.c = c, call.b = b, call.g = g.value_or(0), call.undo = undo;
  return call;
}

LatticeStage stage(int64_t by, int64_t over, double c) {
  STD_TORCH_CHECK(by > 0 && by <= LARGEST_FACTOR && over > 0 && over <= LARGEST_FACTOR,
                  "by, over: expected integers from 1 to ", LARGEST_FACTOR, ", got ", by, " and ", over);
  return {uint32_t(by), uint32_t(over), c};
}

// Adds the mixing to a call. outs: the new source, target's buffer and source's buffer; buffers: target's and source's.
void add_lattice_mixing(LatticeCall& call, const Tensor& like, const std::array<Tensor, 3>& outs,
                        const std::array<Tensor, 2>& buffers, bool target_first, const LatticeStage& first,
                        const LatticeStage& second) {
  const int64_t size = buffers[0].numel();
  const int64_t num_words = call.n ? size / call.n : 1;
  STD_TORCH_CHECK(num_words > 0 && num_words < (int64_t(1) << 31),
                  "target_buffer: expected at least one word for each element");
  call.num_words = int(num_words);
  check_integers("out_source", outs[0], like, call.n);
  check_integers("out_target_buffer", outs[1], like, size, true);
  check_integers("out_source_buffer", outs[2], like, size, true);
  check_integers("target_buffer", buffers[0], like, num_words * call.n, true);
  check_integers("source_buffer", buffers[1], like, size, true);
  call.out_source = outs[0].mutable_data_ptr();
  call.out_words = static_cast<int32_t*>(outs[1].mutable_data_ptr());
  call.out_source_words = static_cast<int32_t*>(outs[2].mutable_data_ptr());
  call.words = static_cast<const int32_t*>(buffers[0].const_data_ptr());
  call.source_words = static_cast<const int32_t*>(buffers[1].const_data_ptr());
  call.mixes = true, call.target_first = target_first, call.first = first, call.second = second;
}

// Calls f with a value of the lattice's integer type, of which only the type matters, and with Eps and mixes as
// constants.
template <class F>
void with_lattice_kind(const LatticeCall& call, const F& f) {
  const auto mixes = [&](auto integer, auto eps) {
    call.mixes ? f(integer, eps, std::true_type{}) : f(integer, eps, std::false_type{});
  };
  const auto kind = [&](auto integer) {
    if (!call.eps.data) return mixes(integer, std::integral_constant<Eps, Eps::none>{});
    if (call.guided) return mixes(integer, std::integral_constant<Eps, Eps::guided>{});
    return mixes(integer, std::integral_constant<Eps, Eps::plain>{});
  };
  call.wide ? kind(int64_t{}) : kind(int32_t{});
}

}  // namespace
