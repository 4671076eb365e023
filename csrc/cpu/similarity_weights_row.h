// Leaf of similarity_weights: one row, whose elements are read twice, the second time from L1.
#pragma once

#include "cpu/leaf.h"
#include "formulas.h"

namespace fastcam::cpu {

template <typename S>
struct SimilarityArgs {
  const S* first;
  const S* second;
  int64_t channels;
  SimilarityTerm term;
  SimilarityWeighting weighting;
  bool dissimilarity;
  Accumulate<S>* contributions;
  Accumulate<S>* weights;
  Accumulate<S>* total;
};

template <typename S, SimilarityPart PART>
struct SimilarityRow {
  using A = Accumulate<S>;

  template <int BYTES>
  static FASTCAM_INLINE void body(const SimilarityArgs<S>& a) {
    constexpr int N = BYTES / static_cast<int>(sizeof(double)), CHAINS = 2;  // sums in turn
    using V = Vector<double, N>;
    const S *first = a.first, *second = a.second;
    A *contributions = a.contributions, *weights = a.weights;
    const int64_t count = a.channels;
    SimilaritySums<V> sums[CHAINS] = {no_similarity_sums<V>(), no_similarity_sums<V>()};
    SimilaritySums<double> row = no_similarity_sums<double>();
    int64_t i = 0;
    for (; i + CHAINS * N <= count; i += CHAINS * N) {
      for (int c = 0; c < CHAINS; ++c) add_to<PART>(sums[c], wide<N>(first + i + c * N), wide<N>(second + i + c * N));
    }
    for (; i + N <= count; i += N) add_to<PART>(sums[0], wide<N>(first + i), wide<N>(second + i));
    for (; i < count; ++i) add_to<PART>(row, one(first + i), one(second + i));
    merge(sums[0], sums[1]);
    for (int j = 0; j < N; ++j) {
      const auto& s = sums[0];
      merge(row, {s.total[j], s.first[j], s.second[j], s.low[j], s.high[j]});
    }

    const SimilarityScale x = similarity_scale<A>(row, a.term, a.weighting, a.dissimilarity);
    const V factor = splat<N>(x.factor), base = splat<N>(x.base), gain = splat<N>(x.gain);
    const V divisor = splat<N>(x.divisor), shift = splat<N>(x.shift);
    *a.total = static_cast<A>(x.total);
    for (i = 0; i + N <= count; i += N) {
      const V part = similarity_part<PART>(wide<N>(first + i), wide<N>(second + i));
      store_raw<A, N>(contributions + i, narrowed<N>(factor * part));
      store_raw<A, N>(weights + i, narrowed<N>(similarity_weight<A>(part, base, gain, divisor, shift)));
    }
    for (; i < count; ++i) {
      const double part = similarity_part<PART>(one(first + i), one(second + i));
      contributions[i] = static_cast<A>(x.factor * part);
      weights[i] = static_cast<A>(similarity_weight<A>(part, x.base, x.gain, x.divisor, x.shift));
    }
  }

  template <int N>
  static FASTCAM_INLINE Vector<double, N> wide(const S* p) {
    const Vector<A, N> x = load<N>(p);
    Vector<double, N> found;
    for (int j = 0; j < N; ++j) found[j] = x[j];  // one instruction; GCC 12 makes four of __builtin_convertvector
    return found;
  }

  static FASTCAM_INLINE double one(const S* p) { return load_first<2>(p, 1)[0]; }

  template <int N>
  static FASTCAM_INLINE Vector<A, N> narrowed(Vector<double, N> v) {
    return __builtin_convertvector(v, Vector<A, N>);
  }
};

}  // namespace fastcam::cpu
