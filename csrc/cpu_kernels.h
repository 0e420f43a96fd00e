// The interface between the bindings and the CPU kernels, which are compiled once for each instruction set. The CUDA
// kernels take the same structs.
#pragma once

#include <cstdint>

namespace doodl_fast {

enum class Dtype : int { f16, bf16, f32, f64 };

// Flat memory that is read. Under guidance eps has 2n elements, [uncond; cond].
struct In {
  const void* data = nullptr;
  Dtype dtype = Dtype::f32;
};

// Flat memory that is written.
struct Out {
  void* data = nullptr;
  Dtype dtype = Dtype::f32;
};

// A call of coupling or, with `mixes`, of coupling_mix.
struct CouplingCall {
  Out out, out_source;  // out_source is used by coupling_mix alone.
  In target, source, eps;
  bool mixes = false, guided = false;
  double a = 1, c = 0, b = 0, g = 0;
  bool target_first = true;
  double a0 = 1, c0 = 0, a1 = 1, c1 = 0;
  int64_t n = 0;
};

// A call of coupling_vjp or, with `mixes`, of coupling_mix_vjp.
struct VjpCall {
  Out out, out_source, out_eps;
  In grad, grad_source;
  bool mixes = false, guided = false;
  double scale = 1, a = 1, c = 0, b = 0, g = 0;
  bool target_first = true;
  double a0 = 1, c0 = 0, a1 = 1, c1 = 0;
  int64_t n = 0;
};

// A call of latent_update. The tensors are flat, (B, sample), and all float or all double.
struct UpdateCall {
  void *x = nullptr, *y = nullptr, *mx = nullptr, *my = nullptr;
  const void *in_x = nullptr, *in_y = nullptr, *in_mx = nullptr, *in_my = nullptr, *gx = nullptr, *gy = nullptr,
             *noise = nullptr;
  const double* starts = nullptr;  // The norms that x and y are scaled back to, (2, B), or null.
  int64_t batch = 0, sample = 0;
  double rate = 1, clip = 0, momentum = 0, sigma = 0;
  bool nesterov = false, tied = false, is_double = false;
};

// The kernels for one instruction set.
struct Kernels {
  const char* name;
  // These compute elements [begin, end) of a call.
  void (*coupling)(const CouplingCall&, int64_t begin, int64_t end);
  void (*vjp)(const VjpCall&, int64_t begin, int64_t end);
  // This one also adds up the squares of the new x and y, in an order that depends on the length of the range alone.
  void (*update)(const UpdateCall&, int64_t begin, int64_t end, double* square_x, double* square_y);
  // This one multiplies elements [begin, end) of x and y, which belong to one sample, by a factor each.
  void (*scale)(const UpdateCall&, double factor_x, double factor_y, int64_t begin, int64_t end);
};

const Kernels& kernels_default();
const Kernels* kernels_avx2();  // It is null if the compiler had no AVX2.

}  // namespace doodl_fast
