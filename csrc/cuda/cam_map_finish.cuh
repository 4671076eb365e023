// cam_map, after the channel sums: raw maps, finiteness, extremes, resizing and scaling.
//
// Maps of up to 16 KiB: one launch, `finish_small`. Several blocks may share a map's output; each adds up the whole raw map in
// its shared memory (a few thousand numbers from L2) and finds the extremes itself, which is cheaper than another launch.
// Larger maps: `finish_raw` writes raw maps and the extremes of chunks, `finish_large` the output.
#pragma once

#include "cuda/common.cuh"

namespace fastcam::cuda {

constexpr int kFinishThreads = 256;
constexpr int64_t kSmallMap = 16384;  // bytes
constexpr int kChunk = 2048;          // positions of a `finish_raw` block

template <typename A>
struct FinishArgs {
  const A* partials;  // (shares, maps, H*W)
  A* raw;             // (maps, H*W)
  A* out;             // (maps, OH*OW)
  bool* finite;       // (maps)
  A* stats;           // large maps: (maps, chunks, 5)
  int64_t maps;
  int shares;
  int height, width, out_height, out_width;
  int strips, chunks;  // blocks a map: of its output, of its raw map
  bool relu, normalize, resize;
};

// What a map's scaling needs, as one value a thread and then one a block.
template <typename A>
struct Stats {
  Extremes<A> raw, resized;
  bool finite;
};

template <typename A>
__device__ __forceinline__ Stats<A> no_stats() {
  return {{A(INFINITY), -A(INFINITY)}, {A(INFINITY), -A(INFINITY)}, true};
}

template <typename A>
__device__ __forceinline__ void merge(Stats<A>& x, const Stats<A>& y) {
  merge(x.raw, y.raw), merge(x.resized, y.resized);
  x.finite = x.finite && y.finite;
}

// Merges the threads' statistics; all threads get the result.
template <typename A>
__device__ __forceinline__ Stats<A> merge_block(Stats<A> x) {
  __shared__ Stats<A> warps[kFinishThreads / 32];
  for (int step = 16; step > 0; step /= 2) {
    Stats<A> y;
    y.raw.low = __shfl_xor_sync(0xffffffffu, x.raw.low, step);
    y.raw.high = __shfl_xor_sync(0xffffffffu, x.raw.high, step);
    y.resized.low = __shfl_xor_sync(0xffffffffu, x.resized.low, step);
    y.resized.high = __shfl_xor_sync(0xffffffffu, x.resized.high, step);
    y.finite = __shfl_xor_sync(0xffffffffu, int(x.finite), step);
    merge(x, y);
  }
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = x;
  __syncthreads();
  x = warps[0];
  for (int i = 1; i < kFinishThreads / 32; ++i) merge(x, warps[i]);
  return x;
}

// M at one position of a map: its shares, added in their order.
template <typename A>
__device__ __forceinline__ A combined(const FinishArgs<A>& x, int64_t map, int64_t position) {
  const int64_t area = int64_t(x.height) * x.width;
  const A* p = x.partials + map * area + position;
  A total = p[0];
#pragma unroll 4
  for (int part = 1; part < x.shares; ++part) total += p[part * x.maps * area];
  return total;
}

// Rows `y`..`y_end`-1 of one map's output; `raw` is its raw map, wherever it lies.
template <typename A, int V>
__device__ __forceinline__ void write_rows(const FinishArgs<A>& x, const A* raw, A* out, const MinMax<A>& range, int y,
                                           int y_end) {
  const int packs = x.out_width / V, lanes = min(packs, kFinishThreads), rows = kFinishThreads / lanes;
  if (int(threadIdx.x) >= rows * lanes) return;
  y += threadIdx.x / lanes;
  const A scale_y = axis_scale<A>(x.height, x.out_height), scale_x = axis_scale<A>(x.width, x.out_width);
  for (int pack = threadIdx.x % lanes; pack < packs; pack += lanes) {
    Tap<A> across[V];
#pragma unroll
    for (int j = 0; j < V; ++j) across[j] = tap(pack * V + j, scale_x, x.width);
    for (int row = y; row < y_end; row += rows) {
      Pack<A, V> values;
      if (x.resize) {
        const Tap<A> down = tap(row, scale_y, x.height);
        const A* top = raw + int64_t(down.low) * x.width;
        const A* low = raw + int64_t(down.high) * x.width;
#pragma unroll
        for (int j = 0; j < V; ++j) {
          const Tap<A> a = across[j];
          values.v[j] = bilinear(top[a.low], top[a.high], low[a.low], low[a.high], down.share, a.share);
        }
      } else {
#pragma unroll
        for (int j = 0; j < V; ++j) values.v[j] = raw[int64_t(row) * x.width + pack * V + j];
      }
      if (x.normalize) {
#pragma unroll
        for (int j = 0; j < V; ++j) values.v[j] = scaled(values.v[j], range);
      }
      *reinterpret_cast<Pack<A, V>*>(out + int64_t(row) * x.out_width + pack * V) = values;
    }
  }
}

template <typename A>
__device__ __forceinline__ MinMax<A> range_of(const Stats<A>& x, bool resize) {
  return min_max(resize ? x.resized : x.raw, x.raw, x.finite);
}

// First output row of strip `strip`: strips of whole rows, as equal as they can be.
__device__ __forceinline__ int strip_row(int strip, int strips, int rows) { return int(int64_t(strip) * rows / strips); }

template <typename A, int V>
__global__ void __launch_bounds__(kFinishThreads) finish_small(const FinishArgs<A> x) {
  A* raw = dynamic_shared<A>();
  const int64_t map = image_number();
  if (map >= x.maps) return;
  const int strip = int(blockIdx.x), area = x.height * x.width;
  int* first_y = reinterpret_cast<int*>(raw + max(area, kFinishThreads));  // of each source row, and one more
  int* first_x = first_y + x.height + 1;
  const A scale_y = axis_scale<A>(x.height, x.out_height), scale_x = axis_scale<A>(x.width, x.out_width);
  const bool cells = x.normalize && x.resize;

  // Small maps would leave threads idle in long chains of additions: groups take every groups-th share.
  const int groups = min(max(1, kFinishThreads / area), x.shares);
  if (groups > 1) {
    const int position = threadIdx.x % area, group = threadIdx.x / area;
    if (group < groups) {
      const A* p = x.partials + map * area + position;
      A total = 0;
#pragma unroll 4
      for (int part = group; part < x.shares; part += groups) total += p[part * x.maps * area];
      raw[threadIdx.x] = total;
    }
    add_rows(raw, groups, area);
  }
  Stats<A> stats = no_stats<A>();
  for (int p = threadIdx.x; p < area; p += kFinishThreads) {
    A value = groups > 1 ? raw[p] : combined(x, map, p);
    stats.finite = stats.finite && is_finite(value);
    if (x.relu) value = relu(value);
    widen_to(stats.raw, value);
    raw[p] = value;
    if (strip == 0) x.raw[map * area + p] = value;
  }
  if (cells) {
    for (int i = threadIdx.x; i <= x.height; i += kFinishThreads) first_y[i] = first_output(i, scale_y, x.out_height);
    for (int j = threadIdx.x; j <= x.width; j += kFinishThreads) first_x[j] = first_output(j, scale_x, x.out_width);
  }
  __syncthreads();
  if (cells) {
    for (int p = threadIdx.x; p < area; p += kFinishThreads) {
      const int i = p / x.width, j = p % x.width;
      const A* top = raw + i * x.width;
      const A* low = raw + min(i + 1, x.height - 1) * x.width;
      const int right = min(j + 1, x.width - 1);
      widen_to_cell(stats.resized, top[j], top[right], low[j], low[right], i, j, scale_y, scale_x, first_y[i],
                    first_y[i + 1], first_x[j], first_x[j + 1]);
    }
  }
  stats = merge_block(stats);
  if (strip == 0 && threadIdx.x == 0) x.finite[map] = stats.finite;
  write_rows<A, V>(x, raw, x.out + map * x.out_height * x.out_width, range_of(stats, x.resize),
                   strip_row(strip, x.strips, x.out_height), strip_row(strip + 1, x.strips, x.out_height));
}

template <typename A>
__global__ void __launch_bounds__(kFinishThreads) finish_raw(const FinishArgs<A> x) {
  const int64_t map = image_number();
  if (map >= x.maps) return;
  const int area = x.height * x.width, start = int(blockIdx.x) * kChunk, end = start + min(kChunk, area - start);
  const A scale_y = axis_scale<A>(x.height, x.out_height), scale_x = axis_scale<A>(x.width, x.out_width);
  const auto value_at = [&](int i, int j) {
    const A value = combined(x, map, int64_t(i) * x.width + j);
    return x.relu ? relu(value) : value;
  };
  Stats<A> stats = no_stats<A>();
  for (int p = start + int(threadIdx.x); p < end; p += kFinishThreads) {
    A value = combined(x, map, p);
    stats.finite = stats.finite && is_finite(value);
    if (x.relu) value = relu(value);
    widen_to(stats.raw, value);
    x.raw[map * area + p] = value;
    if (x.normalize && x.resize) {
      const int i = p / x.width, j = p % x.width, low = min(i + 1, x.height - 1), right = min(j + 1, x.width - 1);
      widen_to_cell(stats.resized, value, value_at(i, right), value_at(low, j), value_at(low, right), i, j, scale_y,
                    scale_x, first_output(i, scale_y, x.out_height), first_output(i + 1, scale_y, x.out_height),
                    first_output(j, scale_x, x.out_width), first_output(j + 1, scale_x, x.out_width));
    }
  }
  stats = merge_block(stats);
  if (threadIdx.x == 0) {
    A* out = x.stats + (map * x.chunks + blockIdx.x) * 5;
    out[0] = stats.raw.low, out[1] = stats.raw.high, out[2] = stats.resized.low, out[3] = stats.resized.high;
    out[4] = stats.finite;
  }
}

template <typename A, int V>
__global__ void __launch_bounds__(kFinishThreads) finish_large(const FinishArgs<A> x) {
  const int64_t map = image_number();
  if (map >= x.maps) return;
  const int strip = int(blockIdx.x);
  Stats<A> stats = no_stats<A>();
  for (int i = threadIdx.x; i < x.chunks; i += kFinishThreads) {
    const A* p = x.stats + (map * x.chunks + i) * 5;
    merge(stats, {{p[0], p[1]}, {p[2], p[3]}, p[4] != A(0)});
  }
  stats = merge_block(stats);
  if (strip == 0 && threadIdx.x == 0) x.finite[map] = stats.finite;
  write_rows<A, V>(x, x.raw + map * x.height * x.width, x.out + map * x.out_height * x.out_width,
                   range_of(stats, x.resize), strip_row(strip, x.strips, x.out_height),
                   strip_row(strip + 1, x.strips, x.out_height));
}

}  // namespace fastcam::cuda
