// Leaves of channel_weights: per channel, sums over positions of f(multiplier, feature), one image at a time.
//
// The loop nests of cam_map_reduce.h with roles exchanged. NCHW: a channel is a row, each sum runs along it (ChannelSums).
// channels_last: rows are positions, so whole rows are added to sums in L1 (PositionSums). Both read features and
// multipliers once, in memory order; grad_cam_pp needs the features' totals before it looks at multipliers.
#pragma once

#include "cpu/leaf.h"

namespace fastcam::cpu {

enum class Mode { kMean, kSum, kXGrad, kGradCamPP };

template <typename S>
struct ChannelArgs {
  const S* features;
  const S* reference;  // null without one
  const S* multipliers;
  int64_t feature_row, reference_row, multiplier_row, multiplier_target;  // strides
  int64_t channels, positions, targets;
  int64_t k0, k1;
  Accumulate<S>* out;  // (targets, channels)
};

// The formulas, for vectors of positions or of channels alike.
template <Mode MODE, typename V, typename A>
struct Formula {
  static constexpr bool kReadsProduct = MODE == Mode::kSum || MODE == Mode::kXGrad;
  static constexpr bool kNeedsTotals = MODE == Mode::kXGrad || MODE == Mode::kGradCamPP;
  static constexpr bool kTotalsFirst = MODE == Mode::kGradCamPP;  // its terms depend on them

  static FASTCAM_INLINE V term(V g, V a, V total) {
    if constexpr (MODE == Mode::kMean) return g;
    if constexpr (MODE == Mode::kSum || MODE == Mode::kXGrad) return g * a;
    const V denominator = A(2) + total * g;
    const V share = magnitude(denominator) < A(1e-6) ? V{} : A(1) / denominator;
    return share * (g < 0 ? V{} : g);  // NaN compares false and stays
  }

  static FASTCAM_INLINE V magnitude(V v) { return v < 0 ? -v : v; }
};

template <Mode MODE, typename A>
FASTCAM_INLINE A finished(A sum, A total, A magnitude, int64_t positions) {
  if constexpr (MODE == Mode::kMean) return sum / static_cast<A>(positions);
  if constexpr (MODE == Mode::kXGrad) {
    const A absolute = total < 0 ? -total : total;
    return absolute <= A(1e-6) * magnitude ? A(0) : sum / total;
  }
  return sum;
}

template <typename S, bool REF, Mode MODE>
struct ChannelSums {
  using A = Accumulate<S>;

  // Loads along a row; the last, partial vector has zeros beyond the end.
  template <int N>
  struct Row {
    const S* p;
    bool safe;  // may be read to the end of its last vector

    FASTCAM_INLINE Vector<A, N> full(int64_t at) const { return load<N>(p + at); }
    FASTCAM_INLINE Vector<A, N> first(int64_t at, int64_t n) const {
      if (!safe) return load_first<N>(p + at, n);
      std::conditional_t<sizeof(A) == 8, Vector<int64_t, N>, Vector<int32_t, N>> lane;
      for (int i = 0; i < N; ++i) lane[i] = i;
      return lane < static_cast<std::conditional_t<sizeof(A) == 8, int64_t, int32_t>>(n) ? load<N>(p + at) : Vector<A, N>{};
    }
    FASTCAM_INLINE Vector<A, N> get(int64_t at, int64_t n) const { return n < N ? first(at, n) : full(at); }
  };

  template <int BYTES>
  static FASTCAM_INLINE void body(const ChannelArgs<S>& a) {
    constexpr int N = kLanes<BYTES, S>;
    using V = Vector<A, N>;
    using F = Formula<MODE, V, A>;
    const int64_t overrun = (N - a.positions % N) % N;
    const int64_t f_safe = safe_rows(a.channels, a.feature_row, overrun);
    const int64_t r_safe = REF ? safe_rows(a.channels, a.reference_row, overrun) : 0;
    const int64_t g_safe = safe_rows(a.channels, a.multiplier_row, overrun);
    for (int64_t k = a.k0; k < a.k1; ++k) {
      const Row<N> f = {a.features + k * a.feature_row, k < f_safe};
      const Row<N> r = {REF ? a.reference + k * a.reference_row : nullptr, k < r_safe};
      V totals = {}, magnitudes = {};
      A total = 0, magnitude = 0;
      if constexpr (F::kTotalsFirst) {
        for (int64_t p = 0; p < a.positions; p += N) totals += difference_at<N>(f, r, p, a.positions - p);
        total = horizontal_sum<N>(totals);
      }
      for (int64_t t = 0; t < a.targets; ++t) {
        const Row<N> g = {a.multipliers + t * a.multiplier_target + k * a.multiplier_row, k < g_safe};
        V sums = {};
        for (int64_t p = 0; p < a.positions; p += N) {
          const int64_t n = a.positions - p;
          V d = {};
          if constexpr (F::kReadsProduct) d = difference_at<N>(f, r, p, n);
          if constexpr (F::kNeedsTotals && !F::kTotalsFirst) {
            if (t == 0) {
              totals += d;
              magnitudes += F::magnitude(d);
            }
          }
          sums += F::term(g.get(p, n), d, splat<N>(total));
        }
        if constexpr (F::kNeedsTotals && !F::kTotalsFirst) {
          if (t == 0) {
            total = horizontal_sum<N>(totals);
            magnitude = horizontal_sum<N>(magnitudes);
          }
        }
        a.out[t * a.channels + k] = finished<MODE>(horizontal_sum<N>(sums), total, magnitude, a.positions);
      }
    }
  }

  template <int N>
  static FASTCAM_INLINE Vector<A, N> difference_at(const Row<N>& f, const Row<N>& r, int64_t p, int64_t n) {
    if constexpr (REF) return f.get(p, n) - r.get(p, n);
    return f.get(p, n);
  }
};

constexpr int64_t kChannelBlock = 2048;  // channels whose sums stay in L1 (8 KiB an array) while rows stream past

template <typename S, bool REF, Mode MODE>
struct PositionSums {
  using A = Accumulate<S>;

  template <int BYTES>
  static FASTCAM_INLINE void body(const ChannelArgs<S>& a) {
    for (int64_t k = a.k0; k < a.k1; k += kChannelBlock) block<kLanes<BYTES, S>>(a, k, smaller(kChannelBlock, a.k1 - k));
  }

  template <int N>
  static FASTCAM_INLINE Vector<A, N> get(const S* p, int64_t n) {
    return n >= N ? load<N>(p) : load_first<N>(p, n);
  }

  template <int N>
  static FASTCAM_INLINE Vector<A, N> difference_at(const S* f, const S* r, int64_t k, int64_t n) {
    if constexpr (REF) return get<N>(f + k, n) - get<N>(r + k, n);
    return get<N>(f + k, n);
  }

  template <int N>
  static FASTCAM_INLINE void add(A* sums, Vector<A, N> value) {
    store<N>(sums, load<N>(sums) + value);
  }

  // Channels [k, k + length) of all positions and targets.
  template <int N>
  static FASTCAM_INLINE void block(const ChannelArgs<S>& a, int64_t k, int64_t length) {
    using V = Vector<A, N>;
    using F = Formula<MODE, V, A>;
    alignas(64) A totals[kChannelBlock] = {}, magnitudes[kChannelBlock] = {}, sums[kChannelBlock];
    if constexpr (F::kTotalsFirst) {
      for (int64_t p = 0; p < a.positions; ++p) {
        const S* f = a.features + p * a.feature_row + k;
        const S* r = REF ? a.reference + p * a.reference_row + k : nullptr;
        for (int64_t i = 0; i < length; i += N) add<N>(totals + i, difference_at<N>(f, r, i, length - i));
      }
    }
    for (int64_t t = 0; t < a.targets; ++t) {
      std::memset(sums, 0, sizeof(sums));
      for (int64_t p = 0; p < a.positions; ++p) {
        const S* f = a.features + p * a.feature_row + k;
        const S* r = REF ? a.reference + p * a.reference_row + k : nullptr;
        const S* g = a.multipliers + t * a.multiplier_target + p * a.multiplier_row + k;
        for (int64_t i = 0; i < length; i += N) {
          V d = {};
          if constexpr (F::kReadsProduct) d = difference_at<N>(f, r, i, length - i);
          if constexpr (F::kNeedsTotals && !F::kTotalsFirst) {
            if (t == 0) {
              add<N>(totals + i, d);
              add<N>(magnitudes + i, F::magnitude(d));
            }
          }
          add<N>(sums + i, F::term(get<N>(g + i, length - i), d, load<N>(totals + i)));
        }
      }
      A* out = a.out + t * a.channels + k;
      for (int64_t i = 0; i < length; ++i) out[i] = finished<MODE, A>(sums[i], totals[i], magnitudes[i], a.positions);
    }
  }
};

}  // namespace fastcam::cpu
