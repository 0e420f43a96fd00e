// The latent update on CUDA. A block of threads computes one piece of one sample and adds up its squares in a fixed
// tree. A second kernel adds the sums of the pieces in a fixed order. There are no atomic operations, so every run
// gives the same bits.
#include "bindings.h"
#include "scalar.h"

#include <cuda_runtime.h>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>

namespace {

using namespace doodl_fast;

constexpr int THREADS = 256;
constexpr int PIECE = 4096;

template <class T>
struct UpdatePointers {
  T *x, *y, *mx, *my;
  const T *in_x, *in_y, *in_mx, *in_my, *gx, *gy, *noise;
};

// Returns the sum of the values of a block's threads. `room` has space for THREADS doubles.
__device__ __forceinline__ double block_sum(double value, double* room) {
  room[threadIdx.x] = value;
  __syncthreads();
  for (int half = THREADS / 2; half; half /= 2) {
    if (threadIdx.x < half) room[threadIdx.x] += room[threadIdx.x + half];
    __syncthreads();
  }
  const double sum = room[0];
  __syncthreads();
  return sum;
}

template <class T>
__global__ void __launch_bounds__(THREADS)
    update_kernel(UpdatePointers<T> p, double* sums, int64_t sample, int64_t pieces, int64_t batch, Momentum<T> k) {
  __shared__ double room[THREADS];
  for (int64_t index = blockIdx.x; index < batch * pieces; index += gridDim.x) {
    const int64_t first = index / pieces * sample, begin = index % pieces * PIECE;
    const int64_t end = begin + PIECE < sample ? begin + PIECE : sample;
    double square_x = 0, square_y = 0;
    for (int64_t inside = begin + threadIdx.x; inside < end; inside += THREADS) {
      const int64_t i = first + inside;
      T x = p.in_x[i], y = p.in_y[i], mx = p.in_mx[i], my = p.in_my[i];
      update(x, y, mx, my, p.gx[i], p.gy[i], k.noisy ? p.noise[i] : T(0), k);
      p.x[i] = x, p.y[i] = y, p.mx[i] = mx, p.my[i] = my;
      square_x += double(x) * double(x);
      square_y += double(y) * double(y);
    }
    if (!sums) continue;
    square_x = block_sum(square_x, room);
    square_y = block_sum(square_y, room);
    if (threadIdx.x == 0) sums[index] = square_x, sums[batch * pieces + index] = square_y;
  }
}

// Computes the factor of each sample: the norm that it started with, divided by its own. factors and starts are (2, B),
// and rows is 2 B.
__global__ void __launch_bounds__(THREADS)
    factor_kernel(const double* sums, const double* starts, double* factors, int64_t rows, int64_t pieces) {
  __shared__ double room[THREADS];
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    double sum = 0;
    for (int64_t piece = threadIdx.x; piece < pieces; piece += THREADS) sum += sums[row * pieces + piece];
    sum = block_sum(sum, room);
    if (threadIdx.x == 0) factors[row] = starts[row] / sqrt(sum);
  }
}

template <class T>
__global__ void __launch_bounds__(THREADS)
    scale_kernel(T* x, T* y, const double* factors, int64_t batch, int64_t sample) {
  const int64_t n = batch * sample, stride = int64_t(gridDim.x) * THREADS;
  for (int64_t i = int64_t(blockIdx.x) * THREADS + threadIdx.x; i < n; i += stride) {
    const int64_t row = i / sample;
    x[i] = x[i] * T(factors[row]);
    y[i] = y[i] * T(factors[batch + row]);
  }
}

cudaStream_t stream_of(const Tensor& like) {
  void* current = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(like.get_device(), &current));
  return static_cast<cudaStream_t>(current);
}

unsigned blocks(int64_t wanted) { return unsigned(std::min<int64_t>(std::max<int64_t>(wanted, 1), 1 << 16)); }

// sums: space for the sums of squares, (2, B, pieces), and after them for the factors, (2, B); or null.
template <class T>
void launch_update(const UpdateCall& call, double* sums, int64_t pieces, cudaStream_t stream) {
  const auto out = [](void* data) { return static_cast<T*>(data); };
  const auto in = [](const void* data) { return static_cast<const T*>(data); };
  const UpdatePointers<T> p{out(call.x),     out(call.y),     out(call.mx), out(call.my), in(call.in_x), in(call.in_y),
                            in(call.in_mx),  in(call.in_my),  in(call.gx),  in(call.gy),  in(call.noise)};
  const Momentum<T> k{T(call.rate), T(call.clip), T(call.momentum), T(call.sigma), call.nesterov, call.tied,
                      call.noise != nullptr};
  const int64_t batch = call.batch, sample = call.sample;
  update_kernel<T><<<blocks(batch * pieces), THREADS, 0, stream>>>(p, sums, sample, pieces, batch, k);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  if (!sums) return;
  double* factors = sums + 2 * batch * pieces;
  factor_kernel<<<blocks(2 * batch), THREADS, 0, stream>>>(sums, call.starts, factors, 2 * batch, pieces);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  scale_kernel<T><<<blocks((batch * sample + THREADS - 1) / THREADS), THREADS, 0, stream>>>(p.x, p.y, factors, batch,
                                                                                           sample);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

void latent_update(Tensor out_x, Tensor out_y, Tensor out_mx, Tensor out_my, Tensor x, Tensor y, Tensor mx, Tensor my,
                   Tensor gx, Tensor gy, MaybeTensor noise, MaybeTensor starts, double rate, double clip,
                   double momentum, bool nesterov, bool tied, double sigma) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device());
  UpdateCall call = update_call({out_x, out_y, out_mx, out_my}, {x, y, mx, my, gx, gy}, noise, starts);
  call.rate = rate, call.clip = clip, call.momentum = momentum, call.sigma = sigma;
  call.nesterov = nesterov, call.tied = tied;
  const int64_t pieces = (call.sample + PIECE - 1) / PIECE;
  const cudaStream_t stream = stream_of(x);
  MaybeTensor room;
  double* sums = nullptr;
  if (starts) {
    room = torch::stable::new_empty(*starts, {2 * call.batch * (pieces + 1)});
    sums = static_cast<double*>(room->mutable_data_ptr());
  }
  call.is_double ? launch_update<double>(call, sums, pieces, stream) : launch_update<float>(call, sums, pieces, stream);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(doodl_fast_native, CUDA, library) {
  library.impl("latent_update", TORCH_BOX(&latent_update));
}
