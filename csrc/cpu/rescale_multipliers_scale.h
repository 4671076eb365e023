// Leaf of rescale_multipliers: one flat run of elements.
#pragma once

#include "cpu/leaf.h"
#include "formulas.h"

namespace fastcam::cpu {

// S: inputs and reference; G: multipliers and result, S itself or its accumulation type.
template <typename S, typename G>
struct RescaleArgs {
  const G* multipliers;
  const S* inputs;
  const S* reference;
  G* out;
  int64_t count;
  Accumulate<S> negative_slope;
};

template <typename S, typename G>
struct Rescale {
  template <int BYTES>
  static FASTCAM_INLINE void body(const RescaleArgs<S, G>& a) {
    constexpr int N = kLanes<BYTES, S>;
    const auto slope = splat<N>(a.negative_slope);
    int64_t i = 0;
    if constexpr (sizeof(G) == 2) {
      Vector<float, N> u[2], r[2], g[2];
      for (; i + 2 * N <= a.count; i += 2 * N) {
        load_pairs<N>(a.inputs + i, u[0], u[1]), load_pairs<N>(a.reference + i, r[0], r[1]);
        load_pairs<N>(a.multipliers + i, g[0], g[1]);
        for (int j = 0; j < 2; ++j) g[j] *= rescale_factor(u[j], r[j], slope);
        store_pairs<N>(a.out + i, g[0], g[1]);
      }
    }
    for (; i + N <= a.count; i += N) {
      const auto factor = rescale_factor(load<N>(a.inputs + i), load<N>(a.reference + i), slope);
      store<N>(a.out + i, load<N>(a.multipliers + i) * factor);
    }
    const int64_t n = a.count - i;
    if (n == 0) return;
    const auto factor = rescale_factor(load_first<N>(a.inputs + i, n), load_first<N>(a.reference + i, n), slope);
    store_first<N>(a.out + i, load_first<N>(a.multipliers + i, n) * factor, n);
  }
};

}  // namespace fastcam::cpu
