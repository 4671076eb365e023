// mask_by_features on CUDA devices, framework-free: raw pointers, sizes, stream.
//
// Two launches. `measure_maps`, a block a pair, widens the pair's feature map into scratch and finds its extremes, those of
// the resized map from four values a cell (formulas.h), so that nothing of the image's size is read or written.
// `multiply_images` resizes and scales the mask of 1024 pixels in shared memory and multiplies all channels by it. A row depends
// on its pair only, not on the chunk; no atomics, no synchronisation.
#pragma once

#include "cuda/cam_map_finish.cuh"
#include "cuda/common.cuh"

namespace fastcam::cuda {

constexpr int kMaskPixels = 1024;  // of a `multiply_images` block

// Row `row` of the result belongs to pair `first + row`, counted from the first pair of image 0 of these tensors. Pairs stay
// below 2^32, so that they divide as 32-bit numbers.
struct PairNumbers {
  int64_t rows;
  unsigned first, channels;  // channels of the features

  __device__ __forceinline__ int64_t image(int64_t row) const { return (first + unsigned(row)) / channels; }
  __device__ __forceinline__ int64_t channel(int64_t row) const { return (first + unsigned(row)) % channels; }
};

template <typename F>
struct MapArgs {
  const F* features;
  int64_t image, channel, row, column;  // strides of the features, any
  Accumulate<F>* maps;                  // scratch (rows, h*w): raw, or scaled if minmax_first
  Accumulate<F>* ranges;                // scratch (rows, 3): low, extent, finite; unused if minmax_first
  PairNumbers pairs;
  int height, width, out_height, out_width;  // h*w and H*W below 2^31
  bool minmax_first;
};

template <typename F>
__global__ void __launch_bounds__(kFinishThreads) measure_maps(const MapArgs<F> x) {
  using A = Accumulate<F>;
  const int64_t pair = image_number();
  if (pair >= x.pairs.rows) return;
  const F* from = x.features + x.pairs.image(pair) * x.image + x.pairs.channel(pair) * x.channel;
  const int area = x.height * x.width;
  A* to = x.maps + pair * area;
  Stats<A> stats = no_stats<A>();
  for (int p = threadIdx.x; p < area; p += kFinishThreads) {
    const A value = widen(from[p / x.width * x.row + p % x.width * x.column]);
    stats.finite = stats.finite && is_finite(value);
    widen_to(stats.raw, value);
    to[p] = value;
  }
  if (!x.minmax_first) {
    __syncthreads();  // neighbours' values are in `to`
    const A scale_y = axis_scale<A>(x.height, x.out_height), scale_x = axis_scale<A>(x.width, x.out_width);
    for (int p = threadIdx.x; p < area; p += kFinishThreads) {
      const int i = p / x.width, j = p % x.width, right = min(j + 1, x.width - 1);
      const A* top = to + int64_t(i) * x.width;
      const A* low = to + int64_t(min(i + 1, x.height - 1)) * x.width;
      widen_to_cell(stats.resized, top[j], top[right], low[j], low[right], i, j, scale_y, scale_x,
                    first_output(i, scale_y, x.out_height), first_output(i + 1, scale_y, x.out_height),
                    first_output(j, scale_x, x.out_width), first_output(j + 1, scale_x, x.out_width));
    }
  }
  stats = merge_block(stats);
  const MinMax<A> range = range_of(stats, !x.minmax_first);
  if (x.minmax_first) {
    for (int p = threadIdx.x; p < area; p += kFinishThreads) to[p] = scaled(to[p], range);
  } else if (threadIdx.x == 0) {
    A* out = x.ranges + pair * 3;
    out[0] = range.low, out[1] = range.extent, out[2] = range.finite;
  }
}

template <typename T>
struct MaskArgs {
  const T* images;  // dense: (images,C,H,W), or (images,H,W,C) if channels_last
  T* out;           // (rows,C,H,W) in the same order
  const Accumulate<T>* maps;
  const Accumulate<T>* ranges;
  const Accumulate<T>* noise;  // (rows,H*W), or null
  PairNumbers pairs;
  int height, width, out_height, out_width;
  unsigned channels;  // of the images; at most 2^20, so that a block's elements are below 2^31
  Accumulate<T> scale;
  bool minmax_first, channels_last;
};

// Pixels start..start+count-1 of one pair's mask, with noise and scale.
template <typename T>
__device__ __forceinline__ void mask_pixels(const MaskArgs<T>& x, int64_t pair, int start, int count,
                                            Accumulate<T>* masks) {
  using A = Accumulate<T>;
  const A* map = x.maps + pair * x.height * x.width;
  const A* noise = x.noise == nullptr ? nullptr : x.noise + pair * x.out_height * x.out_width + start;
  MinMax<A> range = {};
  if (!x.minmax_first) range = {x.ranges[pair * 3], x.ranges[pair * 3 + 1], x.ranges[pair * 3 + 2] != A(0)};
  const A scale_y = axis_scale<A>(x.height, x.out_height), scale_x = axis_scale<A>(x.width, x.out_width);
  for (int i = threadIdx.x; i < count; i += kFinishThreads) {
    const int pixel = start + i;
    const Tap<A> down = tap(pixel / x.out_width, scale_y, x.height), across = tap(pixel % x.out_width, scale_x, x.width);
    const A* top = map + int64_t(down.low) * x.width;
    const A* low = map + int64_t(down.high) * x.width;
    A value = bilinear(top[across.low], top[across.high], low[across.low], low[across.high], down.share, across.share);
    if (!x.minmax_first) value = scaled(value, range);
    if (noise != nullptr) value += noise[i];
    masks[i] = x.scale * value;
  }
}

template <typename T, int V>
__global__ void __launch_bounds__(kFinishThreads) multiply_images(const MaskArgs<T> x) {
  __shared__ Accumulate<T> masks[kMaskPixels];
  const int64_t pair = image_number();
  if (pair >= x.pairs.rows) return;
  const int area = x.out_height * x.out_width, start = int(blockIdx.x) * kMaskPixels;
  const int count = min(kMaskPixels, area - start);
  mask_pixels(x, pair, start, count, masks);
  __syncthreads();
  // A tile's packs: of every channel, one channel after the other, or of the pixels with all their channels.
  const int64_t offset = int64_t(start) * (x.channels_last ? x.channels : 1u), size = int64_t(x.channels) * area;
  const T* images = x.images + x.pairs.image(pair) * size + offset;
  T* out = x.out + pair * size + offset;
  const unsigned row = count / V;
  for (unsigned pack = threadIdx.x; pack < x.channels * unsigned(count) / V; pack += kFinishThreads) {
    int64_t at;
    unsigned pixel, channel = 0;
    if (x.channels_last) {
      at = int64_t(pack) * V;
      pixel = pack * V / x.channels, channel = pack * V % x.channels;
    } else {
      pixel = pack % row * V;
      at = int64_t(pack / row) * area + pixel;
    }
    const Pack<T, V> values = load<V>(images + at);
    Pack<T, V> masked;
#pragma unroll
    for (int j = 0; j < V; ++j) {
      masked.v[j] = narrow<T>(widen(values.v[j]) * masks[pixel]);
      if (!x.channels_last || ++channel == x.channels) ++pixel, channel = 0;
    }
    *reinterpret_cast<Pack<T, V>*>(out + at) = masked;
  }
}

// Scratch of one row, in elements of the accumulation type.
inline int64_t scratch_a_row(int64_t height, int64_t width) { return height * width + 3; }

// `masks` without maps, ranges, pairs and sizes, which follow from `maps`; the latter without maps and ranges, which are cut
// from scratch of pairs.rows * scratch_a_row elements. Nothing is launched for no rows.
template <typename T, typename F>
cudaError_t run_mask_by_features(MapArgs<F> maps, MaskArgs<T> masks, Accumulate<T>* scratch, cudaStream_t stream) {
  static_assert(std::is_same_v<Accumulate<T>, Accumulate<F>>);
  if (maps.pairs.rows == 0) return cudaSuccess;
  maps.ranges = scratch, maps.maps = scratch + 3 * maps.pairs.rows;
  masks.ranges = maps.ranges, masks.maps = maps.maps, masks.pairs = maps.pairs, masks.minmax_first = maps.minmax_first;
  masks.height = maps.height, masks.width = maps.width;
  masks.out_height = maps.out_height, masks.out_width = maps.out_width;
  launch(measure_maps<F>, grid_of(1, maps.pairs.rows), kFinishThreads, 0, stream, maps);
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) return error;
  const int64_t area = int64_t(maps.out_height) * maps.out_width;
  const dim3 grid = grid_of(ceil_div<int64_t>(area, kMaskPixels), maps.pairs.rows);
  const int64_t run = masks.channels_last ? area * masks.channels : area;
  if (run % kVector<T> == 0 && aligned(masks.images) && aligned(masks.out)) {
    launch(multiply_images<T, kVector<T>>, grid, kFinishThreads, 0, stream, masks);
  } else {
    launch(multiply_images<T, 1>, grid, kFinishThreads, 0, stream, masks);
  }
  return cudaGetLastError();
}

}  // namespace fastcam::cuda
