// The interface between the bindings and the CPU kernels of layers of frozen networks, which are compiled once for each
// instruction set.
#pragma once

#include "cpu_kernels.h"

#include <cstdint>

namespace doodl_fast {

// A call of group_norm_silu or of group_norm_silu_backward on tensors (n, channels, pixels), or (n, pixels, channels) in
// memory if they are channels_last. x, y and the gradients have one dtype. The statistics, weight and bias have the dtype
// of the arithmetic: double for double, else float.
struct GroupNormCall {
  const void *x = nullptr, *grad_y = nullptr;
  void *y = nullptr, *grad_x = nullptr;
  void *mean = nullptr, *rstd = nullptr;                // (n, groups): the forward pass writes them, the other reads.
  const void *weight = nullptr, *bias = nullptr;        // (channels), or null
  Dtype dtype = Dtype::f32;
  int64_t n = 0, channels = 0, pixels = 0, groups = 0;
  double eps = 0;
  bool silu = false;
  // Where PyTorch's SiLU leaves its vector loop and calls the C library's exp: in the elements of every `tail_chunk`
  // (the range of a thread) after the last multiple of `tail_step`.
  int64_t tail_chunk = 1, tail_step = 1;
  // Whether PyTorch would use several threads. Its loop over the channels of a group is compiled in another way then.
  bool threaded = false;
};

// A range of pixels of one sample, for tensors that are channels_last, and numbers for each channel in the dtype of the
// arithmetic: the argument of SiLU is scale x + shift.
struct PixelRange {
  int64_t sample = 0, begin = 0, end = 0;
  const void *scale = nullptr, *shift = nullptr;
  const void* center = nullptr;   // What is subtracted from x before it is summed up.
  const void* factors = nullptr;  // (3, channels): grad_x = factors[0] gradient + factors[1] x + factors[2]
  double* sums = nullptr;         // (2, channels): what the two kernels that sum up add to.
};

enum class Activation : int64_t { gelu, gelu_tanh, silu };

// A call of gated_activation or of gated_activation_backward on rows of two halves, of `half` elements each: what is
// multiplied, and the activation's argument. The rows of y and grad_y have one half. All tensors have one dtype.
struct GatedCall {
  const void *x = nullptr, *grad_y = nullptr;
  void *y = nullptr, *grad_x = nullptr;
  Dtype dtype = Dtype::f32;
  Activation activation = Activation::gelu;
  int64_t rows = 0, half = 0;
  // The ranges of PyTorch's threads for the activation and for its gradient, in a tensor of the size of y. A row's end
  // ends a range, too. In each, PyTorch calls the C library for the elements after the last multiple of `tail_step`.
  int64_t value_range = 1, gradient_range = 1, tail_step = 1;
};

// A call of quick_gelu or of quick_gelu_backward on n elements. All tensors have one dtype.
struct QuickGeluCall {
  const void *x = nullptr, *grad_y = nullptr;
  void *y = nullptr, *grad_x = nullptr;
  Dtype dtype = Dtype::f32;
  int64_t n = 0;
  int64_t tail_chunk = 1, tail_step = 1;  // As in GroupNormCall, for PyTorch's sigmoid.
};

// A call of modulated_norm or of modulated_norm_backward on contiguous rows, of which each sample has `tokens`. x, y and
// the gradients have one dtype. The others have the dtype of the arithmetic: double for double, else float.
struct ModulatedNormCall {
  const void *x = nullptr, *grad_y = nullptr;
  void *y = nullptr, *grad_x = nullptr;
  void *mean = nullptr, *rstd = nullptr;          // (rows), which the forward pass writes. For RMSNorm mean is null.
  const void *weight = nullptr, *bias = nullptr;  // (channels), or null
  const void *scale = nullptr, *shift = nullptr;  // (samples, channels), or null
  Dtype dtype = Dtype::f32;
  int64_t samples = 0, rows = 0, tokens = 0, channels = 0;
  double eps = 0;
};

// A call of rotary_embedding or of rotary_embedding_backward on contiguous tensors (samples, tokens, heads, size), which
// reads x and writes y, the gradients in the second case. The tables (tokens, size), or (samples, tokens, size) if samples
// have their own, have the dtype of the arithmetic.
struct RotaryCall {
  const void* x = nullptr;
  void* y = nullptr;
  const void *cos = nullptr, *sin = nullptr;
  Dtype dtype = Dtype::f32;
  int64_t samples = 0, tokens = 0, heads = 0, size = 0;
  bool halves = false;  // Whether the channels of a pair are in the two halves of a head, or side by side.
  bool own_tables = false;
};

// The kernels for one instruction set.
struct LayerKernels {
  const char* name;
  // These compute the groups [begin, end) of n * groups, for tensors that are contiguous.
  void (*group_norm)(const GroupNormCall&, int64_t begin, int64_t end);
  void (*group_norm_backward)(const GroupNormCall&, int64_t begin, int64_t end);
  // These compute a range of pixels, for tensors that are channels_last.
  void (*pixel_moments)(const GroupNormCall&, const PixelRange&);        // sums: x - center, and its square
  void (*pixel_norm)(const GroupNormCall&, const PixelRange&);           // writes y
  void (*pixel_backward_sums)(const GroupNormCall&, const PixelRange&);  // sums: gradient, and times x - center
  void (*pixel_backward)(const GroupNormCall&, const PixelRange&);       // writes grad_x
  // These compute the rows [begin, end).
  void (*gated)(const GatedCall&, int64_t begin, int64_t end);
  void (*gated_backward)(const GatedCall&, int64_t begin, int64_t end);
  void (*quick_gelu)(const QuickGeluCall&, int64_t begin, int64_t end);  // Elements, not rows.
  void (*quick_gelu_backward)(const QuickGeluCall&, int64_t begin, int64_t end);
  void (*modulated_norm)(const ModulatedNormCall&, int64_t begin, int64_t end);
  void (*modulated_norm_backward)(const ModulatedNormCall&, int64_t begin, int64_t end);
  // These compute the tokens [begin, end) of all samples. room: memory for one row of a table
  void (*rotary)(const RotaryCall&, int64_t begin, int64_t end, void* room);
  void (*rotary_backward)(const RotaryCall&, int64_t begin, int64_t end, void* room);
};

const LayerKernels& layer_kernels_default();
const LayerKernels* layer_kernels_avx2();    // They are null if the compiler had not that instruction set.
const LayerKernels* layer_kernels_avx512();

const LayerKernels& layers();  // The kernels for this processor.
int64_t torch_step();          // How many floats PyTorch's loops over vectors handle at once on this processor.

}  // namespace doodl_fast
