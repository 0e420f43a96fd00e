// The part of the CPU library that computes layers of frozen networks.
#include "huge_pages.h"
#include "layer_bindings.h"

#include <torch/csrc/stable/ops.h>

#include <cstdlib>
#include <cstring>

namespace {

using namespace doodl_fast;

// PyTorch's own environment variable for the instruction set of its kernels is followed, so that the bits stay the same.
bool torch_is_limited_to(const char* name) {
  const char* limit = std::getenv("ATEN_CPU_CAPABILITY");
  return limit && std::strcmp(limit, name) == 0;
}

bool has_avx512() {
#if defined(__x86_64__)
  return !torch_is_limited_to("default") && !torch_is_limited_to("avx2") && __builtin_cpu_supports("avx512f") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("fma");
#else
  return false;
#endif
}

}  // namespace

namespace doodl_fast {

const LayerKernels& layers() {
  static const LayerKernels* const chosen = [] {
#if defined(__x86_64__)
    if (layer_kernels_avx512() && has_avx512()) return layer_kernels_avx512();
    if (layer_kernels_avx2() && !torch_is_limited_to("default") && __builtin_cpu_supports("avx2") &&
        __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
      return layer_kernels_avx2();
#endif
    return &layer_kernels_default();
  }();
  return *chosen;
}

int64_t torch_step() {
  static const int64_t step = has_avx512() ? 32 : 16;  // Two vectors.
  return step;
}

}  // namespace doodl_fast

namespace {

// Fills the fields that say how PyTorch's own kernels would be run.
void set_torch(GroupNormCall& call) {
  call.tail_chunk = torch_range(call.n * call.channels * call.pixels, TORCH_GRAIN);
  call.tail_step = call.dtype == Dtype::f32 ? torch_step() : 1;
  call.threaded = torch::stable::get_num_threads() > 1 && call.n * call.groups > 1;
}

GroupNormCall group_norm_call(const Tensor& x, const Tensor& mean, const Tensor& rstd, int64_t num_groups, bool silu) {
  GroupNormCall call;
  STD_TORCH_CHECK(x.dim() >= 2 && x.numel() > 0, "x: expected elements and at least two dimensions");
  call.n = x.size(0), call.channels = x.size(1), call.groups = num_groups, call.silu = silu;
  STD_TORCH_CHECK(num_groups > 0 && call.channels % num_groups == 0, "num_groups: expected a divisor of the channels");
  call.pixels = x.numel() / (call.n * call.channels);
  call.dtype = dtype_of("x", x);
  call.x = input("x", x, x, x.numel()).data;
  const Dtype wide = call.dtype == Dtype::f64 ? Dtype::f64 : Dtype::f32;
  for (const auto& [name, tensor] : {std::pair<const char*, const Tensor*>{"mean", &mean}, {"rstd", &rstd}}) {
    check(name, *tensor, x, call.n * num_groups);
    STD_TORCH_CHECK(tensor->is_contiguous() && dtype_of(name, *tensor) == wide,
                    name, ": expected contiguous memory in the dtype of the arithmetic");
  }
  set_torch(call);
  return call;
}

// Tensors that are channels_last are computed in pieces of about this many elements, which do not depend on the number
// of threads, so that neither do the sums.
constexpr int64_t PIECE = 65536;

struct Pieces {
  explicit Pieces(const GroupNormCall& call)
      : pixels(std::max<int64_t>(32, PIECE / call.channels / 32 * 32)),
        each((call.pixels + pixels - 1) / pixels),
        count(call.n * each) {}

  PixelRange range(const GroupNormCall& call, int64_t piece) const {
    PixelRange range;
    range.sample = piece / each;
    range.begin = piece % each * pixels;
    range.end = std::min(range.begin + pixels, call.pixels);
    return range;
  }

  template <class F>
  void run(const F& work) const {
    torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t piece = begin; piece < end; ++piece) work(piece);
    });
  }

  int64_t pixels, each, count;  // Pixels of a piece, pieces of a sample, pieces altogether.
};

// GroupNorm of tensors that are channels_last. T: the dtype of the arithmetic.
template <class T>
class ChannelsLast {
 public:
  explicit ChannelsLast(const GroupNormCall& call)
      : call_(call), pieces_(call), per_group_(call.channels / call.groups), sums_(2 * call.channels * pieces_.count) {}

  void forward() {
    const std::vector<T> centers = near_means();
    sum([&](PixelRange& range) { range.center = &centers[range.sample * call_.channels]; }, layers().pixel_moments);
    for (int64_t group = 0; group < call_.n * call_.groups; ++group) set_statistics(group, centers);
    prepare_affine();
    pieces_.run([&](int64_t piece) {
      PixelRange range = pieces_.range(call_, piece);
      set_affine(range);
      layers().pixel_norm(call_, range);
    });
  }

  void backward() {
    prepare_affine();
    std::vector<T> centers(call_.n * call_.channels);
    for (size_t i = 0; i < centers.size(); ++i) centers[i] = static_cast<const T*>(call_.mean)[i / per_group_];
    sum(
        [&](PixelRange& range) {
          range.center = &centers[range.sample * call_.channels];
          set_affine(range);
        },
        layers().pixel_backward_sums);
    std::vector<T> factors(3 * call_.n * call_.channels);
    for (int64_t group = 0; group < call_.n * call_.groups; ++group) set_factors(group, factors);
    pieces_.run([&](int64_t piece) {
      PixelRange range = pieces_.range(call_, piece);
      set_affine(range);
      range.factors = &factors[3 * range.sample * call_.channels];
      layers().pixel_backward(call_, range);
    });
  }

 private:
  // Returns a number for each channel of each sample that is near its mean: the mean of up to 16 of its pixels.
  std::vector<T> near_means() const {
    const int64_t taken = std::min<int64_t>(call_.pixels, 16), step = call_.pixels / taken;
    std::vector<T> centers(call_.n * call_.channels), sums(call_.channels);
    for (int64_t sample = 0; sample < call_.n; ++sample) {
      std::vector<double> found(2 * call_.channels);
      const std::vector<T> zeros(call_.channels);
      for (int64_t i = 0; i < taken; ++i) {
        PixelRange range;
        range.sample = sample, range.begin = i * step, range.end = i * step + 1;
        range.center = zeros.data(), range.sums = found.data();
        layers().pixel_moments(call_, range);
      }
      for (int64_t c = 0; c < call_.channels; ++c) centers[sample * call_.channels + c] = T(found[c] / taken);
    }
    return centers;
  }

  // Runs one of the kernels that sum up over all pieces, and adds the sums of each sample's pieces up.
  template <class F>
  void sum(const F& prepare, void (*kernel)(const GroupNormCall&, const PixelRange&)) {
    std::fill(sums_.begin(), sums_.end(), 0.0);
    pieces_.run([&](int64_t piece) {
      PixelRange range = pieces_.range(call_, piece);
      prepare(range);
      range.sums = &sums_[2 * call_.channels * piece];
      kernel(call_, range);
    });
    for (int64_t sample = 0; sample < call_.n; ++sample)
      for (int64_t piece = 1; piece < pieces_.each; ++piece)
        for (int64_t i = 0; i < 2 * call_.channels; ++i) sums_of(sample)[i] += sums_of(sample)[2 * call_.channels * piece + i];
  }

  double* sums_of(int64_t sample) { return &sums_[2 * call_.channels * pieces_.each * sample]; }

  // Computes mean and rstd of a group from the sums of its channels, as Chan et al. combine moments.
  void set_statistics(int64_t group, const std::vector<T>& centers) {
    const int64_t first = group * per_group_, sample = group / call_.groups;
    const double* sums = sums_of(sample) + first % call_.channels;
    const double pixels = double(call_.pixels);
    double mean = 0, squares = 0;
    for (int64_t i = 0; i < per_group_; ++i) mean += double(centers[first + i]) + sums[i] / pixels;
    mean /= double(per_group_);
    for (int64_t i = 0; i < per_group_; ++i) {
      const double away = double(centers[first + i]) + sums[i] / pixels - mean;
      squares += sums[call_.channels + i] - sums[i] * sums[i] / pixels + pixels * away * away;
    }
    const double variance = std::max(0.0, squares / (pixels * double(per_group_)));
    static_cast<T*>(call_.mean)[group] = T(mean);
    static_cast<T*>(call_.rstd)[group] = T(1 / std::sqrt(variance + call_.eps));
  }

  // Prepares what turns x into the argument of SiLU, for each channel of each sample.
  void prepare_affine() {
    scale_.resize(call_.n * call_.channels);
    shift_.resize(scale_.size());
    for (int64_t i = 0; i < int64_t(scale_.size()); ++i) {
      const int64_t channel = i % call_.channels;
      const T mean = static_cast<const T*>(call_.mean)[i / per_group_];
      const T rstd = static_cast<const T*>(call_.rstd)[i / per_group_];
      scale_[i] = rstd * weight(channel);
      shift_[i] = T((call_.bias ? double(static_cast<const T*>(call_.bias)[channel]) : 0.0) - double(scale_[i]) * mean);
    }
  }

  void set_affine(PixelRange& range) const {
    range.scale = &scale_[range.sample * call_.channels];
    range.shift = &shift_[range.sample * call_.channels];
  }

  T weight(int64_t channel) const { return call_.weight ? static_cast<const T*>(call_.weight)[channel] : T(1); }

  void set_factors(int64_t group, std::vector<T>& factors) {
    const int64_t first = group * per_group_ % call_.channels, sample = group / call_.groups;
    const double* sums = sums_of(sample) + first;
    const double mean = static_cast<const T*>(call_.mean)[group], rstd = static_cast<const T*>(call_.rstd)[group];
    double gradient = 0, product = 0;
    for (int64_t i = 0; i < per_group_; ++i) {
      gradient += sums[i] * double(weight(first + i));
      product += sums[call_.channels + i] * double(weight(first + i));
    }
    const double count = double(call_.pixels * per_group_), by_x = -product * rstd * rstd * rstd / count;
    T* const out = &factors[3 * sample * call_.channels + first];
    for (int64_t i = 0; i < per_group_; ++i) {
      out[i] = T(rstd * double(weight(first + i)));
      out[call_.channels + i] = T(by_x);
      out[2 * call_.channels + i] = T(-double(T(by_x)) * mean - gradient * rstd / count);
    }
  }

  const GroupNormCall& call_;
  const Pieces pieces_;
  const int64_t per_group_;
  std::vector<double> sums_;
  std::vector<T> scale_, shift_;
};

// Runs a pass over groups or, for tensors that are channels_last, over pixels.
void run(const GroupNormCall& call, const Tensor& x, bool forward) {
  if (!x.is_contiguous()) {
    STD_TORCH_CHECK(is_channels_last(x), "x: expected memory that is contiguous or channels_last");
    if (call.dtype == Dtype::f64)
      forward ? ChannelsLast<double>(call).forward() : ChannelsLast<double>(call).backward();
    else
      forward ? ChannelsLast<float>(call).forward() : ChannelsLast<float>(call).backward();
    return;
  }
  torch::stable::parallel_for(0, call.n * call.groups, 1, [&](int64_t begin, int64_t end) {
    (forward ? layers().group_norm : layers().group_norm_backward)(call, begin, end);
  });
}

void group_norm_silu(Tensor y, Tensor mean, Tensor rstd, Tensor x, MaybeTensor weight, MaybeTensor bias,
                     int64_t num_groups, double eps, bool silu) {
  GroupNormCall call = group_norm_call(x, mean, rstd, num_groups, silu);
  const bool is_double = call.dtype == Dtype::f64;
  const Weights weights("weight", weight, x, call.channels, is_double), biases("bias", bias, x, call.channels, is_double);
  check_strides("y", y, x);
  call.y = output("y", y, x, x.numel()).data;
  call.mean = mean.mutable_data_ptr(), call.rstd = rstd.mutable_data_ptr();
  call.weight = weights.data(), call.bias = biases.data(), call.eps = eps;
  advise(y);
  run(call, x, true);
}

void group_norm_silu_backward(Tensor grad_x, Tensor grad_y, Tensor x, Tensor mean, Tensor rstd, MaybeTensor weight,
                              MaybeTensor bias, int64_t num_groups, bool silu) {
  GroupNormCall call = group_norm_call(x, mean, rstd, num_groups, silu);
  const bool is_double = call.dtype == Dtype::f64;
  const Weights weights("weight", weight, x, call.channels, is_double), biases("bias", bias, x, call.channels, is_double);
  check_strides("grad_x", grad_x, x), check_strides("grad_y", grad_y, x);
  call.grad_y = input("grad_y", grad_y, x, x.numel()).data;
  call.grad_x = output("grad_x", grad_x, x, x.numel()).data;
  call.mean = const_cast<void*>(mean.const_data_ptr()), call.rstd = const_cast<void*>(rstd.const_data_ptr());
  call.weight = weights.data(), call.bias = biases.data();
  advise(grad_x);
  run(call, x, false);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(doodl_fast_native, library) {
  library.def(SCHEMA_GROUP_NORM_SILU);
  library.def(SCHEMA_GROUP_NORM_SILU_BACKWARD);
}

STABLE_TORCH_LIBRARY_IMPL(doodl_fast_native, CPU, library) {
  library.impl("group_norm_silu", TORCH_BOX(&group_norm_silu));
  library.impl("group_norm_silu_backward", TORCH_BOX(&group_norm_silu_backward));
}
