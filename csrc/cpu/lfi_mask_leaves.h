// Leaves of lfi_mask: extremes of a channel, then its masks while it is in the cache; a range of an image's channels.
#pragma once

#include "cpu/lfi_rows.h"

namespace fastcam::cpu {

template <typename S>
struct LfiMaskArgs {
  const S* features;
  const Accumulate<S>* grey;
  S* out;
  int64_t feature_row, out_row;  // strides
  int64_t positions;
  int64_t k0, k1;
};

// NCHW: rows are channels.
template <typename S>
struct LfiMaskChannels {
  template <int BYTES>
  static FASTCAM_INLINE void body(const LfiMaskArgs<S>& a) {
    constexpr int N = kLanes<BYTES, S>;
    using A = Accumulate<S>;
    const LfiRow<A, N> grey = {a.grey, a.positions};
    for (int64_t k = a.k0; k < a.k1; ++k) {
      const LfiRow<S, N> row = {a.features + k * a.feature_row, a.positions};
      S* out = a.out + k * a.out_row;
      const Extremes<A> range = extremes_of(row);
      const auto low = splat<N>(range.low), high = splat<N>(range.high);
      for (int64_t p = 0; p < a.positions; p += N) row.put(out, p, lfi_normalized(row.at(p), low, high) * grey.at(p));
    }
  }
};

// channels_last: rows are positions.
template <typename S>
struct LfiMaskPositions {
  template <int BYTES>
  static FASTCAM_INLINE void body(const LfiMaskArgs<S>& a) {
    for (int64_t k = a.k0; k < a.k1; k += kLfiBlock) block<kLanes<BYTES, S>>(a, k, smaller(kLfiBlock, a.k1 - k));
  }

  template <int N>
  static FASTCAM_INLINE void block(const LfiMaskArgs<S>& a, int64_t k, int64_t length) {
    alignas(64) Accumulate<S> low[kLfiBlock], high[kLfiBlock];
    extremes_of_channels<N>(a.features + k, a.feature_row, a.positions, length, low, high);
    for (int64_t p = 0; p < a.positions; ++p) {
      const S* features = a.features + p * a.feature_row + k;
      S* out = a.out + p * a.out_row + k;
      for (int64_t i = 0; i < length; i += N) {
        const auto f = load_most<N>(features + i, length - i);
        store_first<N>(out + i, lfi_normalized(f, load<N>(low + i), load<N>(high + i)) * a.grey[p], length - i);
      }
    }
  }
};

}  // namespace fastcam::cpu
