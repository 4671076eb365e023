// Leaf of overlay: some pixels of one map and its image.
//
// The arithmetic runs channel by channel over vectors of pixels. Colours come from the table by four neighbours a pixel and
// are turned into channels by shuffles, as pixels of images in channels_last are. A pixel's three bytes are put together in 32
// bits, four such pixels in 96, and these lie in a buffer before they go out whole: conversions of vectors to bytes become one
// instruction a byte.
#pragma once

#include "cpu/stream.h"
#include "overlay_formulas.h"

namespace fastcam::cpu {

template <typename S, typename M>
struct OverlayArgs {
  const S* image;      // of three channels, `channel` apart, or interleaved; of one: channel = 0
  const M* map;        // dense, as the image's pixels are
  const Accumulate<S>* table;  // (L,4), the fourth unused
  uint8_t* out;
  int64_t pixels, channel;
  bool interleaved, streamed;
  OverlayNumbers<Accumulate<S>> numbers;
};

// N of every `STEP`-th element from the C-th on, of vectors one after the other.
template <typename A, int N, int STEP, int C>
struct Channel {
  using V = Vector<A, N>;
  using I = std::conditional_t<sizeof(A) == 8, int64_t, int32_t>;
  using Lanes = std::make_integer_sequence<int, N>;

  static constexpr I from(int pixel) { return STEP * pixel + C; }

  // What of the first two vectors belongs here, then what of the third, then of the fourth.
  template <int... J>
  static FASTCAM_INLINE V of(const V* v, std::integer_sequence<int, J...>) {
    const Vector<I, N> two = {(from(J) < 2 * N ? from(J) : I(J))...};
    V found = __builtin_shuffle(v[0], v[1], two);
    const Vector<I, N> third = {(from(J) >= 2 * N && from(J) < 3 * N ? from(J) - N : I(J))...};
    found = __builtin_shuffle(found, v[2], third);
    if constexpr (STEP == 3) return found;
    const Vector<I, N> fourth = {(from(J) >= 3 * N ? from(J) - 2 * N : I(J))...};
    return __builtin_shuffle(found, v[3], fourth);
  }
  static FASTCAM_INLINE V of(const V* v) { return of(v, Lanes{}); }
};

// Three bytes of each of N pixels, in the low bits of 32, one after the other: 3 N / 4 words, then what means nothing.
template <int N, typename W, int... J>
FASTCAM_INLINE W packed(W pixels, std::integer_sequence<int, J...>) {
  using Signed = Vector<int32_t, N>;
  const Signed left = {(J < 3 * N / 4 ? J / 3 * 4 + J % 3 : 0)...}, right = {(J < 3 * N / 4 ? J / 3 * 4 + J % 3 + 1 : 0)...};
  const W down = {(J % 3 * 8u)...}, up = {(24u - J % 3 * 8u)...};
  return (__builtin_shuffle(pixels, left) >> down) | (__builtin_shuffle(pixels, right) << up);
}

template <typename S, typename M>
struct Overlay {
  using A = Accumulate<S>;
  static constexpr int kChunk = 256;  // pixels

  template <int BYTES>
  static FASTCAM_INLINE void body(const OverlayArgs<S, M>& a) {
    constexpr int N = kLanes<BYTES, S> < 4 ? 4 : kLanes<BYTES, S>;
    OverlayNumbers<A> numbers = a.numbers;  // which no store below can change; of pixels in 0..255
    for (int c = 0; c < 3; ++c) numbers.scale[c] *= A(255), numbers.shift[c] *= A(255);
    const bool streamed = a.streamed && reinterpret_cast<uintptr_t>(a.out) % 16 == 0;
    A opacities[kChunk], colours[4 * kChunk];
    uint8_t bytes[3 * kChunk + 4 * N];
    for (int64_t first = 0; first < a.pixels; first += kChunk) {
      const int64_t n = smaller(kChunk, a.pixels - first);
      paint<N>(a, numbers, a.map + first, n, opacities, colours);
      const S* image = a.image + (a.interleaved ? 3 * first : first);
      for (int64_t i = 0; i < n; i += N) {
        blend<N>(a, numbers, image, i, n - i, opacities + i, colours + 4 * i, bytes + 3 * i);
      }
      if (streamed && n == kChunk) {
        for (int i = 0; i < 3 * kChunk; i += 64) stream(a.out + 3 * first + i, load_raw<uint8_t, 64>(bytes + i));
      } else {
        std::memcpy(a.out + 3 * first, bytes, 3 * n);
      }
    }
    if (streamed) end_streaming();
  }

  // The first n of N values, or all, or none.
  template <int N, typename T>
  static FASTCAM_INLINE Vector<A, N> load_up_to(const T* p, int64_t n) {
    return n >= N ? load<N>(p) : load_first<N>(p, n < 0 ? 0 : n);
  }

  // N pixels from the i-th on, of which `left` exist.
  template <int N>
  static FASTCAM_INLINE void blend(const OverlayArgs<S, M>& a, const OverlayNumbers<A>& x, const S* image, int64_t i,
                                   int64_t left, const A* opacities, const A* colours, uint8_t* out) {
    using V = Vector<A, N>;
    V rows[4], pixels[3];
    for (int k = 0; k < 4; ++k) rows[k] = load<N>(colours + k * N);
    if (a.interleaved) {
      for (int k = 0; k < 3; ++k) pixels[k] = load_up_to<N>(image + 3 * i + k * N, 3 * left - k * N);
      const V red = Channel<A, N, 3, 0>::of(pixels), green = Channel<A, N, 3, 1>::of(pixels);
      pixels[2] = Channel<A, N, 3, 2>::of(pixels), pixels[0] = red, pixels[1] = green;
    } else {
      for (int k = 0; k < 3; ++k) pixels[k] = load_up_to<N>(image + k * a.channel + i, left);
    }
    const V opacity = load<N>(opacities);
    const auto words = byte<N, 0>(x, pixels[0], Channel<A, N, 4, 0>::of(rows), opacity) |
                       byte<N, 1>(x, pixels[1], Channel<A, N, 4, 1>::of(rows), opacity) << 8 |
                       byte<N, 2>(x, pixels[2], Channel<A, N, 4, 2>::of(rows), opacity) << 16;
    store_raw<uint32_t, N>(out, packed<N>(words, std::make_integer_sequence<int, N>{}));
  }

  // A channel of the result, in 0..255: overlay_pixel under overlay_blend.
  template <int N, int C>
  static FASTCAM_INLINE Vector<uint32_t, N> byte(const OverlayNumbers<A>& x, Vector<A, N> value, Vector<A, N> colour,
                                                 Vector<A, N> opacity) {
    using V = Vector<A, N>;
    const V scaled = value * splat<N>(x.scale[C]) + splat<N>(x.shift[C]);
    const V positive = scaled > 0 ? scaled : V{};  // 0 for NaN
    const V pixel = reinterpret_cast<V>(at_most_255<N>(positive)) - kUlpIsOne;
    const auto bits = at_most_255<N>(pixel + opacity * (colour - pixel)), low = bits_of<N>(0);
    const auto mixed = bits > low ? bits : low;
    return __builtin_convertvector(mixed - low, Vector<uint32_t, N>);
  }

  static constexpr A kUlpIsOne = sizeof(A) == 8 ? A(0x1.8p52) : A(0x1.8p23);
  using Integer = std::conditional_t<sizeof(A) == 8, int64_t, int32_t>;

  template <int N>
  static FASTCAM_INLINE Vector<Integer, N> bits_of(A v) {
    return reinterpret_cast<Vector<Integer, N>>(splat<N>(v + kUlpIsOne));
  }

  // v to the nearest integer, 255 at most, as the last bits of v + kUlpIsOne. As integers these are compared in fewer
  // instructions than floats, in the same order.
  template <int N>
  static FASTCAM_INLINE Vector<Integer, N> at_most_255(Vector<A, N> v) {
    const auto bits = reinterpret_cast<Vector<Integer, N>>(v + kUlpIsOne), high = bits_of<N>(255);
    return bits > high ? high : bits;
  }

  // Opacities of n pixels, and their colours, four numbers a pixel.
  template <int N>
  static FASTCAM_INLINE void paint(const OverlayArgs<S, M>& a, const OverlayNumbers<A>& x, const M* map, int64_t n,
                                   A* opacities, A* colours) {
    uint32_t row[kChunk];  // of the table, in bytes
    for (int64_t i = 0; i < n; i += N) {
      const auto value = overlay_value<A>(load_up_to<N>(map + i, n - i), x.lowest);
      const auto place = overlay_entry<A>(value, x.lowest, x.entries);
      const auto entry = reinterpret_cast<Vector<uint32_t, N>>(__builtin_convertvector(place, Vector<int32_t, N>));
      store_raw<uint32_t, N>(row + i, entry * static_cast<uint32_t>(4 * sizeof(A)));
      store<N>(opacities + i, value < 0 ? -value : value);
    }
    for (int64_t i = 0; i < n; ++i) opacities[i] = x.alpha * std::sqrt(opacities[i]);
    const char* table = reinterpret_cast<const char*>(a.table);
#pragma GCC unroll 8
    for (int64_t i = 0; i < n; ++i) store_raw<A, 4>(colours + 4 * i, load_raw<A, 4>(table + row[i]));
  }
};

}  // namespace fastcam::cpu
