// Leaves of mask_by_features: a feature map into a dense buffer, and a mask times all channels of an image. What lies between
// them, resize and min-max, is cam_map_finish.h's.
#pragma once

#include "cpu/stream.h"

namespace fastcam::cpu {

template <typename F>
struct GatherArgs {
  const F* map;  // (height, width) with any strides
  int64_t height, width, row, column;
  Accumulate<F>* out;  // dense
};

template <typename F>
struct Gather {
  template <int BYTES>
  static FASTCAM_INLINE void body(const GatherArgs<F>& a) {
    constexpr int N = kLanes<BYTES, F>;
    for (int64_t y = 0; y < a.height; ++y) {
      const F* from = a.map + y * a.row;
      auto* to = a.out + y * a.width;
      if (a.column == 1) {
        int64_t x = 0;
        for (; x + N <= a.width; x += N) store<N>(to + x, load<N>(from + x));
        if (x < a.width) store_first<N>(to + x, load_first<N>(from + x, a.width - x), a.width - x);
      } else {
        for (int64_t x = 0; x < a.width; ++x) to[x] = load_first<4>(from + x * a.column, 1)[0];
      }
    }
  }
};

template <typename S>
struct MaskArgs {
  const S* image;
  S* out;
  Accumulate<S>* mask;         // dense; overwritten with scale * (mask + noise)
  const Accumulate<S>* noise;  // dense, or null
  Accumulate<S> scale;
  int64_t channels, positions;
  int64_t image_channel;  // between channels of an NCHW image; the result's are dense, and all of a channels_last one
  bool streamed;          // whether the result goes past the caches
};

// mask = scale * (mask + noise), in place.
template <int N, typename S>
FASTCAM_INLINE void weigh(const MaskArgs<S>& a) {
  if (a.noise == nullptr && a.scale == 1) return;
  for (int64_t p = 0; p < a.positions; p += N) {
    const int64_t n = smaller(N, a.positions - p);
    auto m = n == N ? load<N>(a.mask + p) : load_first<N>(a.mask + p, n);
    if (a.noise != nullptr) m += n == N ? load<N>(a.noise + p) : load_first<N>(a.noise + p, n);
    store_first<N>(a.mask + p, a.scale * m, n);
  }
}

// out[i] = image[i] * mask[i].
template <int N, typename S>
FASTCAM_INLINE void multiply(const S* image, const Accumulate<S>* mask, S* out, int64_t length, bool streamed) {
  int64_t i = 0;
  if constexpr (N * sizeof(S) % 16 == 0) {
    if (streamed) {
      const int64_t ahead = smaller(elements_ahead(out, sizeof(S)), length);
      for (; i < ahead; i += N) {
        store_first<N>(out + i, load_first<N>(image + i, smaller(N, ahead - i)) * load_first<N>(mask + i, smaller(N, ahead - i)),
                       ahead - i);
      }
      for (i = ahead; i + N <= length; i += N) stream(out + i, narrow<S, N>(load<N>(image + i) * load<N>(mask + i)));
    }
  }
  for (; i + N <= length; i += N) store<N>(out + i, load<N>(image + i) * load<N>(mask + i));
  const int64_t n = length - i;
  if (n > 0) store_first<N>(out + i, load_first<N>(image + i, n) * load_first<N>(mask + i, n), n);
}

template <typename S>
struct MaskChannels {  // NCHW
  template <int BYTES>
  static FASTCAM_INLINE void body(const MaskArgs<S>& a) {
    constexpr int N = kLanes<BYTES, S>;
    weigh<N>(a);
    for (int64_t c = 0; c < a.channels; ++c) {
      multiply<N>(a.image + c * a.image_channel, a.mask, a.out + c * a.positions, a.positions, a.streamed);
    }
    if (a.streamed) end_streaming();
  }
};

template <typename S>
struct MaskPositions {  // channels_last
  using A = Accumulate<S>;
  static constexpr int64_t kExpanded = 1024;  // values of the mask, each repeated for all channels; stays in L1

  template <int BYTES>
  static FASTCAM_INLINE void body(const MaskArgs<S>& a) {
    constexpr int N = kLanes<BYTES, S>;
    weigh<N>(a);
    if (a.channels >= 2 * N) return by_channels<N>(a);
    A expanded[kExpanded];
    const int64_t block = kExpanded / a.channels / 16 * 16;  // so that blocks begin where lines of the caches do
    for (int64_t p = 0; p < a.positions; p += block) {
      const int64_t n = smaller(block, a.positions - p);
      // The colours of nearly all images are worth a loop that the compiler unrolls.
      a.channels == 3 ? repeat(a.mask + p, n, 3, expanded) : repeat(a.mask + p, n, a.channels, expanded);
      multiply<N>(a.image + p * a.channels, expanded, a.out + p * a.channels, n * a.channels, a.streamed);
    }
    if (a.streamed) end_streaming();
  }

  static FASTCAM_INLINE void repeat(const A* mask, int64_t n, int64_t channels, A* to) {
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t c = 0; c < channels; ++c) to[i * channels + c] = mask[i];
    }
  }

  // Enough channels for vectors of their own.
  template <int N>
  static FASTCAM_INLINE void by_channels(const MaskArgs<S>& a) {
    for (int64_t p = 0; p < a.positions; ++p) {
      const S* image = a.image + p * a.channels;
      S* out = a.out + p * a.channels;
      const auto m = splat<N>(a.mask[p]);
      int64_t c = 0;
      for (; c + N <= a.channels; c += N) store<N>(out + c, load<N>(image + c) * m);
      const int64_t n = a.channels - c;
      if (n > 0) store_first<N>(out + c, load_first<N>(image + c, n) * m, n);
    }
  }
};

}  // namespace fastcam::cpu
