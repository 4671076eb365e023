// Kernel of elementwise ops: the same formula on every element of equal runs of memory, one pass.
//
// A thread computes one pack of neighbouring elements, 16 bytes of each tensor; consecutive threads, consecutive packs.
// `lanes` threads, a power of two, walk a run side by side, so that a block of short runs takes several.
#pragma once

#include "cuda/common.cuh"

namespace fastcam::cuda {

constexpr int kFlatThreads = 256;
constexpr int kFlatBlocks = 4;  // of a multiprocessor at once: 64 registers, which every formula fits in

// kInputs, kOutputs and kNumbers of a formula say how much of these arrays is used. The first kOwn of its numbers are each
// run's own; they stay as in `numbers` where `own` is null.
template <typename T>
struct FlatArgs {
  const T* in[4];  // (runs, length)
  T* out[3];       // (runs, length), runs `out_step` apart
  Accumulate<T> numbers[4];
  const Accumulate<T>* own;  // (runs, kOwn)
  int64_t runs, length, out_step;
};

// FORMULA::apply(const A* in, const A* numbers, A* out) computes an element.
template <typename FORMULA, typename T, int V>
__device__ __forceinline__ void flat_pack(const FlatArgs<T>& x, const Accumulate<T>* numbers, int64_t at, int64_t out_at) {
  using A = Accumulate<T>;
  Pack<T, V> in[FORMULA::kInputs], out[FORMULA::kOutputs];
#pragma unroll
  for (int k = 0; k < FORMULA::kInputs; ++k) in[k] = load<V>(x.in[k] + at);
#pragma unroll
  for (int j = 0; j < V; ++j) {
    A given[FORMULA::kInputs], found[FORMULA::kOutputs];
#pragma unroll
    for (int k = 0; k < FORMULA::kInputs; ++k) given[k] = widen(in[k].v[j]);
    FORMULA::apply(given, numbers, found);
#pragma unroll
    for (int k = 0; k < FORMULA::kOutputs; ++k) out[k].v[j] = narrow<T>(found[k]);
  }
#pragma unroll
  for (int k = 0; k < FORMULA::kOutputs; ++k) store<V>(x.out[k] + out_at, out[k]);
}

template <typename FORMULA, typename T, int V>
__global__ void __launch_bounds__(kFlatThreads, kFlatBlocks) flat(const FlatArgs<T> x, int lanes_log2) {
  const int64_t run = image_number() * (kFlatThreads >> lanes_log2) + (threadIdx.x >> lanes_log2);
  if (run >= x.runs) return;
  const int lane = int(threadIdx.x & ((1u << lanes_log2) - 1));
  const int64_t first = ((int64_t(blockIdx.x) << lanes_log2) + lane) * V;
  Accumulate<T> numbers[FORMULA::kNumbers];
#pragma unroll
  for (int j = 0; j < FORMULA::kNumbers; ++j) {
    numbers[j] = j < FORMULA::kOwn && x.own != nullptr ? x.own[run * FORMULA::kOwn + j] : x.numbers[j];
  }
  const int64_t in = run * x.length, out = run * x.out_step;
  if (first + V <= x.length) return flat_pack<FORMULA, T, V>(x, numbers, in + first, out + first);
  for (int64_t at = first; at < x.length; ++at) {  // the last pack is partial
    flat_pack<FORMULA, T, 1>(x, numbers, in + at, out + at);
  }
}

// ---- host ----

template <typename FORMULA, typename T, int V>
void launch_flat(const FlatArgs<T>& x, cudaStream_t stream) {
  const int64_t packs = ceil_div<int64_t>(x.length, V);
  int lanes_log2 = 0;
  while ((kFlatThreads >> lanes_log2) > 1 && (int64_t(1) << lanes_log2) < packs) ++lanes_log2;
  const int64_t blocks = ceil_div<int64_t>(packs, int64_t(1) << lanes_log2);
  const int64_t rows = ceil_div<int64_t>(x.runs, kFlatThreads >> lanes_log2);
  launch(flat<FORMULA, T, V>, grid_of(blocks, rows), kFlatThreads, 0, stream, x, lanes_log2);
}

// Nothing for an empty result. Results must not overlap inputs.
template <typename FORMULA, typename T>
cudaError_t run_flat(const FlatArgs<T>& x, cudaStream_t stream) {
  if (x.runs * x.length == 0) return cudaSuccess;
  // Every run must begin where a pack may.
  bool vector = x.runs == 1 || (x.length % kVector<T> == 0 && x.out_step % kVector<T> == 0);
  for (int k = 0; k < FORMULA::kInputs; ++k) vector = vector && aligned(x.in[k]);
  for (int k = 0; k < FORMULA::kOutputs; ++k) vector = vector && aligned(x.out[k]);
  vector ? launch_flat<FORMULA, T, kVector<T>>(x, stream) : launch_flat<FORMULA, T, 1>(x, stream);
  return cudaGetLastError();
}

}  // namespace fastcam::cuda
