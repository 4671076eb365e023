// Leaf of elementwise ops: the same formula on every element of flat runs, one pass.
#pragma once

#include "cpu/leaf.h"

namespace fastcam::cpu {

// kInputs, kOutputs and kNumbers of a formula say how much of these arrays is used.
template <typename S>
struct FlatArgs {
  const S* in[5];
  S* out[3];
  Accumulate<S> numbers[4];
  int64_t count;
};

// FORMULA::apply(const V* in, const V* numbers, V* out) computes a vector of elements.
template <typename FORMULA, typename S>
struct Flat {
  template <int BYTES>
  static FASTCAM_INLINE void body(const FlatArgs<S>& a) {
    constexpr int N = kLanes<BYTES, S>;
    using V = Vector<Accumulate<S>, N>;
    V in[FORMULA::kInputs], out[FORMULA::kOutputs], numbers[FORMULA::kNumbers];
    for (int j = 0; j < FORMULA::kNumbers; ++j) numbers[j] = splat<N>(a.numbers[j]);
    int64_t i = 0;
    for (; i + N <= a.count; i += N) {
      for (int j = 0; j < FORMULA::kInputs; ++j) in[j] = load<N>(a.in[j] + i);
      FORMULA::apply(in, numbers, out);
      for (int j = 0; j < FORMULA::kOutputs; ++j) store<N>(a.out[j] + i, out[j]);
    }
    const int64_t n = a.count - i;
    if (n == 0) return;
    for (int j = 0; j < FORMULA::kInputs; ++j) in[j] = load_first<N>(a.in[j] + i, n);
    FORMULA::apply(in, numbers, out);
    for (int j = 0; j < FORMULA::kOutputs; ++j) store_first<N>(a.out[j] + i, out[j], n);
  }
};

}  // namespace fastcam::cpu
