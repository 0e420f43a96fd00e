// The CPU library of the native backend: it registers the kernels with PyTorch by its stable ABI, checks arguments, and
// splits the work over PyTorch's threads.
#include "bindings.h"
#include "cpu_kernels.h"
#include "huge_pages.h"

#include <torch/csrc/stable/ops.h>

#include <cmath>

namespace {

using namespace doodl_fast;

// The kernels for the instruction set of this processor.
const Kernels& kernels() {
  static const Kernels* const chosen = [] {
#if defined(__x86_64__)
    if (kernels_avx2() && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c")) return kernels_avx2();
#endif
    return &kernels_default();
  }();
  return *chosen;
}

// Up to this many elements a second thread costs more time than it saves.
constexpr int64_t GRAIN = 32768;

template <class F>
void split(int64_t n, const F& work) {
  if (n <= GRAIN)
    work(int64_t(0), n);
  else
    torch::stable::parallel_for(0, n, GRAIN, work);
}

void coupling(Tensor out, Tensor target, MaybeTensor source, MaybeTensor eps, double a, double c, double b,
              std::optional<double> g) {
  CouplingCall call = coupling_call(out, target, source, eps, a, c, b, g);
  advise(out);
  split(call.n, [&](int64_t begin, int64_t end) { kernels().coupling(call, begin, end); });
}

void coupling_mix(Tensor out_target, Tensor out_source, Tensor target, Tensor source, MaybeTensor eps,
                  bool target_first, double a0, double c0, double a1, double c1, double a, double c, double b,
                  std::optional<double> g) {
  CouplingCall call = coupling_call(out_target, target, source, eps, a, c, b, g);
  add_mixing(call, target_first, a0, c0, a1, c1);
  call.out_source = output("out_source", out_source, target, call.n);
  advise(out_target), advise(out_source);
  split(call.n, [&](int64_t begin, int64_t end) { kernels().coupling(call, begin, end); });
}

// The value of the scale, or 1 if there is none.
double value_of(const MaybeTensor& scale, const Tensor& like) {
  if (!scale) return 1;
  check("scale", *scale, like, 1);
  const Dtype dtype = dtype_of("scale", *scale);
  STD_TORCH_CHECK(dtype == Dtype::f32 || dtype == Dtype::f64, "scale: expected fp32 or fp64");
  const void* data = scale->const_data_ptr();
  return dtype == Dtype::f64 ? *static_cast<const double*>(data) : double(*static_cast<const float*>(data));
}

void coupling_vjp(Tensor out, MaybeTensor out_source, MaybeTensor out_eps, Tensor grad, MaybeTensor scale, double a,
                  double c, double b, std::optional<double> g) {
  VjpCall call = vjp_call(out, out_source, out_eps, grad, a, c, b, g);
  call.scale = value_of(scale, grad);
  advise(out), advise(out_source), advise(out_eps);
  split(call.n, [&](int64_t begin, int64_t end) { kernels().vjp(call, begin, end); });
}

void coupling_mix_vjp(Tensor out_target, Tensor out_source, MaybeTensor out_eps, Tensor grad_target,
                      Tensor grad_source, MaybeTensor scale, bool target_first, double a0, double c0, double a1,
                      double c1, double a, double c, double b, std::optional<double> g) {
  VjpCall call = vjp_call(out_target, out_source, out_eps, grad_target, a, c, b, g);
  add_mixing(call, target_first, a0, c0, a1, c1);
  call.grad_source = input("grad_source", grad_source, grad_target, call.n);
  call.scale = value_of(scale, grad_target);
  advise(out_target), advise(out_source), advise(out_eps);
  split(call.n, [&](int64_t begin, int64_t end) { kernels().vjp(call, begin, end); });
}

// Sums of squares are computed over pieces of this fixed length and added up in order, so that the result does not
// depend on the number of threads.
constexpr int64_t PIECE = 4096;

// Scales every sample of x and y to the norm that it started with. sums: the sums of squares, (B, pieces, 2).
void rescale(const UpdateCall& call, const std::vector<double>& sums, int64_t pieces) {
  std::vector<double> factors(2 * call.batch);
  for (int64_t b = 0; b < call.batch; ++b)
    for (int64_t which = 0; which < 2; ++which) {
      double total = 0;
      for (int64_t piece = 0; piece < pieces; ++piece) total += sums[2 * (b * pieces + piece) + which];
      factors[2 * b + which] = call.starts[which * call.batch + b] / std::sqrt(total);
    }
  torch::stable::parallel_for(0, call.batch * pieces, GRAIN / PIECE, [&](int64_t first, int64_t last) {
    for (int64_t index = first; index < last; ++index) {
      const int64_t b = index / pieces, begin = b * call.sample + index % pieces * PIECE;
      kernels().scale(call, factors[2 * b], factors[2 * b + 1], begin, std::min(begin + PIECE, (b + 1) * call.sample));
    }
  });
}

void latent_update(Tensor out_x, Tensor out_y, Tensor out_mx, Tensor out_my, Tensor x, Tensor y, Tensor mx, Tensor my,
                   Tensor gx, Tensor gy, MaybeTensor noise, MaybeTensor starts, double rate, double clip,
                   double momentum, bool nesterov, bool tied, double sigma) {
  UpdateCall call = update_call({out_x, out_y, out_mx, out_my}, {x, y, mx, my, gx, gy}, noise, starts);
  call.rate = rate, call.clip = clip, call.momentum = momentum, call.sigma = sigma;
  call.nesterov = nesterov, call.tied = tied;
  advise(out_x), advise(out_y), advise(out_mx), advise(out_my);
  const int64_t pieces = (call.sample + PIECE - 1) / PIECE;
  std::vector<double> sums(starts ? 2 * call.batch * pieces : 0);
  torch::stable::parallel_for(0, call.batch * pieces, GRAIN / PIECE, [&](int64_t first, int64_t last) {
    for (int64_t index = first; index < last; ++index) {
      const int64_t b = index / pieces, begin = b * call.sample + index % pieces * PIECE;
      double* sum = starts ? &sums[2 * index] : nullptr;
      kernels().update(call, begin, std::min(begin + PIECE, (b + 1) * call.sample), sum, sum ? sum + 1 : nullptr);
    }
  });
  if (starts) rescale(call, sums, pieces);
}

std::string instruction_set() { return kernels().name; }

}  // namespace

STABLE_TORCH_LIBRARY(doodl_fast_native, library) {
  library.def(SCHEMA_COUPLING);
  library.def(SCHEMA_COUPLING_VJP);
  library.def(SCHEMA_COUPLING_MIX);
  library.def(SCHEMA_COUPLING_MIX_VJP);
  library.def(SCHEMA_LATENT_UPDATE);
  library.def("instruction_set() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(doodl_fast_native, CPU, library) {
  library.impl("coupling", TORCH_BOX(&coupling));
  library.impl("coupling_vjp", TORCH_BOX(&coupling_vjp));
  library.impl("coupling_mix", TORCH_BOX(&coupling_mix));
  library.impl("coupling_mix_vjp", TORCH_BOX(&coupling_mix_vjp));
  library.impl("latent_update", TORCH_BOX(&latent_update));
}

STABLE_TORCH_LIBRARY_IMPL(doodl_fast_native, CompositeExplicitAutograd, library) {
  library.impl("instruction_set", TORCH_BOX(&instruction_set));
}
