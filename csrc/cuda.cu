// The CUDA library of the native backend: the couplings and their vector-Jacobian products. The kernels apply the
// arithmetic of scalar.h to flat memory, which they read in pieces of 16 bytes by a grid-stride loop.
//
// They run on PyTorch's current stream of the tensors' device, and every launch is checked for errors. The file is
// compiled with -fmad=false.
#include "bindings.h"
#include "scalar.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

namespace {

using namespace doodl_fast;

constexpr int THREADS = 256;

// Conversions between the dtype of a tensor and the dtype of the arithmetic

template <class T>
__device__ __forceinline__ T widen(__half value) { return T(__half2float(value)); }
template <class T>
__device__ __forceinline__ T widen(__nv_bfloat16 value) { return T(__bfloat162float(value)); }
template <class T>
__device__ __forceinline__ T widen(float value) { return T(value); }
template <class T>
__device__ __forceinline__ T widen(double value) { return T(value); }

__device__ __forceinline__ float narrow(float value) { return value; }
__device__ __forceinline__ float narrow(double value) { return odd_float(value); }

template <class S, class T>
__device__ __forceinline__ S rounded(T value) {
  if constexpr (sizeof(S) == 2 && std::is_same_v<S, __half>)
    return __float2half_rn(narrow(value));
  else if constexpr (sizeof(S) == 2)
    return __float2bfloat16_rn(narrow(value));
  else
    return S(value);
}

// V elements that are read or written at once; of the operand with the widest dtype they are 16 bytes (see `lanes`).
template <class S, int V>
struct alignas(sizeof(S) * V) Pack {
  S at[V];
};

template <class T, class S, int V>
__device__ __forceinline__ void read(T (&values)[V], const S* from, int64_t piece) {
  const Pack<S, V> pack = reinterpret_cast<const Pack<S, V>*>(from)[piece];
#pragma unroll
  for (int i = 0; i < V; ++i) values[i] = widen<T>(pack.at[i]);
}

template <class T, class S, int V>
__device__ __forceinline__ void write(S* to, int64_t piece, const T (&values)[V]) {
  Pack<S, V> pack;
#pragma unroll
  for (int i = 0; i < V; ++i) pack.at[i] = rounded<S>(values[i]);
  reinterpret_cast<Pack<S, V>*>(to)[piece] = pack;
}

template <class S>
struct CouplingPointers {
  S *out, *out_source;
  const S *target, *source;
};

template <class T, class S, class E, int V, bool source, Eps eps, bool mixes>
__global__ void __launch_bounds__(THREADS) coupling_kernel(CouplingPointers<S> p, const E* network, int64_t offset,
                                                           int64_t pieces, Coefficients<T> k, Mix<T> m) {
  const int64_t stride = int64_t(gridDim.x) * THREADS;
  for (int64_t piece = int64_t(blockIdx.x) * THREADS + threadIdx.x; piece < pieces; piece += stride) {
    T t[V], s[V], u[V], v[V];
    read(t, p.target, piece);
    if constexpr (source || mixes) read(s, p.source, piece);
    if constexpr (eps != Eps::none) read(u, network, piece);
    if constexpr (eps == Eps::guided) read(v, network + offset, piece);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      t[i] = couple<T, source, eps>(t[i], s[i], u[i], v[i], k);
      if constexpr (mixes) mix(t[i], s[i], m);
    }
    write(p.out, piece, t);
    if constexpr (mixes) write(p.out_source, piece, s);
  }
}

template <class S>
struct VjpPointers {
  S *out, *out_source;
  const S *grad, *grad_source;
};

template <class T, class S, class E, int V, bool source, Eps eps, bool mixes>
__global__ void __launch_bounds__(THREADS) vjp_kernel(VjpPointers<S> p, E* network, const T* scale, int64_t offset,
                                                      int64_t pieces, Coefficients<T> k, Mix<T> m) {
  const int64_t stride = int64_t(gridDim.x) * THREADS;
  const T factor = scale ? *scale : T(1);
  for (int64_t piece = int64_t(blockIdx.x) * THREADS + threadIdx.x; piece < pieces; piece += stride) {
    T t[V], s[V], u[V], v[V];
    read(t, p.grad, piece);
    if constexpr (mixes) read(s, p.grad_source, piece);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      if constexpr (mixes) {
        mix_transposed(t[i], s[i], m);
        if (k.c != 0) {
          const T term = k.c * t[i];
          s[i] = s[i] + term;
        }
      } else if constexpr (source) {
        s[i] = k.c * t[i];
      }
      if constexpr (eps != Eps::none) eps_cotangent<T, eps>(t[i], factor, k, u[i], v[i]);
      t[i] = k.a * t[i];
    }
    write(p.out, piece, t);
    if constexpr (source || mixes) write(p.out_source, piece, s);
    if constexpr (eps != Eps::none) write(network, piece, u);
    if constexpr (eps == Eps::guided) write(network + offset, piece, v);
  }
}

// Launching

struct Launch {
  int device;
  cudaStream_t stream;

  explicit Launch(const Tensor& like) : device(like.get_device()) {
    void* current = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &current));
    stream = static_cast<cudaStream_t>(current);
  }

  // So many blocks that the device is busy; the grid-stride loop covers the remaining elements.
  dim3 grid(int64_t pieces) const {
    int processors = 0;
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
    const int64_t wanted = (pieces + THREADS - 1) / THREADS;
    return dim3(unsigned(std::min<int64_t>(wanted, int64_t(processors) * 32)));
  }
};

bool aligned(const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }

// How many elements a thread reads at once: so many that those of the widest operand are 16 bytes. This is used if all
// pieces are aligned and complete. (In a guided batch the second half begins at element n.)
template <class S, class E>
constexpr int lanes() {
  return 16 / (sizeof(S) > sizeof(E) ? sizeof(S) : sizeof(E));
}

// Calls f with a value of the C++ type of a dtype.
template <class F>
void with_type(Dtype dtype, const F& f) {
  switch (dtype) {
    case Dtype::f16:
      return f(__half{});
#if !defined(DF_FEW_DTYPES)  // This is for inspecting the machine code; no build defines it.
    case Dtype::bf16:
      return f(__nv_bfloat16{});
    case Dtype::f64:
      return f(double{});
#endif
    default:
      return f(float{});
  }
}

template <class S, class E>
using Arithmetic = std::conditional_t<std::is_same_v<S, double> || std::is_same_v<E, double>, double, float>;

template <class Call, class T>
Coefficients<T> coefficients(const Call& call) {
  return {T(call.a), T(call.c), T(call.b), T(call.g)};
}

template <class Call, class T>
Mix<T> mixing(const Call& call) {
  return {call.target_first, T(call.a0), T(call.c0), T(call.a1), T(call.c1)};
}

template <class S, class E, int V, bool source, Eps eps, bool mixes>
void launch_coupling(const CouplingCall& call, const Launch& on) {
  using T = Arithmetic<S, E>;
  const int64_t pieces = call.n / V;
  const CouplingPointers<S> p{static_cast<S*>(call.out.data), static_cast<S*>(call.out_source.data),
                              static_cast<const S*>(call.target.data), static_cast<const S*>(call.source.data)};
  coupling_kernel<T, S, E, V, source, eps, mixes><<<on.grid(pieces), THREADS, 0, on.stream>>>(
      p, static_cast<const E*>(call.eps.data), call.n, pieces, coefficients<CouplingCall, T>(call),
      mixing<CouplingCall, T>(call));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

template <class S, class E, bool source, Eps eps, bool mixes>
void vectorised_coupling(const CouplingCall& call, const Launch& on) {
  constexpr int V = lanes<S, E>();
  const bool whole = call.n % V == 0 && aligned(call.out.data) && aligned(call.target.data) &&
                     aligned(call.source.data) && aligned(call.eps.data) && aligned(call.out_source.data);
  whole ? launch_coupling<S, E, V, source, eps, mixes>(call, on)
        : launch_coupling<S, E, 1, source, eps, mixes>(call, on);
}

template <class S, class E, Eps eps>
void launch_coupling_parts(const CouplingCall& call, const Launch& on) {
  const bool source = call.source.data && call.c != 0;
  if (call.mixes && source) return vectorised_coupling<S, E, true, eps, true>(call, on);
  if (call.mixes) return vectorised_coupling<S, E, false, eps, true>(call, on);
  if (source) return vectorised_coupling<S, E, true, eps, false>(call, on);
  return vectorised_coupling<S, E, false, eps, false>(call, on);
}

void run(const CouplingCall& call, const Launch& on) {
  if (!call.n) return;
  with_type(call.target.dtype, [&](auto state) {
    using S = decltype(state);
    if (!call.eps.data) return launch_coupling_parts<S, S, Eps::none>(call, on);
    with_type(call.eps.dtype, [&](auto network) {
      using E = decltype(network);
      call.guided ? launch_coupling_parts<S, E, Eps::guided>(call, on)
                  : launch_coupling_parts<S, E, Eps::plain>(call, on);
    });
  });
}

template <class S, class E, int V, bool source, Eps eps, bool mixes>
void launch_vjp(const VjpCall& call, const void* scale, const Launch& on) {
  using T = Arithmetic<S, E>;
  const int64_t pieces = call.n / V;
  const VjpPointers<S> p{static_cast<S*>(call.out.data), static_cast<S*>(call.out_source.data),
                         static_cast<const S*>(call.grad.data), static_cast<const S*>(call.grad_source.data)};
  vjp_kernel<T, S, E, V, source, eps, mixes><<<on.grid(pieces), THREADS, 0, on.stream>>>(
      p, static_cast<E*>(call.out_eps.data), static_cast<const T*>(scale), call.n, pieces,
      coefficients<VjpCall, T>(call), mixing<VjpCall, T>(call));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

template <class S, class E, bool source, Eps eps, bool mixes>
void vectorised_vjp(const VjpCall& call, const void* scale, const Launch& on) {
  constexpr int V = lanes<S, E>();
  const bool whole = call.n % V == 0 && aligned(call.out.data) && aligned(call.grad.data) &&
                     aligned(call.out_source.data) && aligned(call.out_eps.data) && aligned(call.grad_source.data);
  whole ? launch_vjp<S, E, V, source, eps, mixes>(call, scale, on)
        : launch_vjp<S, E, 1, source, eps, mixes>(call, scale, on);
}

template <class S, class E, Eps eps>
void launch_vjp_parts(const VjpCall& call, const void* scale, const Launch& on) {
  if (call.mixes) return vectorised_vjp<S, E, false, eps, true>(call, scale, on);
  if (call.out_source.data) return vectorised_vjp<S, E, true, eps, false>(call, scale, on);
  return vectorised_vjp<S, E, false, eps, false>(call, scale, on);
}

void run(const VjpCall& call, const MaybeTensor& scale, const Launch& on) {
  if (!call.n) return;
  const void* factor = nullptr;
  if (scale) {  // It stays on the device, because reading it here would synchronise.
    const bool wide = call.grad.dtype == Dtype::f64 || (call.out_eps.data && call.out_eps.dtype == Dtype::f64);
    STD_TORCH_CHECK(scale->numel() == 1 && dtype_of("scale", *scale) == (wide ? Dtype::f64 : Dtype::f32),
                    "scale: expected one number in the dtype of the arithmetic");
    factor = scale->const_data_ptr();
  }
  with_type(call.grad.dtype, [&](auto state) {
    using S = decltype(state);
    if (!call.out_eps.data) return launch_vjp_parts<S, S, Eps::none>(call, factor, on);
    with_type(call.out_eps.dtype, [&](auto network) {
      using E = decltype(network);
      call.guided ? launch_vjp_parts<S, E, Eps::guided>(call, factor, on)
                  : launch_vjp_parts<S, E, Eps::plain>(call, factor, on);
    });
  });
}

// The functions that PyTorch's dispatcher calls, with the arguments of the schemas in bindings.h

void coupling(Tensor out, Tensor target, MaybeTensor source, MaybeTensor eps, double a, double c, double b,
              std::optional<double> g) {
  const torch::stable::accelerator::DeviceGuard guard(target.get_device());
  run(coupling_call(out, target, source, eps, a, c, b, g), Launch(target));
}

void coupling_mix(Tensor out_target, Tensor out_source, Tensor target, Tensor source, MaybeTensor eps,
                  bool target_first, double a0, double c0, double a1, double c1, double a, double c, double b,
                  std::optional<double> g) {
  const torch::stable::accelerator::DeviceGuard guard(target.get_device());
  CouplingCall call = coupling_call(out_target, target, source, eps, a, c, b, g);
  add_mixing(call, target_first, a0, c0, a1, c1);
  call.out_source = output("out_source", out_source, target, call.n);
  run(call, Launch(target));
}

void coupling_vjp(Tensor out, MaybeTensor out_source, MaybeTensor out_eps, Tensor grad, MaybeTensor scale, double a,
                  double c, double b, std::optional<double> g) {
  const torch::stable::accelerator::DeviceGuard guard(grad.get_device());
  if (scale) check("scale", *scale, grad, 1);
  run(vjp_call(out, out_source, out_eps, grad, a, c, b, g), scale, Launch(grad));
}

void coupling_mix_vjp(Tensor out_target, Tensor out_source, MaybeTensor out_eps, Tensor grad_target,
                      Tensor grad_source, MaybeTensor scale, bool target_first, double a0, double c0, double a1,
                      double c1, double a, double c, double b, std::optional<double> g) {
  const torch::stable::accelerator::DeviceGuard guard(grad_target.get_device());
  VjpCall call = vjp_call(out_target, out_source, out_eps, grad_target, a, c, b, g);
  add_mixing(call, target_first, a0, c0, a1, c1);
  call.grad_source = input("grad_source", grad_source, grad_target, call.n);
  if (scale) check("scale", *scale, grad_target, 1);
  run(call, scale, Launch(grad_target));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(doodl_fast_native, CUDA, library) {
  library.impl("coupling", TORCH_BOX(&coupling));
  library.impl("coupling_vjp", TORCH_BOX(&coupling_vjp));
  library.impl("coupling_mix", TORCH_BOX(&coupling_mix));
  library.impl("coupling_mix_vjp", TORCH_BOX(&coupling_mix_vjp));
}
