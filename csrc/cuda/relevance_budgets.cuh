// relevance_budgets on CUDA devices, framework-free: raw pointers, sizes, stream.
//
//   p = sum max(r, 0),  q = sum max(-r, 0)  of each image
#pragma once

#include "cuda/relevance_sums.cuh"

namespace fastcam::cuda {

template <typename A>
struct Budget {
  using Partial = A;
  static constexpr int kInputs = 1, kSums = 2;
  static __device__ __forceinline__ void add(const A* in, A* sums) {
    sums[0] += in[0] <= 0 ? A(0) : in[0];  // NaN stays
    sums[1] -= in[0] >= 0 ? A(0) : in[0];
  }
};

template <typename A>
__global__ void __launch_bounds__(kSumThreads) finish_budgets(const A* sums, A* out, int64_t images, int64_t chunks) {
  const int64_t image = image_of_warp();
  if (image >= images) return;
  for (int s = 0; s < 2; ++s) {
    const double total = add_chunks<double>(sums + 2 * image * chunks + s, chunks, 2);
    if (threadIdx.x % 32 == 0) out[2 * image + s] = A(total);
  }
}

// ---- host ----

// Elements of the accumulation type.
inline int64_t scratch_of_budgets(int64_t batch, int64_t length) {
  const int64_t chunks = sum_chunks_of(length);
  return chunks > 1 ? 2 * batch * chunks : 0;
}

// relevance (batch, length), in any order within images; out (batch, 2), not written where there are no elements.
template <typename T>
cudaError_t run_relevance_budgets(const T* relevance, Accumulate<T>* out, Accumulate<T>* scratch, int64_t batch,
                                  int64_t length, cudaStream_t stream) {
  using A = Accumulate<T>;
  if (batch * length == 0) return cudaSuccess;
  const int64_t chunks = sum_chunks_of(length);
  SumArgs<Budget<A>, T> x = {};
  x.in[0] = relevance, x.sums = chunks > 1 ? scratch : out;
  x.images = batch, x.length = length;
  launch_sum_chunks(x, stream);
  if (chunks > 1) {
    const A* sums = scratch;
    launch(finish_budgets<A>, warp_an_image(batch), kSumThreads, 0, stream, sums, out, batch, chunks);
  }
  return cudaGetLastError();
}

}  // namespace fastcam::cuda
