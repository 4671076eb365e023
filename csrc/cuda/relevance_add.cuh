// relevance_add on CUDA devices, framework-free: raw pointers, sizes, stream.
//
//   (a s, b s),  s = r f / st(a + b),  st as in relevance_divide
#pragma once

#include "cuda/flat.cuh"

namespace fastcam::cuda {

template <bool FACTOR>
struct DivideAmong {
  static constexpr int kInputs = FACTOR ? 4 : 3, kOutputs = 2, kNumbers = 1, kOwn = 0;
  template <typename A>
  static __device__ __forceinline__ void apply(const A* in, const A* numbers, A* out) {
    A r = in[0];
    if constexpr (FACTOR) r *= in[3];
    const A share = relevance_quotient(r, in[1] + in[2], numbers[0]);
    out[0] = in[1] * share, out[1] = in[2] * share;
  }
};

// `factor` may be null; all in one memory order.
template <typename T>
cudaError_t run_relevance_add(const T* relevance, const T* first, const T* second, const T* factor, T* out, T* other,
                              int64_t count, double epsilon, cudaStream_t stream) {
  FlatArgs<T> x = {};
  x.in[0] = relevance, x.in[1] = first, x.in[2] = second, x.in[3] = factor;
  x.out[0] = out, x.out[1] = other;
  x.numbers[0] = Accumulate<T>(epsilon);
  x.runs = 1, x.length = count;
  return factor != nullptr ? run_flat<DivideAmong<true>>(x, stream) : run_flat<DivideAmong<false>>(x, stream);
}

}  // namespace fastcam::cuda
