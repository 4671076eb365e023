// relevance_equilibrium on CUDA devices, framework-free: raw pointers, sizes, stream.
//
//   P = max(r, 0) / p,  N = min(r, 0) / q,  out = (ratio P + N) / zC, P / zA, N / zB;  0 / 0 = 0 and x / 0 = 0
#pragma once

#include "cuda/flat.cuh"

namespace fastcam::cuda {

struct Equilibrium {
  static constexpr int kInputs = 4, kOutputs = 3, kNumbers = 3, kOwn = 2;  // numbers: p, q, ratio
  template <typename A>
  static __device__ __forceinline__ void apply(const A* in, const A* n, A* out) {
    fastcam::relevance_equilibrium(in[0], in[1], in[2], in[3], n[2], n[0], n[1], out[0], out[1], out[2]);
  }
};

// relevance (batch, length), budgets (batch, 2), divisors and result (3, batch, length), all in one memory order.
template <typename T>
cudaError_t run_relevance_equilibrium(const T* relevance, const Accumulate<T>* budgets, const T* divisors, T* out,
                                      int64_t batch, int64_t length, double ratio, cudaStream_t stream) {
  FlatArgs<T> x = {};
  x.in[0] = relevance;
  for (int k = 0; k < 3; ++k) x.in[1 + k] = divisors + k * batch * length, x.out[k] = out + k * batch * length;
  x.numbers[2] = Accumulate<T>(ratio), x.own = budgets;
  x.runs = batch, x.length = x.out_step = length;
  return run_flat<Equilibrium>(x, stream);
}

}  // namespace fastcam::cuda
