// What the leaves of the lfi_* ops share: rows read and written by whole vectors, extremes of rows.
#pragma once

#include "cpu/leaf.h"
#include "formulas.h"

namespace fastcam::cpu {

// N lanes of ones, of zeros and of ones: from inside, any number of first or last lanes.
template <typename I, int N>
struct LanesKept {
  I masks[3 * N] = {};
  constexpr LanesKept() {
    for (int i = 0; i < N; ++i) masks[i] = masks[2 * N + i] = -1;
  }
};
template <typename I, int N>
inline constexpr LanesKept<I, N> kLanesKept;

// A row whose last vector begins earlier where it would end beyond: elements may be read, computed and written twice,
// always alike, and nothing outside is touched.
template <typename T, int N>
struct LfiRow {
  using V = Vector<Accumulate<T>, N>;
  const T* from;
  int64_t count;

  FASTCAM_INLINE V at(int64_t i) const {
    if (count >= N) return load<N>(from + smaller(i, count - N));
    T filled[N];  // shorter than a vector: the first element again
    for (int64_t j = 0; j < N; ++j) filled[j] = from[j < count ? j : 0];
    return load<N>(filled);
  }

  FASTCAM_INLINE void put(T* to, int64_t i, V v) const {
    count >= N ? store<N>(to + smaller(i, count - N), v) : store_first<N>(to, v, count);
  }

  // v with zeros in the lanes that an earlier vector has had or that do not exist: for sums.
  FASTCAM_INLINE V once(int64_t i, V v) const {
    if (i + N <= count) return v;
    using I = std::conditional_t<sizeof(Accumulate<T>) == 8, int64_t, int32_t>;
    const I* lanes = kLanesKept<I, N>.masks + (count >= N ? 2 * N - (i - (count - N)) : N - count);
    return reinterpret_cast<V>(reinterpret_cast<Vector<I, N>>(v) & load_raw<I, N>(lanes));
  }
};

// The lowest (or highest) lane; NaN does not matter.
template <int N, bool HIGH, typename V>
FASTCAM_INLINE auto horizontal_extreme(V v) {
  if constexpr (N == 2) {
    return (HIGH ? v[0] > v[1] : v[0] < v[1]) ? v[0] : v[1];
  } else {
    const auto a = half_of<N, false>(v), b = half_of<N, true>(v);
    return horizontal_extreme<N / 2, HIGH>(HIGH ? (a > b ? a : b) : (a < b ? a : b));
  }
}

// Of a row; `low` is NaN if an element is.
template <int N, typename T>
FASTCAM_INLINE Extremes<Accumulate<T>> extremes_of(const LfiRow<T, N>& row) {
  using V = Vector<Accumulate<T>, N>;
  V low = row.at(0), high = low;
  for (int64_t i = N; i < row.count; i += N) {
    const V x = row.at(i);
    low = lfi_lower(x, low), high = x > high ? x : high;
  }
  const V nan = low == low ? V{} : low;
  return {horizontal_extreme<N, false>(low) + horizontal_sum<N>(nan), horizontal_extreme<N, true>(high)};
}

constexpr int64_t kLfiBlock = 256;  // channels_last: channels whose extremes and sums stay in L1 while rows stream past

// The first n of N values, or all.
template <int N, typename S>
FASTCAM_INLINE Vector<Accumulate<S>, N> load_most(const S* p, int64_t n) {
  return n >= N ? load<N>(p) : load_first<N>(p, n);
}

// Extremes of `length` neighbouring channels over rows of positions.
template <int N, typename S>
FASTCAM_INLINE void extremes_of_channels(const S* features, int64_t row, int64_t positions, int64_t length,
                                         Accumulate<S>* low, Accumulate<S>* high) {
  for (int64_t i = 0; i < length; i += N) {
    const auto x = load_most<N>(features + i, length - i);
    store<N>(low + i, x), store<N>(high + i, x);
  }
  for (int64_t p = 1; p < positions; ++p) {
    for (int64_t i = 0; i < length; i += N) {
      const auto x = load_most<N>(features + p * row + i, length - i), highest = load<N>(high + i);
      store<N>(low + i, lfi_lower(x, load<N>(low + i)));
      store<N>(high + i, x > highest ? x : highest);
    }
  }
}

}  // namespace fastcam::cpu
