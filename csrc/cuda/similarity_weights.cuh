// similarity_weights on CUDA devices, framework-free: raw pointers, sizes, stream.
//
// A warp sums up one row, or a block where rows are long, and reads it again, from the cache, for what it writes. Which channels
// a thread adds, and in which order, depends on the row's length only, so results are bit-equal in any batch and off any
// alignment; no atomics, one launch.
#pragma once

#include "cuda/relevance_sums.cuh"

namespace fastcam::cuda {

constexpr int kSimilarityWarps = 8;  // of a block
constexpr int64_t kLongRow = 1024;  // channels; more are shared by the warps of a block

template <typename T>
struct SimilarityArgs {
  const T* first;
  const T* second;
  Accumulate<T>* contributions;  // (rows, channels)
  Accumulate<T>* weights;        // (rows, channels)
  Accumulate<T>* total;          // (rows)
  int64_t rows, channels;
  int64_t first_step, second_step;  // from one row to the next: 0 for one embedding
  SimilarityTerm term;
  SimilarityWeighting weighting;
  bool dissimilarity;
};

// Over a warp; every lane gets them.
__device__ __forceinline__ void add_lanes(SimilaritySums<double>& sums) {
  for (int step = 16; step > 0; step /= 2) {
    SimilaritySums<double> other;
    other.total = __shfl_xor_sync(0xffffffffu, sums.total, step);
    other.first = __shfl_xor_sync(0xffffffffu, sums.first, step);
    other.second = __shfl_xor_sync(0xffffffffu, sums.second, step);
    other.low = __shfl_xor_sync(0xffffffffu, sums.low, step);
    other.high = __shfl_xor_sync(0xffffffffu, sums.high, step);
    merge(sums, other);
  }
}

// A row for each WARPS warps. V channels of it are read at a time, whatever the alignment.
template <SimilarityPart PART, typename T, int WARPS, bool ALIGNED>
__global__ void __launch_bounds__(kSimilarityWarps * 32) weigh_similarity(const SimilarityArgs<T> x) {
  using A = Accumulate<T>;
  constexpr int V = kVector<T>, kThreads = WARPS * 32;
  const int64_t row = int64_t(blockIdx.x) * (kSimilarityWarps / WARPS) + threadIdx.x / kThreads;
  if (row >= x.rows) return;  // whole warps or whole blocks
  const int64_t begin = threadIdx.x % kThreads * V;
  const T* first = x.first + row * x.first_step;
  const T* second = x.second + row * x.second_step;
  SimilaritySums<double> sums = no_similarity_sums<double>();
#pragma unroll 2
  for (int64_t e = begin; e < x.channels; e += kThreads * V) {
    const int count = int(min(int64_t(V), x.channels - e));
    const Pack<T, V> u = load_first<V, ALIGNED>(first + e, count), v = load_first<V, ALIGNED>(second + e, count);
#pragma unroll
    for (int j = 0; j < V; ++j) {
      if (ALIGNED || j < count) add_to<PART>(sums, double(widen(u.v[j])), double(widen(v.v[j])));
    }
  }
  add_lanes(sums);
  if constexpr (WARPS > 1) {
    __shared__ SimilaritySums<double> of_warps[WARPS];
    if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = sums;
    __syncthreads();
    sums = of_warps[0];
    for (int w = 1; w < WARPS; ++w) merge(sums, of_warps[w]);
  }
  const SimilarityScale scale = similarity_scale<A>(sums, x.term, x.weighting, x.dissimilarity);
  if (begin == 0) x.total[row] = A(scale.total);
  A* contributions = x.contributions + row * x.channels;
  A* weights = x.weights + row * x.channels;
#pragma unroll 2
  for (int64_t e = begin; e < x.channels; e += kThreads * V) {
    const int count = int(min(int64_t(V), x.channels - e));
    const Pack<T, V> u = load_first<V, ALIGNED>(first + e, count), v = load_first<V, ALIGNED>(second + e, count);
    Pack<A, V> c, w;
#pragma unroll
    for (int j = 0; j < V; ++j) {
      const double part = similarity_part<PART>(double(widen(u.v[j])), double(widen(v.v[j])));
      c.v[j] = A(scale.factor * part);
      w.v[j] = A(similarity_weight<A>(part, scale.base, scale.gain, scale.divisor, scale.shift));
    }
    if constexpr (ALIGNED) {
      store<V>(contributions + e, c), store<V>(weights + e, w);
    } else {
#pragma unroll
      for (int j = 0; j < V; ++j) {
        if (j < count) contributions[e + j] = c.v[j], weights[e + j] = w.v[j];
      }
    }
  }
}

// ---- host ----

template <SimilarityPart PART, typename T, int WARPS>
void launch_similarity(const SimilarityArgs<T>& x, cudaStream_t stream) {
  const bool whole = x.channels % kVector<T> == 0 && x.first_step % kVector<T> == 0 && x.second_step % kVector<T> == 0;
  const bool vector = whole && aligned(x.first) && aligned(x.second) && aligned(x.contributions) && aligned(x.weights);
  const dim3 grid = grid_of(ceil_div<int64_t>(x.rows, kSimilarityWarps / WARPS), 1);
  vector ? launch(weigh_similarity<PART, T, WARPS, true>, grid, kSimilarityWarps * 32, 0, stream, x)
         : launch(weigh_similarity<PART, T, WARPS, false>, grid, kSimilarityWarps * 32, 0, stream, x);
}

template <SimilarityPart PART, typename T>
void launch_similarity(const SimilarityArgs<T>& x, cudaStream_t stream) {
  x.channels > kLongRow ? launch_similarity<PART, T, kSimilarityWarps>(x, stream) : launch_similarity<PART, T, 1>(x, stream);
}

// Nothing for an empty batch.
template <typename T>
cudaError_t run_similarity_weights(const SimilarityArgs<T>& x, cudaStream_t stream) {
  if (x.rows == 0) return cudaSuccess;
  switch (similarity_part_of(x.term)) {
    case SimilarityPart::product: launch_similarity<SimilarityPart::product>(x, stream); break;
    case SimilarityPart::square: launch_similarity<SimilarityPart::square>(x, stream); break;
    case SimilarityPart::inverse: launch_similarity<SimilarityPart::inverse>(x, stream); break;
  }
  return cudaGetLastError();
}

}  // namespace fastcam::cuda
