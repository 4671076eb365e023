// rescale_multipliers on CUDA devices, framework-free: raw pointers, sizes, stream.
//
//   out = multipliers * s,  s = (f(u) - f(r)) / (u - r),  f(x) = x for x > 0, else negative_slope * x
//
// A thread computes one pack of neighbouring elements, 16 bytes of inputs; consecutive threads, consecutive packs.
#pragma once

#include "cuda/common.cuh"

namespace fastcam::cuda {

constexpr int kRescaleThreads = 256;

// T: inputs and reference; G: multipliers and result, T itself or its accumulation type. All in one memory order.
template <typename T, typename G>
struct RescaleArgs {
  const G* multipliers;  // (runs, length), as inputs and out
  const T* inputs;
  const T* reference;  // (length)
  G* out;
  int64_t runs, length;
  Accumulate<T> negative_slope;
};

template <typename T, typename G, int V>
__device__ __forceinline__ void rescale_pack(const RescaleArgs<T, G>& x, int64_t start, int64_t at) {
  using A = Accumulate<T>;
  const Pack<G, V> g = load<V>(x.multipliers + start + at);
  const Pack<T, V> u = load<V>(x.inputs + start + at), r = load<V>(x.reference + at);
  Pack<G, V> out;
#pragma unroll
  for (int j = 0; j < V; ++j) {
    const A factor = rescale_factor<A>(widen(u.v[j]), widen(r.v[j]), x.negative_slope);
    out.v[j] = narrow<G>(widen(g.v[j]) * factor);
  }
  store<V>(x.out + start + at, out);
}

template <typename T, typename G, int V>
__global__ void __launch_bounds__(kRescaleThreads) rescale(const RescaleArgs<T, G> x) {
  const int64_t run = image_number();
  if (run >= x.runs) return;
  const int64_t first = (int64_t(blockIdx.x) * kRescaleThreads + threadIdx.x) * V, start = run * x.length;
  if (first + V <= x.length) return rescale_pack<T, G, V>(x, start, first);
  for (int64_t at = first; at < x.length; ++at) rescale_pack<T, G, 1>(x, start, at);  // the last pack is partial
}

// ---- host ----

template <typename T, typename G, int V>
void launch_rescale(const RescaleArgs<T, G>& x, cudaStream_t stream) {
  const int64_t blocks = ceil_div<int64_t>(x.length, kRescaleThreads * V);
  launch(rescale<T, G, V>, grid_of(blocks, x.runs), kRescaleThreads, 0, stream, x);
}

// Nothing for an empty result.
template <typename T, typename G>
cudaError_t run_rescale_multipliers(const RescaleArgs<T, G>& x, cudaStream_t stream) {
  if (x.runs * x.length == 0) return cudaSuccess;
  // Every run must begin where a pack may.
  const bool vector = (x.runs == 1 || x.length % kVector<T> == 0) && aligned(x.multipliers) && aligned(x.inputs) &&
                      aligned(x.reference) && aligned(x.out);
  vector ? launch_rescale<T, G, kVector<T>>(x, stream) : launch_rescale<T, G, 1>(x, stream);
  return cudaGetLastError();
}

}  // namespace fastcam::cuda
