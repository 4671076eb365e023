// Leaves of lfi_attend_backward after cam_map_reduce.h has added up grad_attended times features: the gradient of an
// image's weighted sum, then those of its features and importances while what they need is in the cache.
#pragma once

#include "cpu/lfi_rows.h"

namespace fastcam::cpu {

template <typename A>
struct LfiMapGradientArgs {
  const A* sums;
  const A* grad_attention;  // null for none,
  const A* grad_raw;        // like this
  const A* attention;
  const A* raw;
  A* out;
  int64_t positions;
  bool keeps_constant;
};

template <typename A>
struct LfiMapGradient {
  template <int BYTES>
  static FASTCAM_INLINE void body(const LfiMapGradientArgs<A>& a) {
    constexpr int N = kLanes<BYTES, A>;
    using V = Vector<A, N>;
    const int64_t positions = a.positions;
    const LfiRow<A, N> sums = {a.sums, positions}, given = {a.grad_attention, positions}, extra = {a.grad_raw, positions};
    const LfiRow<A, N> attention = {a.attention, positions}, raw = {a.raw, positions};
    const Extremes<A> range = extremes_of(raw);
    const bool constant = range.low == range.high, finite = a.attention[0] == a.attention[0];
    const V low = splat<N>(range.low), high = splat<N>(range.high), one = splat<N>(A(1));
    V total = {}, weighted = {}, lowest = {}, highest = {};
    for (int64_t p = 0; p < positions && !constant; p += N) {
      V d = sums.at(p);
      if (a.grad_attention != nullptr) d += given.at(p);
      total += raw.once(p, d), weighted += raw.once(p, d * attention.at(p));
      const V x = raw.at(p);
      lowest += raw.once(p, choice(x == low, one, V{})), highest += raw.once(p, choice(x == high, one, V{}));
    }
    const auto shares = lfi_shares(horizontal_sum<N>(total), horizontal_sum<N>(weighted), horizontal_sum<N>(lowest),
                                   horizontal_sum<N>(highest), range.high - range.low);
    const V at_low = splat<N>(shares.at_low), at_high = splat<N>(shares.at_high);
    for (int64_t p = 0; p < positions; p += N) {
      V d = sums.at(p);
      const V x = raw.at(p);
      if (a.grad_attention != nullptr) d += given.at(p);
      if (!finite) {
        d = splat<N>(A(NAN));
      } else if (!constant) {
        d = lfi_through_min_max(d, x, low, high, at_low, at_high);
      } else if (!a.keeps_constant) {
        d = V{};
      }
      if (a.grad_raw != nullptr) d += extra.at(p);
      raw.put(a.out, p, x <= 0 ? V{} : d);
    }
  }
};

template <typename S>
struct LfiAttendBackwardArgs {
  const S* grad;
  const S* features;
  const Accumulate<S>* importance;
  const Accumulate<S>* attention;
  const Accumulate<S>* map_gradient;
  S* out;
  Accumulate<S>* grad_importance;
  int64_t grad_row, feature_row, out_row;  // strides
  int64_t channels, positions;
};

// NCHW: rows are channels.
template <typename S>
struct LfiAttendBackwardChannels {
  template <int BYTES>
  static FASTCAM_INLINE void body(const LfiAttendBackwardArgs<S>& a) {
    constexpr int N = kLanes<BYTES, S>;
    using A = Accumulate<S>;
    using V = Vector<A, N>;
    const LfiRow<A, N> attention = {a.attention, a.positions}, map = {a.map_gradient, a.positions};
    for (int64_t k = 0; k < a.channels; ++k) {
      const LfiRow<S, N> row = {a.features + k * a.feature_row, a.positions}, grad = {a.grad + k * a.grad_row, a.positions};
      S* out = a.out + k * a.out_row;
      double total = 0;
      for (int64_t p = 0; p < a.positions;) {
        const int64_t end = smaller(a.positions, p + kChain * N);
        V sum = {};
        for (; p < end; p += N) {
          const V d = map.at(p);
          sum += row.once(p, d * row.at(p));
          row.put(out, p, (A(1) + attention.at(p)) * grad.at(p) + a.importance[k] * d);
        }
        total += horizontal_sum<N>(sum);
      }
      a.grad_importance[k] = static_cast<A>(total);
    }
  }
};

constexpr int64_t kLfiSums = 1024;  // channels whose sums stay in L1 while rows stream past

// channels_last: rows are positions.
template <typename S>
struct LfiAttendBackwardPositions {
  using A = Accumulate<S>;

  template <int BYTES>
  static FASTCAM_INLINE void body(const LfiAttendBackwardArgs<S>& a) {
    for (int64_t k = 0; k < a.channels; k += kLfiSums) block<kLanes<BYTES, S>>(a, k, smaller(kLfiSums, a.channels - k));
  }

  template <int N>
  static FASTCAM_INLINE void block(const LfiAttendBackwardArgs<S>& a, int64_t k, int64_t length) {
    alignas(64) double sums[kLfiSums] = {};
    int64_t p = 0;
    for (; p + 4 <= a.positions; p += 4) add_rows<N, 4>(a, p, k, length, sums);
    for (; p < a.positions; ++p) add_rows<N, 1>(a, p, k, length, sums);
    for (int64_t i = 0; i < length; ++i) a.grad_importance[k + i] = static_cast<A>(sums[i]);
  }

  // Positions [p, p + ROWS), added up in registers before memory sees the sum.
  template <int N, int ROWS>
  static FASTCAM_INLINE void add_rows(const LfiAttendBackwardArgs<S>& a, int64_t p, int64_t k, int64_t length,
                                      double* sums) {
    for (int64_t i = 0; i < length; i += N) {
      const int64_t n = length - i;
      const auto importance = load_most<N>(a.importance + k + i, n);
      Vector<A, N> chain = {};
#pragma GCC unroll 4
      for (int j = 0; j < ROWS; ++j) {
        const int64_t row = p + j;
        const A d = a.map_gradient[row], gain = A(1) + a.attention[row];
        chain += d * load_most<N>(a.features + row * a.feature_row + k + i, n);
        const auto grad = load_most<N>(a.grad + row * a.grad_row + k + i, n);
        store_first<N>(a.out + row * a.out_row + k + i, gain * grad + d * importance, n);
      }
      add_wide<N>(sums + i, chain);
    }
  }
};

}  // namespace fastcam::cpu
