// overlay on CUDA devices, framework-free: raw pointers, sizes, stream.
//
// One launch. A thread takes one pack of neighbouring pixels of a map, 16 bytes of the map and of each of the image's channels,
// and writes their bytes, three a pixel. The table stays in the L1 cache.
#pragma once

#include "cuda/common.cuh"
#include "overlay_formulas.h"

namespace fastcam::cuda {

constexpr int kOverlayThreads = 256;

template <typename T, typename M>
struct OverlayArgs {
  const T* images;             // (batch,C,H*W), C = 1 or 3, or (batch,H*W,3) if interleaved
  const M* maps;               // (batch,targets,H*W)
  const Accumulate<T>* table;  // (L,3)
  uint8_t* out;                // (batch,targets,H*W,3)
  int64_t batch, targets;
  unsigned channels, pixels;  // pixels below 2^31
  bool interleaved;
  OverlayNumbers<Accumulate<T>> numbers;
};

template <typename T, typename M, int V>
__global__ void __launch_bounds__(kOverlayThreads) overlay_images(const OverlayArgs<T, M> x) {
  using A = Accumulate<T>;
  const int64_t map = image_number();
  if (map >= x.batch * x.targets) return;
  const unsigned first = (blockIdx.x * kOverlayThreads + threadIdx.x) * V;
  if (first >= x.pixels) return;
  const int64_t image = unsigned(map) / unsigned(x.targets);
  const auto& n = x.numbers;
  const T* from = x.images + image * x.channels * x.pixels;
  const Pack<M, V> values = load<V>(x.maps + map * x.pixels + first);
  // Flat as the bytes are, or channel by channel.
  Pack<T, V> given[3];
#pragma unroll
  for (int k = 0; k < 3; ++k) {
    const int64_t at = x.interleaved ? 3 * int64_t(first) + k * V : int64_t(x.channels == 1 ? 0 : k) * x.pixels + first;
    given[k] = load<V>(from + at);
  }
  Pack<uint8_t, V> bytes[3];
#pragma unroll
  for (int j = 0; j < V; ++j) {
    const A value = overlay_value<A>(A(widen(values.v[j])), n.lowest);
    const A opacity = n.alpha * std::sqrt(value < A(0) ? -value : value);
    const A* colour = x.table + 3 * int(overlay_entry<A>(value, n.lowest, n.entries));
#pragma unroll
    for (int c = 0; c < 3; ++c) {
      const int flat = 3 * j + c;  // both indices are known when this is unrolled
      const A own = widen(x.interleaved ? given[flat / V].v[flat % V] : given[c].v[j]);
      const A pixel = overlay_pixel<A>(own, n.scale[c], n.shift[c]);
      bytes[flat / V].v[flat % V] = uint8_t(rounded<A>(overlay_blend<A>(pixel, colour[c], opacity)));
    }
  }
  uint8_t* out = x.out + 3 * (map * x.pixels + first);
#pragma unroll
  for (int k = 0; k < 3; ++k) store<V>(out + k * V, bytes[k]);
}

// ---- host ----

template <typename T, typename M, int V>
void launch_overlay(const OverlayArgs<T, M>& x, cudaStream_t stream) {
  const dim3 grid = grid_of(ceil_div<int64_t>(x.pixels, kOverlayThreads * V), x.batch * x.targets);
  launch(overlay_images<T, M, V>, grid, kOverlayThreads, 0, stream, x);
}

// Nothing for no maps. Maps count less than 2^32.
template <typename T, typename M>
cudaError_t run_overlay(const OverlayArgs<T, M>& x, cudaStream_t stream) {
  if (x.batch * x.targets == 0) return cudaSuccess;
  const bool vector = x.pixels % kVector<T> == 0 && aligned(x.images) && aligned(x.maps) && aligned(x.out);
  vector ? launch_overlay<T, M, kVector<T>>(x, stream) : launch_overlay<T, M, 1>(x, stream);
  return cudaGetLastError();
}

}  // namespace fastcam::cuda
