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

template <Mode MODE, typename T>
FASTCAM_INLINE T finished(T sum, T total, T magnitude, int64_t positions) {
  if constexpr (MODE == Mode::kMean) return sum / static_cast<T>(positions);
  if constexpr (MODE == Mode::kXGrad) {
    const T absolute = total < 0 ? -total : total;
    return absolute <= T(1e-6) * magnitude ? T(0) : sum / total;
  }
  return sum;
}

template <typename S, bool REF, Mode MODE>
struct ChannelSums {
  using A = Accumulate<S>;

  // The first n lanes, zeros after them.
  template <int N>
  static FASTCAM_INLINE Vector<A, N> first_lanes(Vector<A, N> v, int64_t n) {
    using I = std::conditional_t<sizeof(A) == 8, int64_t, int32_t>;
    Vector<I, N> lane;
    for (int i = 0; i < N; ++i) lane[i] = i;
    return lane < static_cast<I>(n) ? v : Vector<A, N>{};
  }

  // Loads along a row; the last, partial vector has zeros beyond the end.
  template <int N>
  struct Row {
    const S* p;
    bool safe;  // may be read to the end of its last vector

    FASTCAM_INLINE Vector<A, N> full(int64_t at) const { return load<N>(p + at); }
    FASTCAM_INLINE Vector<A, N> first(int64_t at, int64_t n) const {
      return safe ? first_lanes<N>(load<N>(p + at), n) : load_first<N>(p + at, n);
    }
    FASTCAM_INLINE Vector<A, N> get(int64_t at, int64_t n) const { return n < N ? first(at, n) : full(at); }
  };

  template <int BYTES>
  static FASTCAM_INLINE void body(const ChannelArgs<S>& a) {
    constexpr int N = kLanes<BYTES, S>;
    a.positions <= kChain * N ? channels<N, A>(a) : channels<N, double>(a);
  }

  // Sums are of T: rows of one chain need no doubles.
  template <int N, typename T>
  static FASTCAM_INLINE void channels(const ChannelArgs<S>& a) {
    using V = Vector<A, N>;
    using F = Formula<MODE, V, A>;
    const int64_t overrun = (N - a.positions % N) % N;
    const int64_t f_safe = safe_rows(a.channels, a.feature_row, overrun);
    const int64_t r_safe = REF ? safe_rows(a.channels, a.reference_row, overrun) : 0;
    const int64_t g_safe = safe_rows(a.channels, a.multiplier_row, overrun);
    constexpr bool kOneChain = std::is_same_v<T, A>;
    const int64_t positions = a.positions, chain = kOneChain ? positions : kChain * N;
    for (int64_t k = a.k0; k < a.k1; ++k) {
      const Row<N> f = {a.features + k * a.feature_row, k < f_safe};
      const Row<N> r = {REF ? a.reference + k * a.reference_row : nullptr, k < r_safe};
      T total = 0, magnitude = 0;
      if constexpr (F::kTotalsFirst) {
        for (int64_t start = 0; start < positions; start += chain) {
          const int64_t end = kOneChain ? positions : smaller(positions, start + chain);
          V totals = {};
          for (int64_t p = start; p < end; p += N) totals += difference_at<N>(f, r, p, positions - p);
          total += horizontal_sum<N>(totals);
        }
      }
      for (int64_t t = 0; t < a.targets; ++t) {
        const Row<N> g = {a.multipliers + t * a.multiplier_target + k * a.multiplier_row, k < g_safe};
        const V shift = splat<N>(static_cast<A>(total));
        T sum = 0;
        for (int64_t start = 0; start < positions; start += chain) {
          const int64_t end = kOneChain ? positions : smaller(positions, start + chain);
          V sums = {}, totals = {}, magnitudes = {};
          for (int64_t p = start; p < end; p += N) {
            const int64_t n = positions - p;
            V d = {};
            if constexpr (F::kReadsProduct) d = difference_at<N>(f, r, p, n);
            if constexpr (F::kNeedsTotals && !F::kTotalsFirst) {
              totals += d;
              magnitudes += F::magnitude(d);
            }
            V term = F::term(g.get(p, n), d, shift);
            // An infinite total would make NaN of positions that do not exist.
            if (F::kTotalsFirst && n < N) term = first_lanes<N>(term, n);
            sums += term;
          }
          sum += horizontal_sum<N>(sums);
          if constexpr (F::kNeedsTotals && !F::kTotalsFirst) {
            if (t == 0) total += horizontal_sum<N>(totals), magnitude += horizontal_sum<N>(magnitudes);
          }
        }
        a.out[t * a.channels + k] = static_cast<A>(finished<MODE>(sum, total, magnitude, positions));
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

  static constexpr int kRows = 2;

  // Of a chain of rows, and of all.
  struct Sum {
    alignas(64) A chain[kChannelBlock];
    alignas(64) double all[kChannelBlock];

    FASTCAM_INLINE void clear(int64_t length) {
      for (int64_t i = 0; i < length; ++i) chain[i] = 0, all[i] = 0;
    }
    template <int N>
    FASTCAM_INLINE void add(int64_t i, Vector<A, N> v) {
      store<N>(chain + i, load<N>(chain + i) + v);
    }
    FASTCAM_INLINE void end_chain(int64_t length) {
      for (int64_t i = 0; i < length; ++i) all[i] += chain[i], chain[i] = 0;
    }
  };
  struct Sums {
    Sum terms, totals, magnitudes;
    alignas(64) A shift[kChannelBlock];  // the totals, where terms depend on them
  };

  template <int BYTES>
  static FASTCAM_INLINE void body(const ChannelArgs<S>& a) {
    for (int64_t k = a.k0; k < a.k1; k += kChannelBlock) block<kLanes<BYTES, S>>(a, k, smaller(kChannelBlock, a.k1 - k));
  }

  template <int N>
  static FASTCAM_INLINE Vector<A, N> get(const S* p, int64_t n) {
    return n >= N ? load<N>(p) : load_first<N>(p, n);
  }

  // ROWS positions, `apart` from each other: terms of target t, the features' totals.
  template <int N, int ROWS, bool TERMS, bool TOTALS>
  static FASTCAM_INLINE void add_rows(const ChannelArgs<S>& a, int64_t t, int64_t p, int64_t apart, int64_t k, int64_t length,
                                      Sums& sums) {
    using V = Vector<A, N>;
    using F = Formula<MODE, V, A>;
    for (int64_t i = 0; i < length; i += N) {
      const int64_t n = length - i;
      V terms = {}, totals = {}, magnitudes = {}, shift = {};
      if constexpr (TERMS && F::kTotalsFirst) shift = load<N>(sums.shift + i);
#pragma GCC unroll 4
      for (int j = 0; j < ROWS; ++j) {
        const int64_t row = p + j * apart;
        V d = {};
        if constexpr (TOTALS || F::kReadsProduct) d = get<N>(a.features + row * a.feature_row + k + i, n);
        if constexpr (REF && (TOTALS || F::kReadsProduct)) d -= get<N>(a.reference + row * a.reference_row + k + i, n);
        if constexpr (TOTALS) totals += d, magnitudes += F::magnitude(d);
        if constexpr (TERMS) {
          terms += F::term(get<N>(a.multipliers + t * a.multiplier_target + row * a.multiplier_row + k + i, n), d, shift);
        }
      }
      if constexpr (TERMS) sums.terms.template add<N>(i, terms);
      if constexpr (TOTALS) sums.totals.template add<N>(i, totals);
      if constexpr (TOTALS && MODE == Mode::kXGrad) sums.magnitudes.template add<N>(i, magnitudes);
    }
  }

  // Positions are taken kRows at a time from as many runs of neighbours: memory fetches several streams faster than one.
  template <int N, bool TERMS, bool TOTALS>
  static FASTCAM_INLINE void add_all(const ChannelArgs<S>& a, int64_t t, int64_t k, int64_t length, Sums& sums) {
    const int64_t run = a.positions / kRows;
    for (int64_t p = kRows * run; p < a.positions; ++p) add_rows<N, 1, TERMS, TOTALS>(a, t, p, 0, k, length, sums);
    for (int64_t start = 0; start < run; start += kChain) {
      for (int64_t p = start; p < smaller(run, start + kChain); ++p) {
        add_rows<N, kRows, TERMS, TOTALS>(a, t, p, run, k, length, sums);
      }
      end_chains<TERMS, TOTALS>(length, sums);
    }
    if (run == 0) end_chains<TERMS, TOTALS>(length, sums);
  }

  template <bool TERMS, bool TOTALS>
  static FASTCAM_INLINE void end_chains(int64_t length, Sums& sums) {
    if constexpr (TERMS) sums.terms.end_chain(length);
    if constexpr (TOTALS) sums.totals.end_chain(length);
    if constexpr (TOTALS && MODE == Mode::kXGrad) sums.magnitudes.end_chain(length);
  }

  // Channels [k, k + length) of all positions and targets.
  template <int N>
  static FASTCAM_INLINE void block(const ChannelArgs<S>& a, int64_t k, int64_t length) {
    using F = Formula<MODE, Vector<A, N>, A>;
    const int64_t whole = (length + N - 1) / N * N;
    Sums sums;
    if constexpr (F::kNeedsTotals) sums.totals.clear(whole), sums.magnitudes.clear(whole);
    if constexpr (F::kTotalsFirst) {
      add_all<N, false, true>(a, 0, k, length, sums);
      for (int64_t i = 0; i < whole; ++i) sums.shift[i] = static_cast<A>(sums.totals.all[i]);
    }
    for (int64_t t = 0; t < a.targets; ++t) {
      sums.terms.clear(whole);
      if (F::kNeedsTotals && !F::kTotalsFirst && t == 0) {
        add_all<N, true, true>(a, t, k, length, sums);
      } else {
        add_all<N, true, false>(a, t, k, length, sums);
      }
      A* out = a.out + t * a.channels + k;
      for (int64_t i = 0; i < length; ++i) {
        if constexpr (F::kNeedsTotals) {
          out[i] = static_cast<A>(finished<MODE>(sums.terms.all[i], sums.totals.all[i], sums.magnitudes.all[i], a.positions));
        } else {
          out[i] = static_cast<A>(finished<MODE>(sums.terms.all[i], 0.0, 0.0, a.positions));
        }
      }
    }
  }
};

}  // namespace fastcam::cpu
