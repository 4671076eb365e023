// Leaves of lfi_mask_backward: a channel's extremes, the sums that reach its lowest and highest values, then its gradient;
// a range of an image's channels.
#pragma once

#include "cpu/lfi_rows.h"

namespace fastcam::cpu {

template <typename S>
struct LfiMaskBackwardArgs {
  const S* grad;
  const S* features;
  const Accumulate<S>* grey;
  S* out;
  int64_t grad_row, feature_row, out_row;  // strides
  int64_t positions;
  int64_t k0, k1;
};

// NCHW: rows are channels.
template <typename S>
struct LfiMaskBackwardChannels {
  template <int BYTES>
  static FASTCAM_INLINE void body(const LfiMaskBackwardArgs<S>& a) {
    constexpr int N = kLanes<BYTES, S>;
    using A = Accumulate<S>;
    using V = Vector<A, N>;
    const LfiRow<A, N> grey = {a.grey, a.positions};
    for (int64_t k = a.k0; k < a.k1; ++k) {
      const LfiRow<S, N> row = {a.features + k * a.feature_row, a.positions}, grad = {a.grad + k * a.grad_row, a.positions};
      S* out = a.out + k * a.out_row;
      const Extremes<A> range = extremes_of(row);
      if (range.low == range.high) {
        for (int64_t p = 0; p < a.positions; p += N) row.put(out, p, V{});
        continue;
      }
      const V low = splat<N>(range.low), high = splat<N>(range.high), one = splat<N>(A(1));
      V total = {}, weighted = {}, lowest = {}, highest = {};
      for (int64_t p = 0; p < a.positions; p += N) {
        const V f = row.at(p), d = row.once(p, lfi_passed(grad.at(p), grey.at(p), f));
        total += d;
        weighted += row.once(p, d * ((f - low) / (high - low)));
        lowest += row.once(p, choice(f == low, one, V{})), highest += row.once(p, choice(f == high, one, V{}));
      }
      const auto shares = lfi_shares(horizontal_sum<N>(total), horizontal_sum<N>(weighted), horizontal_sum<N>(lowest),
                                     horizontal_sum<N>(highest), range.high - range.low);
      const V at_low = splat<N>(shares.at_low), at_high = splat<N>(shares.at_high);
      for (int64_t p = 0; p < a.positions; p += N) {
        const V f = row.at(p), d = lfi_passed(grad.at(p), grey.at(p), f);
        row.put(out, p, lfi_through_min_max(d, f, low, high, at_low, at_high));
      }
    }
  }
};

// channels_last: rows are positions.
template <typename S>
struct LfiMaskBackwardPositions {
  using A = Accumulate<S>;

  template <int BYTES>
  static FASTCAM_INLINE void body(const LfiMaskBackwardArgs<S>& a) {
    for (int64_t k = a.k0; k < a.k1; k += kLfiBlock) block<kLanes<BYTES, S>>(a, k, smaller(kLfiBlock, a.k1 - k));
  }

  template <int N>
  static FASTCAM_INLINE void add(A* sums, Vector<A, N> value) {
    store<N>(sums, load<N>(sums) + value);
  }

  template <int N>
  static FASTCAM_INLINE void block(const LfiMaskBackwardArgs<S>& a, int64_t k, int64_t length) {
    using V = Vector<A, N>;
    alignas(64) A low[kLfiBlock], high[kLfiBlock], total[kLfiBlock] = {}, weighted[kLfiBlock] = {};
    alignas(64) A lowest[kLfiBlock] = {}, highest[kLfiBlock] = {};
    extremes_of_channels<N>(a.features + k, a.feature_row, a.positions, length, low, high);
    const V one = splat<N>(A(1));
    for (int64_t p = 0; p < a.positions; ++p) {
      const S* features = a.features + p * a.feature_row + k;
      const S* grad = a.grad + p * a.grad_row + k;
      for (int64_t i = 0; i < length; i += N) {
        const V f = load_most<N>(features + i, length - i), l = load<N>(low + i), h = load<N>(high + i);
        const V d = lfi_passed(load_most<N>(grad + i, length - i), splat<N>(a.grey[p]), f);
        add<N>(total + i, d), add<N>(weighted + i, d * ((f - l) / (h - l)));
        add<N>(lowest + i, choice(f == l, one, V{})), add<N>(highest + i, choice(f == h, one, V{}));
      }
    }
    for (int64_t i = 0; i < length; ++i) {
      const auto shares = lfi_shares(total[i], weighted[i], lowest[i], highest[i], high[i] - low[i]);
      total[i] = shares.at_low, weighted[i] = shares.at_high;
    }
    for (int64_t p = 0; p < a.positions; ++p) {
      const S* features = a.features + p * a.feature_row + k;
      const S* grad = a.grad + p * a.grad_row + k;
      S* out = a.out + p * a.out_row + k;
      for (int64_t i = 0; i < length; i += N) {
        const V f = load_most<N>(features + i, length - i), l = load<N>(low + i), h = load<N>(high + i);
        const V d = lfi_passed(load_most<N>(grad + i, length - i), splat<N>(a.grey[p]), f);
        const V found = lfi_through_min_max(d, f, l, h, load<N>(total + i), load<N>(weighted + i));
        store_first<N>(out + i, choice(l == h, V{}, found), length - i);
      }
    }
  }
};

}  // namespace fastcam::cpu
