// relevance_split on CUDA devices, framework-free: raw pointers, sizes, stream. Formulas: csrc/formulas.h.
//
// A run of the inputs, an image or (channels_last) a pixel, ends up in two places of the result.
#pragma once

#include "cuda/flat.cuh"

namespace fastcam::cuda {

enum class Rule : int { alpha_beta, gamma, rap };

template <Rule RULE, bool FACTOR>
struct Split {
  static constexpr int kInputs = FACTOR ? 4 : 3, kOutputs = 2, kNumbers = 4, kOwn = 0;
  template <typename A>
  static __device__ __forceinline__ void apply(const A* in, const A* n, A* out) {
    A r = in[0];
    if constexpr (FACTOR) r *= in[3];
    if constexpr (RULE == Rule::alpha_beta) {
      relevance_alpha_beta(r, in[1], in[2], n[0], n[1], n[2], n[3], out[0], out[1]);
    } else if constexpr (RULE == Rule::gamma) {
      relevance_gamma(r, in[1], in[2], n[0], n[1], n[2], n[3], out[0], out[1]);
    } else {
      relevance_rap(r, in[1], in[2], n[0], n[1], n[2], n[3], out[0], out[1]);
    }
  }
};

// (runs, length), dense; the result (runs, 2, length).
template <typename T>
struct SplitArgs {
  const T* relevance;
  const T* output;
  const T* positive;
  const T* factor;  // may be null
  T* out;
  int64_t runs, length;
  double first, second, epsilon;
};

// Of the type stored: what sums of it are known to.
template <typename T>
constexpr double unit_of() {
  return std::is_same_v<T, double> ? 0x1p-52 : std::is_same_v<T, float> ? 0x1p-23 : std::is_same_v<T, __half> ? 0x1p-10 : 0x1p-7;
}

template <Rule RULE, typename T>
cudaError_t run_split(const FlatArgs<T>& x, cudaStream_t stream) {
  return x.in[3] != nullptr ? run_flat<Split<RULE, true>>(x, stream) : run_flat<Split<RULE, false>>(x, stream);
}

template <typename T>
cudaError_t run_relevance_split(const SplitArgs<T>& given, Rule rule, cudaStream_t stream) {
  using A = Accumulate<T>;
  FlatArgs<T> x = {};
  x.in[0] = given.relevance, x.in[1] = given.output, x.in[2] = given.positive, x.in[3] = given.factor;
  x.out[0] = given.out, x.out[1] = given.out + given.length;
  x.numbers[0] = A(given.first), x.numbers[1] = A(given.second), x.numbers[2] = A(given.epsilon);
  x.numbers[3] = A(8 * unit_of<T>());
  x.runs = given.runs, x.length = given.length, x.out_step = 2 * given.length;
  if (rule == Rule::alpha_beta) return run_split<Rule::alpha_beta>(x, stream);
  return rule == Rule::gamma ? run_split<Rule::gamma>(x, stream) : run_split<Rule::rap>(x, stream);
}

}  // namespace fastcam::cuda
