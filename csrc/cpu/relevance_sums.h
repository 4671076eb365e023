// Leaves of sums over an image's elements, a block of it at a time; blocks are added by their callers, in order.
#pragma once

#include "cpu/leaf.h"
#include "formulas.h"

namespace fastcam::cpu {

// Elements of an image added up by one leaf: short enough for float32, long enough to be worth a call.
constexpr int64_t kSumBlock = 8192;

constexpr int kChains = 4;  // sums in turn: an addition takes several cycles

// The next kChains N values, in whatever order is loaded fastest.
template <int N, typename S>
FASTCAM_INLINE void load_chains(const S* p, Vector<Accumulate<S>, N> (&x)[kChains]) {
  if constexpr (sizeof(S) == 2) {
    for (int c = 0; c < kChains; c += 2) load_pairs<N>(p + c * N, x[c], x[c + 1]);
  } else {
    for (int c = 0; c < kChains; ++c) x[c] = load<N>(p + c * N);
  }
}

template <typename S>
struct BudgetArgs {
  const S* values;
  int64_t count;
  Accumulate<S>* positive;
  Accumulate<S>* negative;
};

template <typename S>
struct Budget {
  template <int BYTES>
  static FASTCAM_INLINE void body(const BudgetArgs<S>& a) {
    constexpr int N = kLanes<BYTES, S>;
    using V = Vector<Accumulate<S>, N>;
    V x[kChains], positive[kChains] = {}, negative[kChains] = {};
    int64_t i = 0;
    for (; i + kChains * N <= a.count; i += kChains * N) {
      load_chains<N>(a.values + i, x);
      for (int c = 0; c < kChains; ++c) add(x[c], positive[c], negative[c]);
    }
    for (; i + N <= a.count; i += N) add(load<N>(a.values + i), positive[0], negative[0]);
    if (i < a.count) add(load_first<N>(a.values + i, a.count - i), positive[0], negative[0]);
    *a.positive = horizontal_sum<N>(positive[0] + positive[1] + (positive[2] + positive[3]));
    *a.negative = horizontal_sum<N>(negative[0] + negative[1] + (negative[2] + negative[3]));
  }

  template <typename V>
  static FASTCAM_INLINE void add(V x, V& positive, V& negative) {
    const V zero = {};  // as operands of one maximum and one minimum, which hand NaN in x on
    positive += x < zero ? zero : x;
    negative -= zero < x ? zero : x;
  }
};

template <typename S>
struct CountArgs {
  const S* inputs;
  const S* shared;
  int64_t count;
  int64_t* found;
};

// How many elements of the shared part are not 0.
template <typename S>
struct CountShared {
  template <int BYTES>
  static FASTCAM_INLINE void body(const CountArgs<S>& a) {
    constexpr int N = kLanes<BYTES, S>;
    using V = Vector<Accumulate<S>, N>;
    V x[kChains], shared[kChains], found[kChains] = {};  // exact: a block is short
    int64_t i = 0;
    for (; i + kChains * N <= a.count; i += kChains * N) {
      load_chains<N>(a.inputs + i, x), load_chains<N>(a.shared + i, shared);
      for (int c = 0; c < kChains; ++c) add(x[c], shared[c], found[c]);
    }
    for (; i + N <= a.count; i += N) add(load<N>(a.inputs + i), load<N>(a.shared + i), found[0]);
    const int64_t n = a.count - i;
    if (n > 0) add(load_first<N>(a.inputs + i, n), load_first<N>(a.shared + i, n), found[0]);
    *a.found = static_cast<int64_t>(horizontal_sum<N>(found[0] + found[1] + (found[2] + found[3])));
  }

  template <typename V>
  static FASTCAM_INLINE void add(V x, V shared, V& found) {
    const V one = V{} + 1;
    found += relevance_shared(x, shared) == 0 ? V{} : one;
  }
};

}  // namespace fastcam::cpu
