// Leaf of cam_map's second half, one map at a time: add partial sums, note finiteness, ReLU, bilinear resize, min-max.
//
// The resize is separable: rows are stretched horizontally into a small buffer, then blended in pairs. Both blends are
// a + l (b - a), which leaves a constant exactly constant. For fixed a and b that is monotone in l, rounding included, so of all
// output rows blended from one pair only the first and the last can hold the map's minimum or maximum: min-max reads
// those alone, and each output element is written once, already scaled.
#pragma once

#include <cmath>

#include "cpu/leaf.h"

namespace fastcam::cpu {

// For each output index: the two inputs and the share of the second. As aten's bilinear with align_corners=False.
template <typename A>
struct Axis {
  const int32_t* first;
  const int32_t* second;
  const A* share;
  int64_t in, out;
};

template <typename A>
void fill_axis(int64_t in, int64_t out, int32_t* first, int32_t* second, A* share) {
  const A scale = static_cast<A>(in) / static_cast<A>(out);
  for (int64_t i = 0; i < out; ++i) {
    A source = in == out ? static_cast<A>(i) : scale * (static_cast<A>(i) + A(0.5)) - A(0.5);
    source = source < 0 ? 0 : source;
    const int64_t index = smaller(static_cast<int64_t>(source), in - 1);
    first[i] = static_cast<int32_t>(index);
    second[i] = static_cast<int32_t>(smaller(index + 1, in - 1));
    const A rest = source - static_cast<A>(index);
    share[i] = rest > 1 ? 1 : rest;
  }
}

template <typename A>
struct FinishArgs {
  const A* partial;  // `parts` slices of height * width sums, `part` elements apart; may be `raw` itself
  int64_t parts, part;
  A* raw;
  A* maps;
  bool* finite;
  A* rows;           // scratch: in-height rows of row_stride elements; null if there is no resize
  int64_t row_stride;
  Axis<A> x, y;
  bool relu, normalize;
};

template <typename A>
struct Finish {
  template <int BYTES>
  static FASTCAM_INLINE void body(const FinishArgs<A>& a) {
    constexpr int N = BYTES / static_cast<int>(sizeof(A));
    const int64_t positions = a.x.in * a.y.in;
    const bool finite = *a.finite = combine<N>(a, positions);
    const int64_t area = a.x.out * a.y.out;
    if (a.normalize && !finite) return fill<N>(a.maps, area, static_cast<A>(NAN));
    A low = a.raw[0], high = a.raw[0];
    if (a.rows == nullptr) {
      if (!a.normalize) {
        std::memcpy(a.maps, a.raw, area * sizeof(A));
        return;
      }
      extremes<N>(a.raw, a.raw, 0, area, low, high);
    } else {
      stretch<N>(a);
      if (a.normalize) range<N>(a, low, high);
    }
    if (a.normalize && low == high) return fill<N>(a.maps, area, A(0));
    const A scale = a.normalize ? rounded_up_inverse(high - low) : A(1);
    if (a.normalize && !std::isfinite(scale)) return divide<N>(a, low, high - low);
    write<N>(a, a.normalize ? low : A(0), scale, a.normalize);
  }

  // raw from the partial sums; whether all sums are finite (x - x is NaN for anything that is not).
  template <int N>
  static FASTCAM_INLINE bool combine(const FinishArgs<A>& a, int64_t positions) {
    Vector<A, N> poison = {};
    int64_t p = 0;
    for (; p < positions; p += N) {
      const int64_t n = smaller(N, positions - p);
      auto sum = n == N ? load<N>(a.partial + p) : load_first<N>(a.partial + p, n);
      for (int64_t i = 1; i < a.parts; ++i) {
        const A* part = a.partial + i * a.part + p;
        sum += n == N ? load<N>(part) : load_first<N>(part, n);
      }
      poison += sum - sum;
      if (a.relu) sum = sum < 0 ? Vector<A, N>{} : sum;  // NaN compares false and stays
      store_first<N>(a.raw + p, sum, n);
    }
    return horizontal_sum<N>(poison) == 0;
  }

  // Horizontal stretch of every input row; the padding repeats the last column, harmless to min and max.
  template <int N>
  static FASTCAM_INLINE void stretch(const FinishArgs<A>& a) {
    for (int64_t y = 0; y < a.y.in; ++y) {
      const A* from = a.raw + y * a.x.in;
      A* to = a.rows + y * a.row_stride;
      for (int64_t x = 0; x < a.x.out; ++x) {
        const A left = from[a.x.first[x]], right = from[a.x.second[x]];
        to[x] = left + a.x.share[x] * (right - left);
      }
      for (int64_t x = a.x.out; x < a.row_stride; ++x) to[x] = to[a.x.out - 1];
    }
  }

  template <int N>
  static FASTCAM_INLINE Vector<A, N> blend(const A* top, const A* bottom, A share) {
    const auto a = load<N>(top);
    return a + share * (load<N>(bottom) - a);
  }

  template <int N>
  static FASTCAM_INLINE void range(const FinishArgs<A>& a, A& low, A& high) {
    low = static_cast<A>(INFINITY);
    high = -low;
    for (int64_t y = 0; y < a.y.out; ++y) {
      const bool first = y == 0 || a.y.first[y - 1] != a.y.first[y];
      const bool last = y + 1 == a.y.out || a.y.first[y + 1] != a.y.first[y];
      if (!first && !last) continue;
      const A* top = a.rows + a.y.first[y] * a.row_stride;
      const A* bottom = a.rows + a.y.second[y] * a.row_stride;
      extremes<N>(top, bottom, a.y.share[y], a.row_stride, low, high);
    }
  }

  // Min and max of top + share (bottom - top), merged into low and high.
  template <int N>
  static FASTCAM_INLINE void extremes(const A* top, const A* bottom, A share, int64_t length, A& low, A& high) {
    if (length >= N) {
      auto least = blend<N>(top, bottom, share), most = least;
      for (int64_t x = 0; x < length; x += N) {
        const int64_t at = smaller(x, length - N);  // the last vector overlaps instead of overrunning
        const auto u = blend<N>(top + at, bottom + at, share);
        least = u < least ? u : least;
        most = u > most ? u : most;
      }
      A lows[N], highs[N];
      store<N>(lows, least);
      store<N>(highs, most);
      for (int i = 0; i < N; ++i) {
        low = lows[i] < low ? lows[i] : low;
        high = highs[i] > high ? highs[i] : high;
      }
      return;
    }
    for (int64_t x = 0; x < length; ++x) {
      const A u = top[x] + share * (bottom[x] - top[x]);
      low = u < low ? u : low;
      high = u > high ? u : high;
    }
  }

  // 1 / span, rounded so that span * inverse >= 1: clamped at 1, the maximum becomes exactly 1 without a division per
  // element. Infinite for subnormal spans.
  static FASTCAM_INLINE A rounded_up_inverse(A span) {
    const A inverse = A(1) / span;
    return span * inverse < 1 ? std::nextafter(inverse, static_cast<A>(INFINITY)) : inverse;
  }

  template <int N>
  static FASTCAM_INLINE void write(const FinishArgs<A>& a, A low, A scale, bool normalize) {
    const bool resized = a.rows != nullptr;
    const int64_t height = resized ? a.y.out : 1, width = resized ? a.x.out : a.x.in * a.y.in;
    for (int64_t y = 0; y < height; ++y) {
      const A* top = resized ? a.rows + a.y.first[y] * a.row_stride : a.raw;
      const A* bottom = resized ? a.rows + a.y.second[y] * a.row_stride : a.raw;
      const A share = resized ? a.y.share[y] : A(0);
      A* to = a.maps + y * width;
      int64_t x = 0;
      for (; x + N <= width; x += N) store<N>(to + x, scaled<N>(blend<N>(top + x, bottom + x, share), low, scale, normalize));
      if (x < width) {
        const auto t = load_first<N>(top + x, width - x), b = load_first<N>(bottom + x, width - x);
        store_first<N>(to + x, scaled<N>(t + share * (b - t), low, scale, normalize), width - x);
      }
    }
  }

  template <int N>
  static FASTCAM_INLINE Vector<A, N> scaled(Vector<A, N> u, A low, A scale, bool normalize) {
    if (!normalize) return u;
    const auto y = (u - low) * scale;
    return y > A(1) ? splat<N>(A(1)) : y;
  }

  // The rare map whose span is too small to invert.
  template <int N>
  static FASTCAM_INLINE void divide(const FinishArgs<A>& a, A low, A span) {
    write<N>(a, A(0), A(1), false);
    for (int64_t i = 0; i < a.x.out * a.y.out; ++i) a.maps[i] = (a.maps[i] - low) / span;
  }

  template <int N>
  static FASTCAM_INLINE void fill(A* to, int64_t n, A value) {
    for (int64_t i = 0; i < n; ++i) to[i] = value;
  }
};

}  // namespace fastcam::cpu
