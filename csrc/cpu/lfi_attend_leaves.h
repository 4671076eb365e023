// Leaves of lfi_attend after cam_map_reduce.h has added the channels up: an image's attention map, then its features raised
// by it while they are in the cache.
#pragma once

#include "cpu/lfi_rows.h"

namespace fastcam::cpu {

template <typename A>
struct LfiAttentionArgs {
  A* raw;  // the weighted sum, which becomes its ReLU
  A* attention;
  int64_t positions;
  bool keeps_constant;
};

template <typename A>
struct LfiAttention {
  template <int BYTES>
  static FASTCAM_INLINE void body(const LfiAttentionArgs<A>& a) {
    constexpr int N = kLanes<BYTES, A>;
    using V = Vector<A, N>;
    const LfiRow<A, N> row = {a.raw, a.positions};
    for (int64_t p = 0; p < a.positions; p += N) {
      const V x = row.at(p);
      row.put(a.raw, p, x <= 0 ? V{} : x);  // NaN stays
    }
    const Extremes<A> range = extremes_of(row);
    const A extent = range.high - range.low;
    if (!is_finite(extent)) {
      for (int64_t p = 0; p < a.positions; ++p) a.attention[p] = A(NAN);
    } else if (extent == A(0)) {
      for (int64_t p = 0; p < a.positions; ++p) a.attention[p] = a.keeps_constant ? a.raw[p] : A(0);
    } else {
      for (int64_t p = 0; p < a.positions; p += N) row.put(a.attention, p, (row.at(p) - range.low) / extent);
    }
  }
};

template <typename S>
struct LfiRaiseArgs {
  const S* features;
  const Accumulate<S>* attention;
  S* out;
  int64_t feature_row, out_row;  // strides
  int64_t channels, positions;
};

// NCHW: rows are channels.
template <typename S>
struct LfiRaiseChannels {
  template <int BYTES>
  static FASTCAM_INLINE void body(const LfiRaiseArgs<S>& a) {
    constexpr int N = kLanes<BYTES, S>;
    using A = Accumulate<S>;
    const LfiRow<A, N> attention = {a.attention, a.positions};
    for (int64_t k = 0; k < a.channels; ++k) {
      const LfiRow<S, N> row = {a.features + k * a.feature_row, a.positions};
      S* out = a.out + k * a.out_row;
      for (int64_t p = 0; p < a.positions; p += N) row.put(out, p, (A(1) + attention.at(p)) * row.at(p));
    }
  }
};

// channels_last: rows are positions.
template <typename S>
struct LfiRaisePositions {
  template <int BYTES>
  static FASTCAM_INLINE void body(const LfiRaiseArgs<S>& a) {
    constexpr int N = kLanes<BYTES, S>;
    for (int64_t p = 0; p < a.positions; ++p) {
      const LfiRow<S, N> row = {a.features + p * a.feature_row, a.channels};
      S* out = a.out + p * a.out_row;
      const auto gain = splat<N>(Accumulate<S>(1) + a.attention[p]);
      for (int64_t k = 0; k < a.channels; k += N) row.put(out, k, gain * row.at(k));
    }
  }
};

}  // namespace fastcam::cpu
