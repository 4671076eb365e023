// Leaves of perturb_by_rank: which pixels a count has reached, as masks of the elements' width, and the choice between two
// images by such masks. Elements are words of 16, 32 or 64 bits: nothing is computed with them.
#pragma once

#include "cpu/stream.h"

namespace fastcam::cpu {

template <typename E, typename R>
struct ReachedArgs {
  const R* ranks;
  int64_t count, pixels;
  E* mask;  // (pixels, repeats): all ones where rank < count, else zeros
  int64_t repeats;
};

template <typename E, typename R>
struct Reached {
  template <int BYTES>
  static FASTCAM_INLINE void body(const ReachedArgs<E, R>& a) {
    constexpr int N = BYTES / sizeof(R);
    constexpr int64_t kLeast = sizeof(R) == 8 ? INT64_MIN : INT32_MIN, kMost = sizeof(R) == 8 ? INT64_MAX : INT32_MAX;
    const int64_t inside = a.count < kLeast ? kLeast : a.count > kMost ? kMost : a.count;
    const auto limit = splat<N>(static_cast<R>(inside));
    const auto beyond = splat<N>(static_cast<R>(a.count > kMost ? -1 : 0));  // even the greatest rank is reached
    int64_t p = 0;
    for (; p + N <= a.pixels; p += N) {
      const auto reached = (load_raw<R, N>(a.ranks + p) < limit) | beyond;
      store_raw<E, N>(a.mask + p, __builtin_convertvector(reached, Vector<E, N>));
    }
    for (; p < a.pixels; ++p) a.mask[p] = a.ranks[p] < a.count ? E(-1) : E(0);
    // From the last pixel on, in place.
    if (a.repeats == 3) {
      repeat_thrice<BYTES / int(sizeof(E))>(a.mask, a.pixels);
    } else if (a.repeats > 1) {
      repeat(a.mask, 0, a.pixels, a.repeats);
    }
  }

  static FASTCAM_INLINE void repeat(E* mask, int64_t first, int64_t last, int64_t repeats) {
    for (int64_t p = last - 1; p >= first; --p) {
      const E value = mask[p];
      for (int64_t c = 0; c < repeats; ++c) mask[p * repeats + c] = value;
    }
  }

  // The colours of nearly all images are worth vectors.
  template <int N>
  static FASTCAM_INLINE void repeat_thrice(E* mask, int64_t pixels) {
    const int64_t whole = pixels / N * N;
    repeat(mask, whole, pixels, 3);
    Vector<E, N> lanes[3];
    for (int i = 0; i < 3 * N; ++i) lanes[i / N][i % N] = E(i / 3);
    for (int64_t p = whole - N; p >= 0; p -= N) {
      const auto value = load_raw<E, N>(mask + p);
      for (int k = 0; k < 3; ++k) store_raw<E, N>(mask + 3 * p + k * N, __builtin_shuffle(value, lanes[k]));
    }
  }
};

template <typename E>
struct ChoiceArgs {
  const E* reached;    // rows of elements taken where the mask is set
  const E* elsewhere;  // and where not
  const E* mask;       // one row
  E* out;
  int64_t rows, length, reached_row, elsewhere_row, out_row;
};

// STREAM: for results larger than the caches.
template <typename E, bool STREAM>
struct Choice {
  template <int BYTES>
  static FASTCAM_INLINE void body(const ChoiceArgs<E>& a) {
    constexpr int N = BYTES / sizeof(E);
    for (int64_t row = 0; row < a.rows; ++row) {
      const E* reached = a.reached + row * a.reached_row;
      const E* elsewhere = a.elsewhere + row * a.elsewhere_row;
      E* out = a.out + row * a.out_row;
      int64_t i = 0;
      if constexpr (STREAM) {
        const int64_t ahead = elements_ahead(out, sizeof(E));
        for (; i < smaller(ahead, a.length); ++i) out[i] = a.mask[i] ? reached[i] : elsewhere[i];
        for (; i + N <= a.length; i += N) stream(out + i, choose<N>(reached, elsewhere, a.mask, i));
      } else {
        for (; i + N <= a.length; i += N) store_raw<E, N>(out + i, choose<N>(reached, elsewhere, a.mask, i));
      }
      if (i == a.length) continue;
      if (a.length < N) {
        for (; i < a.length; ++i) out[i] = a.mask[i] ? reached[i] : elsewhere[i];
      } else {  // some elements once more
        store_raw<E, N>(out + a.length - N, choose<N>(reached, elsewhere, a.mask, a.length - N));
      }
    }
    if constexpr (STREAM) end_streaming();
  }

  template <int N>
  static FASTCAM_INLINE Vector<E, N> choose(const E* reached, const E* elsewhere, const E* mask, int64_t i) {
    const auto m = load_raw<E, N>(mask + i);
    return (load_raw<E, N>(reached + i) & m) | (load_raw<E, N>(elsewhere + i) & ~m);
  }
};

}  // namespace fastcam::cpu
