// Leaf of elementwise ops: the same formula on every element of flat runs, one pass.
#pragma once

#include "cpu/leaf.h"

namespace fastcam::cpu {

// kInputs, kOutputs and kNumbers of a formula say how much of these arrays is used. From one run to the next, inputs
// advance by `count` elements, outputs by `out_step`.
template <typename S>
struct FlatArgs {
  const S* in[5];
  S* out[3];
  Accumulate<S> numbers[4];
  int64_t count;
  int64_t runs = 1, out_step = 0;
};

// FORMULA::apply(const V* in, const V* numbers, V* out) computes a vector of elements.
template <typename FORMULA, typename S>
struct Flat {
  template <int BYTES>
  static FASTCAM_INLINE void body(const FlatArgs<S>& a) {
    constexpr int N = kLanes<BYTES, S>, IN = FORMULA::kInputs, OUT = FORMULA::kOutputs;
    using V = Vector<Accumulate<S>, N>;
    V numbers[FORMULA::kNumbers];
    for (int j = 0; j < FORMULA::kNumbers; ++j) numbers[j] = splat<N>(a.numbers[j]);
    const int64_t count = a.count;
    for (int64_t r = 0; r < a.runs; ++r) {
      const S* from[IN];
      S* to[OUT];
      for (int j = 0; j < IN; ++j) from[j] = a.in[j] + r * count;
      for (int j = 0; j < OUT; ++j) to[j] = a.out[j] + r * a.out_step;
      V in[IN], out[OUT];
      int64_t i = 0;
      if constexpr (sizeof(S) == 2) {
        V in_odd[IN], out_odd[OUT];
        for (; i + 2 * N <= count; i += 2 * N) {
          for (int j = 0; j < IN; ++j) load_pairs<N>(from[j] + i, in[j], in_odd[j]);
          FORMULA::apply(in, numbers, out);
          FORMULA::apply(in_odd, numbers, out_odd);
          for (int j = 0; j < OUT; ++j) store_pairs<N>(to[j] + i, out[j], out_odd[j]);
        }
      }
      for (; i + N <= count; i += N) {
        for (int j = 0; j < IN; ++j) in[j] = load<N>(from[j] + i);
        FORMULA::apply(in, numbers, out);
        for (int j = 0; j < OUT; ++j) store<N>(to[j] + i, out[j]);
      }
      const int64_t n = count - i;
      if (n == 0) continue;
      for (int j = 0; j < IN; ++j) in[j] = load_first<N>(from[j] + i, n);
      FORMULA::apply(in, numbers, out);
      for (int j = 0; j < OUT; ++j) store_first<N>(to[j] + i, out[j], n);
    }
  }
};

}  // namespace fastcam::cpu
