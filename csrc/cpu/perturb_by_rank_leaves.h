// Leaf of perturb_by_rank: the choice between two images, pixel by pixel, for one count. Elements are words of 16, 32 or 64
// bits: nothing is computed with them.
#pragma once

#include "cpu/stream.h"

namespace fastcam::cpu {

template <typename E>
constexpr int kPlainPixels = 64 / sizeof(E);  // of a plain source: as many as fit the widest vector

// An image: row r of pixels is at p + r * row. A plain one has kPlainPixels pixels, which serve all.
template <typename E>
struct Source {
  const E* p;
  int64_t row;
  bool plain;
};

template <typename E, typename R>
struct PerturbArgs {
  const R* ranks;
  int64_t count, pixels;
  Source<E> reached, elsewhere;  // taken where rank < count, and where not
  E* out;
  int64_t rows, out_row;  // channels, each a row of pixels; or one row
  int64_t width;          // elements of a pixel in a row: channels if they lie together
};

// STREAM: for results larger than the caches.
template <typename E, typename R, bool STREAM>
struct Perturb {
  static constexpr int64_t kChunk = 2048;  // pixels whose masks stay in L1

  template <int BYTES>
  static FASTCAM_INLINE void body(const PerturbArgs<E, R>& a) {
    constexpr int N = BYTES / sizeof(E);
    alignas(64) E mask[kChunk];  // all ones where rank < count, else zeros
    for (int64_t first = 0; first < a.pixels; first += kChunk) {
      const int64_t n = smaller(kChunk, a.pixels - first);
      find<BYTES / sizeof(R)>(a.ranks + first, n, a.count, mask);
      for (int64_t row = 0; row < a.rows; ++row) {
        const E* reached = at(a.reached, row, first * a.width);
        const E* elsewhere = at(a.elsewhere, row, first * a.width);
        E* out = a.out + row * a.out_row + first * a.width;
        if (a.width == 1) {
          choose_row<N>(a, reached, elsewhere, mask, n, out);
        } else if (a.width == 3) {
          choose_colours<N>(a, reached, elsewhere, mask, n, out);
        } else {
          choose_pixels(a, reached, elsewhere, mask, 0, n, a.width, out);
        }
      }
    }
    if constexpr (STREAM) end_streaming();
  }

  static FASTCAM_INLINE const E* at(const Source<E>& x, int64_t row, int64_t element) {
    return x.p + row * x.row + (x.plain ? 0 : element);
  }

  template <int N>
  static FASTCAM_INLINE void find(const R* ranks, int64_t pixels, int64_t count, E* mask) {
    constexpr int64_t kLeast = sizeof(R) == 8 ? INT64_MIN : INT32_MIN, kMost = sizeof(R) == 8 ? INT64_MAX : INT32_MAX;
    const int64_t inside = count < kLeast ? kLeast : count > kMost ? kMost : count;
    const auto limit = splat<N>(static_cast<R>(inside));
    const auto beyond = splat<N>(static_cast<R>(count > kMost ? -1 : 0));  // even the greatest rank is reached
    int64_t p = 0;
    for (; p + N <= pixels; p += N) {
      const auto reached = (load_raw<R, N>(ranks + p) < limit) | beyond;
      store_raw<E, N>(mask + p, __builtin_convertvector(reached, Vector<E, N>));
    }
    for (; p < pixels; ++p) mask[p] = ranks[p] < count ? E(-1) : E(0);
  }

  template <int N>
  static FASTCAM_INLINE void choose_row(const PerturbArgs<E, R>& a, const E* reached, const E* elsewhere, const E* mask,
                                        int64_t pixels, E* out) {
    const int64_t reached_step = !a.reached.plain, elsewhere_step = !a.elsewhere.plain;
    int64_t i = STREAM ? smaller(elements_ahead(out, sizeof(E)), pixels) : 0;
    choose_pixels(a, reached, elsewhere, mask, 0, i, 1, out);
    for (; i + N <= pixels; i += N) {
      put<N>(out + i, chosen<N>(reached + i * reached_step, elsewhere + i * elsewhere_step, load_raw<E, N>(mask + i)), STREAM);
    }
    choose_pixels(a, reached, elsewhere, mask, i, pixels, 1, out);
  }

  // Pixels of three elements: the colours of nearly all images are worth vectors.
  template <int N>
  static FASTCAM_INLINE void choose_colours(const PerturbArgs<E, R>& a, const E* reached, const E* elsewhere, const E* mask,
                                            int64_t pixels, E* out) {
    Vector<E, N> lanes[3];
    for (int i = 0; i < 3 * N; ++i) lanes[i / N][i % N] = E(i / 3);
    const int64_t reached_step = a.reached.plain ? 0 : 3, elsewhere_step = a.elsewhere.plain ? 0 : 3;
    const bool streamed = STREAM && reinterpret_cast<uintptr_t>(out) % 64 == 0;
    int64_t i = 0;
    for (; i + N <= pixels; i += N) {
      const auto m = load_raw<E, N>(mask + i);
      const E *from = reached + i * reached_step, *other = elsewhere + i * elsewhere_step;
#pragma GCC unroll 3
      for (int k = 0; k < 3; ++k) {
        put<N>(out + 3 * i + k * N, chosen<N>(from + k * N, other + k * N, __builtin_shuffle(m, lanes[k])), streamed);
      }
    }
    choose_pixels(a, reached, elsewhere, mask, i, pixels, 3, out);
  }

  // Pixels [i, end) of any width.
  static FASTCAM_INLINE void choose_pixels(const PerturbArgs<E, R>& a, const E* reached, const E* elsewhere, const E* mask,
                                           int64_t i, int64_t end, int64_t width, E* out) {
    for (; i < end; ++i) {
      const E* from = mask[i] ? reached + (a.reached.plain ? 0 : i * width) : elsewhere + (a.elsewhere.plain ? 0 : i * width);
      for (int64_t c = 0; c < width; ++c) out[i * width + c] = from[c];
    }
  }

  template <int N>
  static FASTCAM_INLINE Vector<E, N> chosen(const E* reached, const E* elsewhere, Vector<E, N> mask) {
    return (load_raw<E, N>(reached) & mask) | (load_raw<E, N>(elsewhere) & ~mask);
  }

  template <int N>
  static FASTCAM_INLINE void put(E* p, Vector<E, N> v, bool streamed) {
    if (streamed) stream(p, v);
    else store_raw<E, N>(p, v);
  }
};

}  // namespace fastcam::cpu
