// Device helpers of all CUDA kernels: element types, 16-byte loads, deterministic sums over threads, grids.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "formulas.h"

namespace fastcam::cuda {

template <typename T>
struct AccumulateType {
  using type = float;
};
template <>
struct AccumulateType<double> {
  using type = double;
};
template <typename T>
using Accumulate = typename AccumulateType<T>::type;

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

// Rounded to the nearest element, ties to even.
template <typename T>
__device__ __forceinline__ T narrow(Accumulate<T> x) {
  if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(x);
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16_rn(x);
  } else {
    return x;
  }
}

// V neighbouring elements, moved by the widest loads and stores their 16-byte (or smaller) alignment allows.
template <typename T, int V>
struct alignas(sizeof(T) * V < 16 ? sizeof(T) * V : 16) Pack {
  T v[V];
};

template <int V, typename T>
__device__ __forceinline__ Pack<T, V> load(const T* __restrict__ p) {
  return *reinterpret_cast<const Pack<T, V>*>(p);
}

template <int V, typename T>
__device__ __forceinline__ void store(T* __restrict__ p, const Pack<T, V>& values) {
  *reinterpret_cast<Pack<T, V>*>(p) = values;
}

template <typename T>
constexpr int kVector = 16 / sizeof(T);

// features - reference, widened; the branch is uniform.
template <int V, typename T>
__device__ __forceinline__ void difference(const T* __restrict__ features, const T* __restrict__ reference, int64_t at,
                                           Accumulate<T> (&d)[V]) {
  const Pack<T, V> f = load<V>(features + at);
#pragma unroll
  for (int j = 0; j < V; ++j) d[j] = widen(f.v[j]);
  if (reference == nullptr) return;
  const Pack<T, V> r = load<V>(reference + at);
#pragma unroll
  for (int j = 0; j < V; ++j) d[j] -= widen(r.v[j]);
}

// Sums of `rows` rows of `width` values in shared memory, left in row 0. The tree depends on `rows` only. Ends in a barrier.
template <typename A>
__device__ __forceinline__ void add_rows(A* values, int rows, int width) {
  __syncthreads();
  while (rows > 1) {
    const int half = (rows + 1) / 2;
    for (int i = threadIdx.x; i < (rows - half) * width; i += blockDim.x) values[i] += values[i + half * width];
    __syncthreads();
    rows = half;
  }
}

// Sum over `lanes` (a power of two) neighbouring threads of a warp; every one of them gets it. The whole warp takes part.
template <typename A>
__device__ __forceinline__ A add_lanes(A value, int lanes) {
  for (int step = lanes / 2; step > 0; step /= 2) value += __shfl_xor_sync(0xffffffffu, value, step);
  return value;
}

template <typename I>
constexpr I ceil_div(I a, I b) {
  return (a + b - 1) / b;
}

// Grids are (blocks of an image, images): 2^31 blocks an image, 2^32 images over y and z, which end at 65535 each. Kernels so
// find their place with 32-bit divisions; a 64-bit one is a call, and makes the compiler spill around it.
__device__ __forceinline__ int64_t image_number() { return int64_t(blockIdx.z) * gridDim.y + blockIdx.y; }

inline dim3 grid_of(int64_t blocks, int64_t images) {
  const int64_t z = ceil_div<int64_t>(images, 65535), y = ceil_div(images, z);
  const bool fits = blocks < (int64_t(1) << 31) && z <= 65535;
  return fits ? dim3(unsigned(blocks), unsigned(y), unsigned(z)) : dim3(0, 0, 0);  // an invalid launch, reported as such
}

#ifdef __CUDACC__
template <typename Kernel, typename... Arguments>
void launch(Kernel kernel, dim3 grid, int threads, size_t shared, cudaStream_t stream, const Arguments&... arguments) {
  kernel<<<grid, threads, shared, stream>>>(arguments...);
}

// The block's dynamic shared memory.
template <typename A>
__device__ __forceinline__ A* dynamic_shared() {
  extern __shared__ double memory[];
  return reinterpret_cast<A*>(memory);
}
#endif  // otherwise tests/cuda_host emulates both

inline bool aligned(const void* p) { return p == nullptr || reinterpret_cast<uintptr_t>(p) % 16 == 0; }

}  // namespace fastcam::cuda
