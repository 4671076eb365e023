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
  static constexpr bool kTotalsBeside = MODE == Mode::kXGrad;

  static FASTCAM_INLINE V term(V g, V a, V total) {
    if constexpr (MODE == Mode::kMean) return g;
    if constexpr (MODE == Mode::kSum || MODE == Mode::kXGrad) return g * a;
    const V denominator = A(2) + total * g;
    const V share = magnitude(denominator) < A(1e-6) ? V{} : A(1) / denominator;
    return share * (g < 0 ? V{} : g);  // NaN compares false and stays
  }

  static FASTCAM_INLINE V magnitude(V v) { return v < 0 ? -v : v; }
};

// V is T or a vector of it.
template <Mode MODE, typename T, typename V>
FASTCAM_INLINE V finished(V sum, V total, V magnitude, int64_t positions) {
  if constexpr (MODE == Mode::kMean) return sum / static_cast<T>(positions);
  if constexpr (MODE == Mode::kXGrad) {
    const V absolute = total < 0 ? -total : total, quotient = sum / total;
    return absolute <= T(1e-6) * magnitude ? V{} : quotient;
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

  // A channel's rows.
  template <int N>
  struct Rows {
    Row<N> features, reference, multipliers;
  };

  // Of some positions, lane by lane. A constructor, so that it lives in registers: GCC 12 zeroes an aggregate in memory.
  template <int N>
  struct Chain {
    Vector<A, N> terms, totals, magnitudes;
    FASTCAM_INLINE Chain() : terms{}, totals{}, magnitudes{} {}
  };

  // Below these channels, rows may be read to the ends of their last vectors.
  struct Safe {
    int64_t features, reference, multipliers;
  };

  template <int BYTES>
  static FASTCAM_INLINE void body(const ChannelArgs<S>& a) {
    constexpr int N = kLanes<BYTES, S>;
    a.positions <= kChain * N ? short_rows<N>(a) : long_rows<N>(a);
  }

  // Rows of one chain: nothing is added in doubles, and N rows' lanes are added up together. Memory fetches two streams faster
  // than one: two such groups are taken in turn from both halves of the channels, or the multipliers of one beside the features
  // of the next.
  template <int N>
  static FASTCAM_INLINE void short_rows(const ChannelArgs<S>& a) {
    const Safe safe = safe_channels<N>(a);
    if constexpr (Formula<MODE, A, A>::kTotalsFirst) {
      A shifts[N];
      totals_of<N>(a, safe, a.k0, shifts);
      for (int64_t k = a.k0; k < a.k1; k += N) groups<N, 1>(a, safe, k, 0, smaller(N, a.k1 - k), shifts);
    } else {
      const int64_t half = (a.k1 - a.k0) / (2 * N) * N;
      for (int64_t k = a.k0; k < a.k0 + half; k += N) groups<N, 2>(a, safe, k, half, N, nullptr);
      for (int64_t k = a.k0 + 2 * half; k < a.k1; k += N) groups<N, 1>(a, safe, k, 0, smaller(N, a.k1 - k), nullptr);
    }
  }

  // Of the N channels from k on, or as many as there are.
  template <int N>
  static FASTCAM_INLINE void totals_of(const ChannelArgs<S>& a, const Safe& safe, int64_t k, A* found) {
    Vector<A, N> totals[N];
    for (int64_t j = 0; j < N; ++j) totals[j] = total_of<N>(a, safe, k + j);
    store<N>(found, horizontal_sums<N>(totals));
  }

  // Of a channel's features, lane by lane; 0 beyond the channels.
  template <int N>
  static FASTCAM_INLINE Vector<A, N> total_of(const ChannelArgs<S>& a, const Safe& safe, int64_t k) {
    if (k >= a.k1) return Vector<A, N>{};
    return chain<N, false, true>(rows_at<N>(a, safe, 0, k), 0, a.positions, Vector<A, N>{}).totals;
  }

  // GROUPS of `rows` rows, the first from channel k on, the next `apart` channels on. Where terms depend on the totals, `shifts`
  // has those of the group, and then those of the one after it.
  template <int N, int GROUPS>
  static FASTCAM_INLINE void groups(const ChannelArgs<S>& a, const Safe& safe, int64_t k, int64_t apart, int64_t rows,
                                    A* shifts) {
    using V = Vector<A, N>;
    using F = Formula<MODE, V, A>;
    const int64_t positions = a.positions;
    V terms[GROUPS][N], totals[GROUPS][N], magnitudes[GROUPS][N], total[GROUPS] = {}, magnitude[GROUPS] = {};
    for (int64_t j = rows; j < N; ++j) terms[0][j] = totals[0][j] = magnitudes[0][j] = V{};
    for (int64_t t = 0; t < a.targets; ++t) {
      for (int64_t j = 0; j < rows; ++j) {
        for (int g = 0; g < GROUPS; ++g) {
          const V shift = F::kTotalsFirst ? splat<N>(shifts[j]) : V{};
          const auto x = rows_at<N>(a, safe, t, k + g * apart + j);
          const auto found = chain<N, true, F::kTotalsBeside>(x, 0, positions, shift);
          terms[g][j] = found.terms;
          if constexpr (F::kTotalsBeside) totals[g][j] = found.totals, magnitudes[g][j] = found.magnitudes;
        }
        if (F::kTotalsFirst && t == 0) totals[0][j] = total_of<N>(a, safe, k + N + j);
      }
      for (int g = 0; g < GROUPS; ++g) {
        if (F::kTotalsBeside && t == 0) {
          total[g] = horizontal_sums<N>(totals[g]), magnitude[g] = horizontal_sums<N>(magnitudes[g]);
        }
        const V found = finished<MODE, A>(horizontal_sums<N>(terms[g]), total[g], magnitude[g], positions);
        store_first<N>(a.out + t * a.channels + k + g * apart, found, rows);
      }
    }
    if constexpr (F::kTotalsFirst) store<N>(shifts, horizontal_sums<N>(totals[0]));
  }

  // Chains end in doubles.
  template <int N>
  static FASTCAM_INLINE void long_rows(const ChannelArgs<S>& a) {
    using V = Vector<A, N>;
    using F = Formula<MODE, V, A>;
    const Safe safe = safe_channels<N>(a);
    const int64_t positions = a.positions, length = kChain * N;
    for (int64_t k = a.k0; k < a.k1; ++k) {
      double total = 0, magnitude = 0;
      if constexpr (F::kTotalsFirst) {
        const Rows<N> x = rows_at<N>(a, safe, 0, k);
        for (int64_t p = 0; p < positions; p += length) {
          total += horizontal_sum<N>(chain<N, false, true>(x, p, smaller(positions, p + length), V{}).totals);
        }
      }
      const V shift = splat<N>(static_cast<A>(total));
      for (int64_t t = 0; t < a.targets; ++t) {
        const Rows<N> x = rows_at<N>(a, safe, t, k);
        double sum = 0;
        for (int64_t p = 0; p < positions; p += length) {
          const auto found = chain<N, true, F::kTotalsBeside>(x, p, smaller(positions, p + length), shift);
          sum += horizontal_sum<N>(found.terms);
          if (!F::kTotalsBeside || t > 0) continue;
          total += horizontal_sum<N>(found.totals), magnitude += horizontal_sum<N>(found.magnitudes);
        }
        a.out[t * a.channels + k] = static_cast<A>(finished<MODE, double>(sum, total, magnitude, positions));
      }
    }
  }

  template <int N>
  static FASTCAM_INLINE Safe safe_channels(const ChannelArgs<S>& a) {
    const int64_t overrun = (N - a.positions % N) % N;
    return {safe_rows(a.channels, a.feature_row, overrun), REF ? safe_rows(a.channels, a.reference_row, overrun) : 0,
            safe_rows(a.channels, a.multiplier_row, overrun)};
  }

  template <int N>
  static FASTCAM_INLINE Rows<N> rows_at(const ChannelArgs<S>& a, const Safe& safe, int64_t t, int64_t k) {
    return {{a.features + k * a.feature_row, k < safe.features},
            {REF ? a.reference + k * a.reference_row : nullptr, k < safe.reference},
            {a.multipliers + t * a.multiplier_target + k * a.multiplier_row, k < safe.multipliers}};
  }

  // Positions [start, end).
  template <int N, bool TERMS, bool TOTALS>
  static FASTCAM_INLINE Chain<N> chain(const Rows<N>& x, int64_t start, int64_t end, Vector<A, N> shift) {
    Chain<N> found;
    int64_t p = start;
    for (; p + N <= end; p += N) add<N, TERMS, TOTALS>(x, p, N, shift, found);
    if (p < end) add<N, TERMS, TOTALS>(x, p, end - p, shift, found);
    return found;
  }

  // n positions from p on.
  template <int N, bool TERMS, bool TOTALS>
  static FASTCAM_INLINE void add(const Rows<N>& x, int64_t p, int64_t n, Vector<A, N> shift, Chain<N>& to) {
    using F = Formula<MODE, Vector<A, N>, A>;
    Vector<A, N> d = {};
    if constexpr (TOTALS || F::kReadsProduct) d = x.features.get(p, n);
    if constexpr (REF && (TOTALS || F::kReadsProduct)) d -= x.reference.get(p, n);
    if constexpr (TOTALS) to.totals += d, to.magnitudes += F::magnitude(d);
    if constexpr (TERMS) {
      const auto term = F::term(x.multipliers.get(p, n), d, shift);
      // An infinite total would make NaN of positions that do not exist.
      to.terms += F::kTotalsFirst && n < N ? first_lanes<N>(term, n) : term;
    }
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
      if (F::kTotalsBeside && t == 0) {
        add_all<N, true, true>(a, t, k, length, sums);
      } else {
        add_all<N, true, false>(a, t, k, length, sums);
      }
      A* out = a.out + t * a.channels + k;
      for (int64_t i = 0; i < length; ++i) {
        if constexpr (F::kNeedsTotals) {
          out[i] = static_cast<A>(finished<MODE, double>(sums.terms.all[i], sums.totals.all[i], sums.magnitudes.all[i], a.positions));
        } else {
          out[i] = static_cast<A>(finished<MODE, double>(sums.terms.all[i], 0.0, 0.0, a.positions));
        }
      }
    }
  }
};

}  // namespace fastcam::cpu
