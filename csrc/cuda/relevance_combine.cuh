// relevance_combine on CUDA devices, framework-free: raw pointers, sizes, stream.
//
//   C = max(x, 0) tC,  out = C - [C != 0] / n + (tA where x > threshold, else tB);  n elements of an image's C are not 0
//
// With `shift` three launches: the elements that count in each chunk of an image, their sum's reciprocal, and the one pass
// that writes, which is all there is without `shift`. Counts are integers, so exact in any order.
#pragma once

#include "cuda/flat.cuh"
#include "cuda/relevance_sums.cuh"

namespace fastcam::cuda {

template <typename A>
struct CountShared {
  using Partial = int;
  static constexpr int kInputs = 2, kSums = 1;
  static __device__ __forceinline__ void add(const A* in, int* sums) {
    sums[0] += relevance_shared(in[0], in[1]) == 0 ? 0 : 1;
  }
};

struct Combine {
  static constexpr int kInputs = 4, kOutputs = 1, kNumbers = 2, kOwn = 1;  // numbers: unit, threshold
  template <typename A>
  static __device__ __forceinline__ void apply(const A* in, const A* n, A* out) {
    out[0] = relevance_combined(in[0], in[1], in[2], in[3], n[0], n[1]);
  }
};

// What is taken from each element of an image that counts: one over their number, or nothing.
template <typename A>
__global__ void __launch_bounds__(kSumThreads) finish_units(const int* counts, const A* budgets, A* units, int64_t images,
                                                            int64_t chunks) {
  const int64_t image = image_of_warp();
  if (image >= images) return;
  const int64_t count = add_chunks<int64_t>(counts + image * chunks, chunks, 1);
  if (threadIdx.x % 32 == 0) units[image] = count > 0 && budgets[2 * image] > A(0) ? A(1) / A(count) : A(0);
}

// ---- host ----

// (batch, length) and (3, batch, length), all in one memory order.
template <typename T>
struct CombineArgs {
  const T* inputs;
  const T* parts;
  const Accumulate<T>* budgets;  // (batch, 2)
  T* out;
  int* counts;           // batch * sum_chunks_of(length), and
  Accumulate<T>* units;  // batch; both null without shift
  int64_t batch, length;
  double threshold;
};

template <typename T>
cudaError_t run_relevance_combine(const CombineArgs<T>& given, cudaStream_t stream) {
  using A = Accumulate<T>;
  const int64_t count = given.batch * given.length;
  if (count == 0) return cudaSuccess;
  if (given.units != nullptr) {
    const int64_t chunks = sum_chunks_of(given.length);
    SumArgs<CountShared<A>, T> x = {};
    x.in[0] = given.inputs, x.in[1] = given.parts, x.sums = given.counts;
    x.images = given.batch, x.length = given.length;
    launch_sum_chunks(x, stream);
    const int* counts = given.counts;
    launch(finish_units<A>, warp_an_image(given.batch), kSumThreads, 0, stream, counts, given.budgets, given.units,
           given.batch, chunks);
  }
  FlatArgs<T> x = {};
  x.in[0] = given.inputs, x.out[0] = given.out, x.own = given.units;
  for (int k = 0; k < 3; ++k) x.in[1 + k] = given.parts + k * count;
  x.numbers[1] = A(given.threshold);
  x.runs = given.batch, x.length = x.out_step = given.length;
  return run_flat<Combine>(x, stream);
}

}  // namespace fastcam::cuda
