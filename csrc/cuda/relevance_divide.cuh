// relevance_divide on CUDA devices, framework-free: raw pointers, sizes, stream.
//
//   out = r f / st(d),  st(d) = d + epsilon for d >= 0, else d - epsilon; 0 where st(d) = 0
#pragma once

#include "cuda/flat.cuh"

namespace fastcam::cuda {

template <bool FACTOR>
struct Divide {
  static constexpr int kInputs = FACTOR ? 3 : 2, kOutputs = 1, kNumbers = 1, kOwn = 0;
  template <typename A>
  static __device__ __forceinline__ void apply(const A* in, const A* numbers, A* out) {
    A r = in[0];
    if constexpr (FACTOR) r *= in[2];
    out[0] = relevance_quotient(r, in[1], numbers[0]);
  }
};

// `factor` may be null; all in one memory order.
template <typename T>
cudaError_t run_relevance_divide(const T* relevance, const T* divisor, const T* factor, T* out, int64_t count,
                                 double epsilon, cudaStream_t stream) {
  FlatArgs<T> x = {};
  x.in[0] = relevance, x.in[1] = divisor, x.in[2] = factor, x.out[0] = out;
  x.numbers[0] = Accumulate<T>(epsilon);
  x.runs = 1, x.length = count;
  return factor != nullptr ? run_flat<Divide<true>>(x, stream) : run_flat<Divide<false>>(x, stream);
}

}  // namespace fastcam::cuda
