// The lattice couplings on the CPU. They are compiled for one instruction set only, because integer divisions, which
// are most of the work, are not vectorised by any.
#include "cpu_kernels_impl.h"
#include "lattice_bindings.h"

#include <torch/csrc/stable/ops.h>

namespace {

constexpr int64_t LATTICE_GRAIN = 4096;

template <class S, Eps eps, bool mixes>
void lattice_range(const LatticeCall& call, int64_t begin, int64_t end) {
  alignas(64) double u_[BLOCK], v_[BLOCK];
  LatticeFaults faults;
  for (int64_t at = begin; at < end; at += BLOCK) {
    const int64_t n = end - at < BLOCK ? end - at : BLOCK;
    const double* u = eps != Eps::none ? load(call.eps, at, n, u_) : nullptr;
    const double* v = eps == Eps::guided ? load(call.eps, call.n + at, n, v_) : nullptr;
    for (int64_t i = 0; i < n; ++i)
      lattice_element<S, eps, mixes>(call, at + i, eps != Eps::none ? u[i] : 0, eps == Eps::guided ? v[i] : 0, faults);
  }
  if (faults.outside) __atomic_store_n(call.faults, 1, __ATOMIC_RELAXED);  // Other threads may write the same value.
  if (faults.infinite) __atomic_store_n(call.faults + 1, 1, __ATOMIC_RELAXED);
}

void run_lattice(const LatticeCall& call) {
  with_lattice_kind(call, [&](auto integer, auto eps, auto mixes) {
    const auto work = [&](int64_t begin, int64_t end) {
      lattice_range<decltype(integer), decltype(eps)::value, decltype(mixes)::value>(call, begin, end);
    };
    if (call.n <= LATTICE_GRAIN)
      work(int64_t(0), call.n);
    else
      torch::stable::parallel_for(0, call.n, LATTICE_GRAIN, work);
  });
}

void lattice_coupling(Tensor out, Tensor target, Tensor source, MaybeTensor eps, Tensor faults, int64_t row, double c,
                      double b, std::optional<double> g, bool undo) {
  run_lattice(lattice_call(out, target, source, eps, faults, row, c, b, g, undo));
}

void lattice_mix(Tensor out_target, Tensor out_source, Tensor out_target_buffer, Tensor out_source_buffer,
                 Tensor target, Tensor source, Tensor target_buffer, Tensor source_buffer, MaybeTensor eps,
                 Tensor faults, int64_t row, bool target_first, int64_t by0, int64_t over0, double c0, int64_t by1,
                 int64_t over1, double c1, double c, double b, std::optional<double> g, bool undo) {
  LatticeCall call = lattice_call(out_target, target, source, eps, faults, row, c, b, g, undo);
  add_lattice_mixing(call, target, {out_source, out_target_buffer, out_source_buffer}, {target_buffer, source_buffer},
                     target_first, stage(by0, over0, c0), stage(by1, over1, c1));
  run_lattice(call);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(doodl_fast_native, library) {
  library.def(SCHEMA_LATTICE_COUPLING);
  library.def(SCHEMA_LATTICE_MIX);
}

STABLE_TORCH_LIBRARY_IMPL(doodl_fast_native, CPU, library) {
  library.impl("lattice_coupling", TORCH_BOX(&lattice_coupling));
  library.impl("lattice_mix", TORCH_BOX(&lattice_mix));
}
