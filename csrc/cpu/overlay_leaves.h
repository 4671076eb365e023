// Leaf of overlay: some pixels of one map and its image.
//
// Results lie pixel by pixel, three bytes each. What they are made of is brought into that order first, a chunk at a time in
// buffers that stay in L1: colours and opacities by four neighbours a pixel, of which the next pixel overwrites the fourth;
// the channels of NCHW images by shuffles. The arithmetic then runs over flat vectors.
#pragma once

#include "cpu/leaf.h"
#include "overlay_formulas.h"

namespace fastcam::cpu {

template <typename S, typename M>
struct OverlayArgs {
  const S* image;      // of three channels, `channel` apart, or interleaved; of one: channel = 0
  const M* map;        // dense, as the image's pixels are
  const Accumulate<S>* table;  // (L,4), the fourth unused
  uint8_t* out;
  int64_t pixels, channel;
  bool interleaved;
  OverlayNumbers<Accumulate<S>> numbers;
};

template <typename S, typename M>
struct Overlay {
  using A = Accumulate<S>;
  static constexpr int kChunk = 256;  // pixels
  using Four = Vector<A, 4>;

  template <int BYTES>
  static FASTCAM_INLINE void body(const OverlayArgs<S, M>& a) {
    constexpr int N = kLanes<BYTES, S>;
    using V = Vector<A, N>;
    V scale[3], shift[3];
    for (int i = 0; i < 3 * N; ++i) scale[i / N][i % N] = a.numbers.scale[i % 3], shift[i / N][i % N] = a.numbers.shift[i % 3];
    A opacities[3 * kChunk + 4], colours[3 * kChunk + 4], values[3 * kChunk];
    for (int64_t first = 0; first < a.pixels; first += kChunk) {
      const int64_t n = smaller(kChunk, a.pixels - first);
      paint<N>(a, a.map + first, n, opacities, colours);
      const S* image = a.image + (a.interleaved ? 3 * first : first);
      if (!a.interleaved) interleave<N>(image, a.channel, n, values);
      uint8_t* out = a.out + 3 * first;
      for (int64_t i = 0; i < 3 * n; i += 3 * N) {
        for (int k = 0; k < 3; ++k) {
          const int64_t at = i + k * N, left = 3 * n - at;
          if (left <= 0) break;
          V x;
          if (!a.interleaved) {
            x = load<N>(values + at);
          } else {
            x = left < N ? load_first<N>(image + at, left) : load<N>(image + at);
          }
          const V pixel = overlay_pixel<A>(x, scale[k], shift[k]);
          const V blended = overlay_blend<A>(pixel, load<N>(colours + at), load<N>(opacities + at));
          const auto bytes = __builtin_convertvector(__builtin_convertvector(blended, Vector<int32_t, N>), Vector<uint8_t, N>);
          if (left < N) {
            std::memcpy(out + at, &bytes, left);
          } else {
            store_raw<uint8_t, N>(out + at, bytes);
          }
        }
      }
    }
  }

  // Opacities and colours of n pixels, thrice and three a pixel.
  template <int N>
  static FASTCAM_INLINE void paint(const OverlayArgs<S, M>& a, const M* map, int64_t n, A* opacities, A* colours) {
    const auto& x = a.numbers;
    A opacity[kChunk];
    int32_t entry[kChunk];
    for (int64_t i = 0; i < n; i += N) {
      const auto m = n - i < N ? load_first<N>(map + i, n - i) : load<N>(map + i);
      const auto value = overlay_value<A>(m, x.lowest);
      const auto place = overlay_entry<A>(value, x.lowest, x.extent, x.last);
      store_raw<int32_t, N>(entry + i, __builtin_convertvector(place, Vector<int32_t, N>));
      store<N>(opacity + i, value < 0 ? -value : value);
    }
    for (int64_t i = 0; i < n; ++i) opacity[i] = x.alpha * std::sqrt(opacity[i]);
    for (int64_t i = 0; i < n; ++i) {
      store_raw<A, 4>(colours + 3 * i, load_raw<A, 4>(a.table + 4 * entry[i]));
      store_raw<A, 4>(opacities + 3 * i, splat<4>(opacity[i]));
    }
  }

  template <int N>
  static FASTCAM_INLINE void interleave(const S* image, int64_t channel, int64_t n, A* values) {
    using I = Vector<std::conditional_t<sizeof(A) == 8, int64_t, int32_t>, N>;
    I pair[3], third[3];
    for (int i = 0; i < 3 * N; ++i) {
      const int pixel = i / 3, c = i % 3, lane = i % N;
      pair[i / N][lane] = c == 1 ? N + pixel : pixel;
      third[i / N][lane] = c == 2 ? N + pixel : lane;
    }
    for (int64_t i = 0; i < n; i += N) {
      Vector<A, N> c[3];
      for (int k = 0; k < 3; ++k) {
        const S* from = image + k * channel + i;
        c[k] = n - i < N ? load_first<N>(from, n - i) : load<N>(from);
      }
      for (int k = 0; k < 3; ++k) {
        const auto both = __builtin_shuffle(c[0], c[1], pair[k]);
        store<N>(values + 3 * i + k * N, __builtin_shuffle(both, c[2], third[k]));
      }
    }
  }
};

}  // namespace fastcam::cpu
