// What the bindings ask of the CPU kernels, which are compiled once for each instruction set.
#pragma once

#include <cstdint>

namespace doodl_fast {

enum class Dtype : int { f16, bf16, f32, f64 };

// Flat memory of one dtype. Under guidance eps has 2n elements, [uncond; cond].
struct In {
  const void* data = nullptr;
  Dtype dtype = Dtype::f32;
};

struct Out {
  void* data = nullptr;
  Dtype dtype = Dtype::f32;
};

struct CouplingCall {
  Out out, out_source;  // out_source: coupling_mix only
  In target, source, eps;
  bool mixes = false, guided = false;
  double a = 1, c = 0, b = 0, g = 0;
  bool target_first = true;
  double a0 = 1, c0 = 0, a1 = 1, c1 = 0;
  int64_t n = 0;
};

struct VjpCall {
  Out out, out_source, out_eps;
  In grad, grad_source;
  bool mixes = false, guided = false;
  double scale = 1, a = 1, c = 0, b = 0, g = 0;
  bool target_first = true;
  double a0 = 1, c0 = 0, a1 = 1, c1 = 0;
  int64_t n = 0;
};

// A pair of latents, (B, sample) flat; always float or double.
struct UpdateCall {
  void *x = nullptr, *y = nullptr, *mx = nullptr, *my = nullptr;
  const void *in_x = nullptr, *in_y = nullptr, *in_mx = nullptr, *in_my = nullptr, *gx = nullptr, *gy = nullptr,
             *noise = nullptr;
  const double* starts = nullptr;  // (2, B), the norms that x and y are scaled back to; null: they are not
  int64_t batch = 0, sample = 0;
  double rate = 1, clip = 0, momentum = 0, sigma = 0;
  bool nesterov = false, tied = false, is_double = false;
};

struct Kernels {
  const char* name;
  // elements [begin, end) of a call
  void (*coupling)(const CouplingCall&, int64_t begin, int64_t end);
  void (*vjp)(const VjpCall&, int64_t begin, int64_t end);
  // also adds up the squares of the new x and y over the range, in an order that depends on its length alone
  void (*update)(const UpdateCall&, int64_t begin, int64_t end, double* square_x, double* square_y);
  // elements [begin, end) of x and y, of one sample, times a factor each
  void (*scale)(const UpdateCall&, double factor_x, double factor_y, int64_t begin, int64_t end);
};

const Kernels& kernels_default();
const Kernels* kernels_avx2();  // null where it was not compiled

}  // namespace doodl_fast
