// Leaves of cam_map's reduction M[t,p] = sum_k w[t,k(,p)] (f[k,p] - r[k,p]), one image at a time.
//
// Two loop nests, by memory order. NCHW: rows are channels, so whole rows are scaled and added up ("across"); few
// positions or several targets keep their sums in registers (ChannelTile, a register-blocked matrix product that reads
// features once per block of targets), one target over many positions keeps them in an L1 buffer and streams rows
// (ChannelStream, also for per-position multipliers). channels_last: rows are positions, so each sum is a dot product along
// a row (PositionDots). A leaf computes targets [t0,t1) at positions [p0,p1) from channels [k0,k1) and overwrites `out`.
//
// Chains of float additions are short and end in doubles, or in a tree over lanes and chains: min-max scaling divides what a
// sum is off by the map's range, which is a small part of the sums where channels are many. Where memory is read beyond the
// caches, several rows (runs of positions) are read in turn: one stream alone is fetched at half the speed.
#pragma once

#include "cpu/leaf.h"

namespace fastcam::cpu {

template <typename S>
struct ReduceArgs {
  const S* features;
  const S* reference;               // null without one
  const void* weights;              // Accumulate<S> coefficients (stride between targets), or S multipliers
  int64_t feature_row, reference_row, weight_row, weight_target;  // strides
  int64_t channels, positions;
  int64_t t0, t1, k0, k1, p0, p1;
  Accumulate<S>* out;               // of target 0, position 0
  int64_t out_target;
  bool beyond_caches = false;       // whether features come from memory
};

template <int N, bool REF, typename S>
FASTCAM_INLINE Vector<Accumulate<S>, N> difference(const S* features, const S* reference) {
  if constexpr (REF) return load<N>(features) - load<N>(reference);
  return load<N>(features);
}

template <typename S, bool REF>
struct ChannelTile {
  using A = Accumulate<S>;

  template <int N, int TB, int VB>
  static FASTCAM_INLINE void add_row(Vector<A, N> (&sums)[TB][VB], const S* f, const S* r, const A* w, int64_t target) {
    Vector<A, N> d[VB];
#pragma GCC unroll 8
    for (int v = 0; v < VB; ++v) d[v] = difference<N, REF>(f + v * N, r + v * N);
#pragma GCC unroll 8
    for (int t = 0; t < TB; ++t) {
      const A weight = w[t * target];
#pragma GCC unroll 8
      for (int v = 0; v < VB; ++v) sums[t][v] += weight * d[v];
    }
  }

  static constexpr int64_t kRows = 256;  // whose sums are floats

  template <int N, int TB, int VB>
  static FASTCAM_INLINE void tile(const ReduceArgs<S>& a, int64_t t, int64_t p) {
    const int64_t rows = std::is_same_v<A, double> ? a.k1 - a.k0 : kRows;
    const bool one_chain = a.k1 - a.k0 <= rows;
    alignas(64) A found[TB * VB * N];
    alignas(64) double totals[TB * VB * N];
    for (int i = 0; i < TB * VB * N && !one_chain; ++i) totals[i] = 0;
    for (int64_t k = a.k0; k < a.k1; k += rows) {
      add_rows<N, TB, VB>(found, a, t, p, k, smaller(k + rows, a.k1));
      for (int i = 0; i < TB * VB * N && !one_chain; ++i) totals[i] += found[i];
    }
    for (int i = 0; i < TB * VB * N && !one_chain; ++i) found[i] = static_cast<A>(totals[i]);
    const int64_t n = smaller(VB * N, a.p1 - p);
    for (int i = 0; i < TB; ++i) std::memcpy(a.out + (t + i) * a.out_target + p, found + i * VB * N, n * sizeof(A));
  }

  // Sums of rows [k, end).
  template <int N, int TB, int VB>
  static FASTCAM_INLINE void add_rows(A* found, const ReduceArgs<S>& a, int64_t t, int64_t p, int64_t k, int64_t end) {
    Vector<A, N> sums[TB][VB] = {};
    const int64_t overrun = p + VB * N - a.positions;
    int64_t safe = smaller(end, safe_rows(a.channels, a.feature_row, overrun));
    if constexpr (REF) safe = smaller(safe, safe_rows(a.channels, a.reference_row, overrun));
    const S* f = a.features + p;
    const S* r = REF ? a.reference + p : nullptr;
    const A* w = static_cast<const A*>(a.weights) + t * a.weight_target;
    // One target: two chains in turn, half as long each. Every tile adds rows in the same order, those it has to copy too:
    // positions with equal features have equal sums.
    Vector<A, N> odd[TB][VB] = {};
    bool even = true;
    if constexpr (TB == 1) {
      for (; k + 2 <= safe; k += 2) {
        const S *f0 = f + k * a.feature_row, *r0 = REF ? r + k * a.reference_row : nullptr;
        add_row<N, TB, VB>(sums, f0, r0, w + k, a.weight_target);
        add_row<N, TB, VB>(odd, f0 + a.feature_row, REF ? r0 + a.reference_row : nullptr, w + k + 1, a.weight_target);
      }
    }
    for (; k < safe; ++k, even = !even) {
      add_row<N, TB, VB>(sums, f + k * a.feature_row, REF ? r + k * a.reference_row : nullptr, w + k, a.weight_target);
    }
    const int64_t valid = smaller(VB * N, a.positions - p);
    for (; k < end; ++k, even = !even) {
      S f_row[VB * N] = {}, r_row[VB * N] = {};
      std::memcpy(f_row, f + k * a.feature_row, valid * sizeof(S));
      if constexpr (REF) std::memcpy(r_row, r + k * a.reference_row, valid * sizeof(S));
      add_row<N, TB, VB>(TB > 1 || even ? sums : odd, f_row, r_row, w + k, a.weight_target);
    }
    if constexpr (TB == 1) {
#pragma GCC unroll 8
      for (int v = 0; v < VB; ++v) sums[0][v] += odd[0][v];
    }
#pragma GCC unroll 8
    for (int i = 0; i < TB; ++i) {
#pragma GCC unroll 8
      for (int v = 0; v < VB; ++v) store<N>(found + (i * VB + v) * N, sums[i][v]);
    }
  }

  template <int N, int TB>
  static FASTCAM_INLINE void targets(const ReduceArgs<S>& a, int64_t t) {
    int64_t p = a.p0;
    for (; p + 3 * N < a.p1; p += 4 * N) tile<N, TB, 4>(a, t, p);
    const int64_t left = a.p1 - p;
    if (left > 2 * N) {
      tile<N, TB, 3>(a, t, p);
    } else if (left > N) {
      tile<N, TB, 2>(a, t, p);
    } else if (left > 0) {
      tile<N, TB, 1>(a, t, p);
    }
  }

  template <int BYTES>
  static FASTCAM_INLINE void body(const ReduceArgs<S>& a) {
    constexpr int N = kLanes<BYTES, S>;
    constexpr int TB = BYTES == 64 ? 6 : 2;  // 6 x 4 sums, 4 loads and a weight fill 32 registers; 2 x 4 of 16
    int64_t t = a.t0;
    for (; t + TB <= a.t1; t += TB) targets<N, TB>(a, t);
    for (; t < a.t1; ++t) targets<N, 1>(a, t);
  }
};

constexpr int64_t kShort = 512;         // positions of a row of which one page of memory holds several
constexpr int64_t kStreamBlock = 4096;  // positions whose sums stay in the nearest caches

template <typename S, bool REF, bool POSITIONAL>
struct ChannelStream {
  using A = Accumulate<S>;
  static constexpr int kRows = REF || POSITIONAL ? 4 : 8;  // added up in registers before memory sees the sum

  struct Row {
    const S* f;
    const S* r;
    const S* w;  // multipliers
    A weight;    // or coefficient
  };

  template <int N>
  static FASTCAM_INLINE Vector<A, N> term(const Row& row, int64_t p) {
    const auto d = difference<N, REF>(row.f + p, row.r + p);
    if constexpr (POSITIONAL) return load<N>(row.w + p) * d;
    return row.weight * d;
  }

  template <int N, int ROWS>
  static FASTCAM_INLINE void add_rows(double* sums, const Row (&rows)[ROWS], int64_t length) {
    for (int64_t p = 0; p < length; p += N) {
      Vector<A, N> chain = {};
#pragma GCC unroll 8
      for (int i = 0; i < ROWS; ++i) chain += term<N>(rows[i], p);
      add_wide<N>(sums + p, chain);
    }
  }

  // The same, row after row. Short rows lie side by side, and in their order memory sends them twice as fast.
  template <int N, int ROWS>
  static FASTCAM_INLINE void add_in_order(double* sums, A* chains, const Row (&rows)[ROWS], int64_t length) {
    for (int64_t p = 0; p < length; p += N) store<N>(chains + p, term<N>(rows[0], p));
    for (int i = 1; i < ROWS - 1; ++i) {
      for (int64_t p = 0; p < length; p += N) store<N>(chains + p, load<N>(chains + p) + term<N>(rows[i], p));
    }
    for (int64_t p = 0; p < length; p += N) add_wide<N>(sums + p, load<N>(chains + p) + term<N>(rows[ROWS - 1], p));
  }

  static FASTCAM_INLINE Row row(const ReduceArgs<S>& a, int64_t t, int64_t k, int64_t p) {
    Row row = {a.features + k * a.feature_row + p, REF ? a.reference + k * a.reference_row + p : nullptr, nullptr, 0};
    if constexpr (POSITIONAL) {
      row.w = static_cast<const S*>(a.weights) + t * a.weight_target + k * a.weight_row + p;
    } else {
      row.weight = static_cast<const A*>(a.weights)[t * a.weight_target + k];
    }
    return row;
  }

  template <int BYTES>
  static FASTCAM_INLINE void body(const ReduceArgs<S>& a) {
    constexpr int N = kLanes<BYTES, S>;
    for (int64_t t = a.t0; t < a.t1; ++t) {
      for (int64_t p = a.p0; p < a.p1; p += kStreamBlock) block<N>(a, t, p, smaller(kStreamBlock, a.p1 - p));
    }
  }

  template <int N>
  static FASTCAM_INLINE void block(const ReduceArgs<S>& a, int64_t t, int64_t p, int64_t length) {
    alignas(64) double sums[kStreamBlock];
    alignas(64) A chains[kShort + N];
    const int64_t whole = (length + N - 1) / N * N, overrun = p + whole - a.positions;
    for (int64_t i = 0; i < whole; ++i) sums[i] = 0;
    int64_t safe = smaller(a.k1, safe_rows(a.channels, a.feature_row, overrun));
    if constexpr (REF) safe = smaller(safe, safe_rows(a.channels, a.reference_row, overrun));
    if constexpr (POSITIONAL) safe = smaller(safe, safe_rows(a.channels, a.weight_row, overrun));
    int64_t k = a.k0;
    for (; k + kRows <= safe; k += kRows) {
      Row rows[kRows];
      for (int i = 0; i < kRows; ++i) rows[i] = row(a, t, k + i, p);
      a.beyond_caches && length <= kShort ? add_in_order<N>(sums, chains, rows, length) : add_rows<N>(sums, rows, length);
    }
    // In the same chains as in blocks whose last vectors may be read: positions with equal features have equal sums.
    for (; k + kRows <= a.k1; k += kRows) add_copied<N, kRows>(sums, a, t, k, p, length);
    for (; k < a.k1; ++k) add_copied<N, 1>(sums, a, t, k, p, length);
    A* out = a.out + t * a.out_target + p;
    for (int64_t i = 0; i < length; ++i) out[i] = static_cast<A>(sums[i]);
  }

  // Rows k, ..., k + ROWS - 1, of whose ends no vector may be read.
  template <int N, int ROWS>
  static FASTCAM_INLINE void add_copied(double* sums, const ReduceArgs<S>& a, int64_t t, int64_t k, int64_t p,
                                        int64_t length) {
    alignas(64) S f_end[ROWS * N], r_end[ROWS * N], w_end[ROWS * N];
    const int64_t whole = length / N * N;
    Row rows[ROWS], ends[ROWS];
    for (int i = 0; i < ROWS; ++i) {
      rows[i] = ends[i] = row(a, t, k + i, p);
      ends[i].f = padded(f_end + i * N, rows[i].f + whole, length - whole, N);
      if constexpr (REF) ends[i].r = padded(r_end + i * N, rows[i].r + whole, length - whole, N);
      if constexpr (POSITIONAL) ends[i].w = padded(w_end + i * N, rows[i].w + whole, length - whole, N);
    }
    add_rows<N>(sums, rows, whole);
    if (whole < length) add_rows<N>(sums + whole, ends, N);
  }

  static FASTCAM_INLINE const S* padded(S* buffer, const S* row, int64_t length, int64_t lanes) {
    std::memcpy(buffer, row, length * sizeof(S));
    for (int64_t p = length; p % lanes != 0; ++p) buffer[p] = S{};
    return buffer;
  }
};

template <typename S, bool REF, bool POSITIONAL>
struct PositionDots {
  using A = Accumulate<S>;

  template <int N>
  static FASTCAM_INLINE Vector<A, N> load_weight(const ReduceArgs<S>& a, int64_t t, int64_t p, int64_t k, int64_t n) {
    if constexpr (POSITIONAL) {
      const S* w = static_cast<const S*>(a.weights) + t * a.weight_target + p * a.weight_row + k;
      return n == N ? load<N>(w) : load_first<N>(w, n);
    } else {
      const A* w = static_cast<const A*>(a.weights) + t * a.weight_target + k;
      return n == N ? load<N>(w) : load_first<N>(w, n);
    }
  }

  // One step of n <= N channels for PB positions, `apart` from each other, and TB targets.
  template <int N, int TB, int PB>
  static FASTCAM_INLINE void step(Vector<A, N> (&sums)[TB][PB], const ReduceArgs<S>& a, int64_t t, int64_t p, int64_t apart,
                                  int64_t k, int64_t n) {
    Vector<A, N> w[TB];
    if constexpr (!POSITIONAL) {
#pragma GCC unroll 8
      for (int j = 0; j < TB; ++j) w[j] = load_weight<N>(a, t + j, p, k, n);
    }
#pragma GCC unroll 8
    for (int i = 0; i < PB; ++i) {
      const S* f = a.features + (p + i * apart) * a.feature_row + k;
      Vector<A, N> d = n == N ? load<N>(f) : load_first<N>(f, n);
      if constexpr (REF) {
        const S* r = a.reference + (p + i * apart) * a.reference_row + k;
        d -= n == N ? load<N>(r) : load_first<N>(r, n);
      }
#pragma GCC unroll 8
      for (int j = 0; j < TB; ++j) sums[j][i] += (POSITIONAL ? load_weight<N>(a, t + j, p + i * apart, k, n) : w[j]) * d;
    }
  }

  template <int N, int TB, int PB>
  static FASTCAM_INLINE void tile(const ReduceArgs<S>& a, int64_t t, int64_t p, int64_t apart) {
    constexpr int64_t kBlock = 4 * kChain * N;  // channels of a chain in each lane; lanes and chains make a tree
    Vector<A, N> totals[TB][PB] = {};
    for (int64_t start = a.k0; start < a.k1; start += kBlock) {
      const int64_t end = smaller(a.k1, start + kBlock);
      Vector<A, N> sums[TB][PB] = {};
      int64_t k = start;
      for (; k + N <= end; k += N) step<N, TB, PB>(sums, a, t, p, apart, k, N);
      if (k < end) step<N, TB, PB>(sums, a, t, p, apart, k, end - k);
#pragma GCC unroll 8
      for (int j = 0; j < TB; ++j) {
#pragma GCC unroll 8
        for (int i = 0; i < PB; ++i) totals[j][i] += sums[j][i];
      }
    }
    for (int j = 0; j < TB; ++j) {
      for (int i = 0; i < PB; ++i) a.out[(t + j) * a.out_target + p + i * apart] = horizontal_sum<N>(totals[j][i]);
    }
  }

  // Positions are taken PB at a time from PB runs of neighbours: as many streams from memory, which fetch faster than one.
  template <int BYTES>
  static FASTCAM_INLINE void body(const ReduceArgs<S>& a) {
    constexpr int N = kLanes<BYTES, S>;
    if constexpr (!POSITIONAL) {
      if (a.t1 - a.t0 > 1) return runs<N, BYTES == 64 ? 4 : 2, 4>(a);
    }
    runs<N, 1, REF || POSITIONAL ? 4 : 8>(a);
  }

  template <int N, int TB, int PB>
  static FASTCAM_INLINE void runs(const ReduceArgs<S>& a) {
    const int64_t run = (a.p1 - a.p0) / PB;
    for (int64_t p = a.p0; p < a.p0 + run; ++p) targets<N, TB, PB>(a, p, run);
    for (int64_t p = a.p0 + run * PB; p < a.p1; ++p) targets<N, TB, 1>(a, p, 0);
  }

  template <int N, int TB, int PB>
  static FASTCAM_INLINE void targets(const ReduceArgs<S>& a, int64_t p, int64_t apart) {
    int64_t t = a.t0;
    for (; t + TB <= a.t1; t += TB) tile<N, TB, PB>(a, t, p, apart);
    for (; t < a.t1; ++t) tile<N, 1, PB>(a, t, p, apart);
  }
};

}  // namespace fastcam::cpu
