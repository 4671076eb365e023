// Sums over the elements of each image on CUDA devices: chunk by chunk, then the chunks of each image in order.
//
// What a thread adds, and in which order, depends on an image's length only, so sums are bit-equal in any batch and off any
// alignment; no atomics, no synchronisation.
#pragma once

#include "cuda/common.cuh"

namespace fastcam::cuda {

constexpr int kSumThreads = 256;
constexpr int kSumChunk = 8192;  // elements of a chunk, so 32 of them for each thread

inline int64_t sum_chunks_of(int64_t length) { return ceil_div<int64_t>(length, kSumChunk); }

template <typename TERM, typename T>
struct SumArgs {
  const T* in[TERM::kInputs];     // (images, length)
  typename TERM::Partial* sums;   // (images, chunks, kSums)
  int64_t images, length;
};

// V elements from p on; zeros beyond the first `count` of them.
template <int V, bool ALIGNED, typename T>
__device__ __forceinline__ Pack<T, V> load_first(const T* __restrict__ p, int count) {
  if (ALIGNED && count >= V) return load<V>(p);
  Pack<T, V> values;
#pragma unroll
  for (int j = 0; j < V; ++j) values.v[j] = j < count ? p[j] : narrow<T>(0);
  return values;
}

// TERM::add(const A* in, Partial* sums) adds an element to kSums sums; zeros must add nothing.
template <typename TERM, typename T, bool ALIGNED>
__global__ void __launch_bounds__(kSumThreads) sum_chunks(const SumArgs<TERM, T> x) {
  using A = Accumulate<T>;
  using Partial = typename TERM::Partial;
  constexpr int V = kVector<T>, kWarps = kSumThreads / 32;
  __shared__ Partial values[kWarps * TERM::kSums];
  const int64_t image = image_number();
  if (image >= x.images) return;  // whole blocks
  const int64_t start = int64_t(blockIdx.x) * kSumChunk, at = image * x.length + start;
  const int count = int(min(int64_t(kSumChunk), x.length - start));
  Partial sums[TERM::kSums] = {};
#pragma unroll 4
  for (int e = threadIdx.x * V; e < count; e += kSumThreads * V) {
    Pack<T, V> in[TERM::kInputs];
#pragma unroll
    for (int k = 0; k < TERM::kInputs; ++k) in[k] = load_first<V, ALIGNED>(x.in[k] + at + e, count - e);
#pragma unroll
    for (int j = 0; j < V; ++j) {
      A given[TERM::kInputs];
#pragma unroll
      for (int k = 0; k < TERM::kInputs; ++k) given[k] = widen(in[k].v[j]);
      TERM::add(given, sums);
    }
  }
#pragma unroll
  for (int s = 0; s < TERM::kSums; ++s) sums[s] = add_lanes(sums[s], 32);
  if (threadIdx.x % 32 == 0) {
#pragma unroll
    for (int s = 0; s < TERM::kSums; ++s) values[threadIdx.x / 32 * TERM::kSums + s] = sums[s];
  }
  add_rows(values, kWarps, TERM::kSums);
  if (threadIdx.x < TERM::kSums) {
    x.sums[(image * gridDim.x + blockIdx.x) * TERM::kSums + threadIdx.x] = values[threadIdx.x];
  }
}

// A warp's sum over the chunks of one image; every lane gets it. TOTAL is wide enough for what it adds.
template <typename TOTAL, typename Partial>
__device__ __forceinline__ TOTAL add_chunks(const Partial* sums, int64_t chunks, int stride) {
  TOTAL total = 0;
  for (int64_t i = threadIdx.x % 32; i < chunks; i += 32) total += TOTAL(sums[i * stride]);
  return add_lanes(total, 32);
}

// The image of this warp; one beyond the last has nothing to do.
__device__ __forceinline__ int64_t image_of_warp() { return int64_t(blockIdx.x) * (kSumThreads / 32) + threadIdx.x / 32; }

// ---- host ----

inline dim3 warp_an_image(int64_t images) { return grid_of(ceil_div<int64_t>(images, kSumThreads / 32), 1); }

template <typename TERM, typename T>
void launch_sum_chunks(const SumArgs<TERM, T>& x, cudaStream_t stream) {
  bool vector = x.images == 1 || x.length % kVector<T> == 0;
  for (const T* p : x.in) vector = vector && aligned(p);
  const dim3 grid = grid_of(sum_chunks_of(x.length), x.images);
  vector ? launch(sum_chunks<TERM, T, true>, grid, kSumThreads, 0, stream, x)
         : launch(sum_chunks<TERM, T, false>, grid, kSumThreads, 0, stream, x);
}

}  // namespace fastcam::cuda
