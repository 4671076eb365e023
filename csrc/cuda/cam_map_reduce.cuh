// cam_map, first launch: M = sum_k w_k (A_k - R_k), streamed once, as partial sums over shares of the channels.
//
// NCHW: an image is one contiguous run of numbers, and a block reads it as such, in 16-byte packs, for any H*W: `merged`
// channels are taken together until their length is a multiple of a pack (4 channels of 7x7 float32 = 49 packs). A
// thread keeps its place in that period, so each of its V lanes always adds to the same position.
// channels_last: up to 32 lanes walk the channels of one position.
#pragma once

#include "cuda/common.cuh"

namespace fastcam::cuda {

constexpr int kReduceThreads = 512;  // most, where channels are merged; else 256
constexpr int kTargets = 8;          // targets that share one read of the features

template <typename T>
struct ReduceArgs {
  const T* features;
  const T* reference;    // or null
  const void* weights;   // Accumulate<T> (B,T,K), or T (B,T,K,H,W) in the features' order
  Accumulate<T>* partials;  // (shares, B*T, H*W)
  int64_t batch, targets, channels, positions;
  int64_t reference_batch;          // stride between its images: 0 for one shared reference
  int64_t share;                    // channels of a block
  int shares, tiles, target_tiles;  // blocks of an image
  int merged, packs, groups, lanes;  // NCHW: channels of a period, packs of a tile, periods at once; channels_last: lanes
};

// Which image, share, targets and tile a block works on.
struct Place {
  int64_t image, part, target, tile;
};

template <typename T>
__device__ __forceinline__ Place place_of(const ReduceArgs<T>& x, int targets) {
  int block = int(blockIdx.x);
  Place at;
  at.tile = block % x.tiles, block /= x.tiles;
  at.target = block % x.target_tiles * int64_t(targets);
  at.part = block / x.target_tiles;
  at.image = image_number();
  return at;
}

template <typename T, int V, int TT, bool POSITIONAL>
__global__ void __launch_bounds__(TT == 1 ? kReduceThreads : 256) reduce_channels_first(const ReduceArgs<T> x) {
  using A = Accumulate<T>;
  // Loads in flight; with many or wide sums a thread, registers are what is short.
  constexpr int UNROLL = TT > 1 ? 1 : sizeof(T) == 8 ? 2 : 4;
  A* values = dynamic_shared<A>();
  const Place at = place_of(x, TT);
  if (at.image >= x.batch) return;
  const int64_t k0 = at.part * x.share, image = x.channels * x.positions;
  const int64_t length = (min(k0 + x.share, x.channels) - k0) * x.positions;
  const int group = threadIdx.x / x.packs, pack = threadIdx.x % x.packs;
  const int64_t place = (at.tile * x.packs + pack) * V;  // within a period
  const int64_t period = x.merged * x.positions, step = x.groups * period;
  const bool active = group < x.groups && place < period;

  const T* features = x.features + at.image * image + k0 * x.positions;
  const T* reference = x.reference ? x.reference + at.image * x.reference_batch + k0 * x.positions : nullptr;
  A total[TT][V] = {};
  if (active) {
    const T* multipliers = static_cast<const T*>(x.weights) + (at.image * x.targets + at.target) * image + k0 * x.positions;
    const A* coefficients = static_cast<const A*>(x.weights) + at.image * x.targets * x.channels + k0 + group * x.merged;
    int channel[V];  // of lane j within the period
#pragma unroll
    for (int j = 0; j < V; ++j) channel[j] = TT > 1 || x.merged == 1 ? 0 : int(place + j) / int(x.positions);
#pragma unroll UNROLL
    for (int64_t e = group * period + place; e < length; e += step) {
      A d[V];
      difference<V>(features, reference, e, d);
      if constexpr (POSITIONAL) {
        const Pack<T, V> w = load<V>(multipliers + e);
#pragma unroll
        for (int j = 0; j < V; ++j) total[0][j] += widen(w.v[j]) * d[j];
      } else {
#pragma unroll
        for (int t = 0; t < TT; ++t) {
          // Targets past the last one repeat it; their sums are not stored.
          const A* w = coefficients + min(at.target + t, x.targets - 1) * x.channels;
          if (TT > 1 || x.merged == 1) {
            const A one = w[0];
#pragma unroll
            for (int j = 0; j < V; ++j) total[t][j] += one * d[j];
          } else {
#pragma unroll
            for (int j = 0; j < V; ++j) total[t][j] += w[channel[j]] * d[j];
          }
        }
        coefficients += x.groups * x.merged;
      }
    }
  }

  // Every thread of a group holds places of one period: rows of shared memory are whole channels, or, unmerged, groups.
  const int width = x.merged == 1 ? x.packs * V : int(x.positions);
  const int64_t first = x.merged == 1 ? at.tile * x.packs * V : 0;
#pragma unroll
  for (int t = 0; t < TT; ++t) {
    if (at.target + t >= x.targets) break;
    if (group < x.groups) {
#pragma unroll
      for (int j = 0; j < V; ++j) values[threadIdx.x * V + j] = total[t][j];
    }
    add_rows(values, x.groups * x.merged, width);
    A* out = x.partials + ((at.part * x.batch + at.image) * x.targets + at.target + t) * x.positions;
    for (int i = threadIdx.x; i < width && first + i < x.positions; i += blockDim.x) out[first + i] = values[i];
    __syncthreads();
  }
}

template <typename T, int V, int TT, bool POSITIONAL>
__global__ void __launch_bounds__(256) reduce_channels_last(const ReduceArgs<T> x) {
  using A = Accumulate<T>;
  constexpr int UNROLL = TT == 1 ? 4 : 1;
  const Place at = place_of(x, TT);
  if (at.image >= x.batch) return;
  const int64_t k0 = at.part * x.share, k1 = min(k0 + x.share, x.channels), image = x.channels * x.positions;
  const int64_t position = at.tile * (blockDim.x / x.lanes) + threadIdx.x / x.lanes;
  // Lanes without a position repeat the last one, since shuffles need the whole warp; they store nothing.
  const int64_t row = min(position, x.positions - 1) * x.channels;

  const T* features = x.features + at.image * image + row;
  const T* reference = x.reference ? x.reference + at.image * x.reference_batch + row : nullptr;
  const T* multipliers = static_cast<const T*>(x.weights) + (at.image * x.targets + at.target) * image + row;
  const A* coefficients = static_cast<const A*>(x.weights) + at.image * x.targets * x.channels;
  A total[TT][V] = {};
#pragma unroll UNROLL
  for (int64_t k = k0 + threadIdx.x % x.lanes * V; k < k1; k += x.lanes * V) {
    A d[V];
    difference<V>(features, reference, k, d);
    if constexpr (POSITIONAL) {
      const Pack<T, V> w = load<V>(multipliers + k);
#pragma unroll
      for (int j = 0; j < V; ++j) total[0][j] += widen(w.v[j]) * d[j];
    } else {
#pragma unroll
      for (int t = 0; t < TT; ++t) {
        const Pack<A, V> w = load<V>(coefficients + min(at.target + t, x.targets - 1) * x.channels + k);
#pragma unroll
        for (int j = 0; j < V; ++j) total[t][j] += w.v[j] * d[j];
      }
    }
  }
#pragma unroll
  for (int t = 0; t < TT; ++t) {
    A sum = total[t][0];
#pragma unroll
    for (int j = 1; j < V; ++j) sum += total[t][j];
    sum = add_lanes(sum, x.lanes);
    if (threadIdx.x % x.lanes == 0 && position < x.positions && at.target + t < x.targets) {
      x.partials[((at.part * x.batch + at.image) * x.targets + at.target + t) * x.positions + position] = sum;
    }
  }
}

// ---- host: how an image is cut, from its own shape alone, so that a map is bit-equal in any batch ----

constexpr int64_t kShareElements = 4096;  // a block's stream: long enough to hide its start, short enough to fill a device
constexpr int64_t kShareChannels = 512;   // the same in channels_last, a row of one position
constexpr int64_t kCombined = 16384;      // values the second launch adds for one map

inline int greatest_divisor(int64_t a, int64_t b) { return int(b == 0 ? a : greatest_divisor(b, a % b)); }

// Fills in the cut; `vector`: packs of 16 bytes are aligned in every tensor.
template <typename T>
ReduceArgs<T> cut(ReduceArgs<T> x, bool channels_last, bool positional, bool& vector) {
  const int64_t most_shares = std::clamp<int64_t>(kCombined / x.positions, 1, 64);
  const int64_t least_share = ceil_div(x.channels, most_shares);
  if (channels_last) {
    const int64_t v = vector ? kVector<T> : 1;
    x.share = ceil_div<int64_t>(std::max(kShareChannels, least_share), 8) * 8;
    x.lanes = 1;
    while (x.lanes < 32 && x.lanes * v < std::min(x.share, x.channels)) x.lanes *= 2;
    x.merged = x.packs = x.groups = 1;
    x.tiles = int(ceil_div<int64_t>(x.positions, 256 / x.lanes));
  } else {
    int64_t v = vector ? kVector<T> : 1;
    x.merged = int(v / greatest_divisor(x.positions, v));
    // Channels can be merged only where one block holds a whole period; and for several targets a coefficient per target
    // and lane would cost more than narrow loads do.
    const bool fits = x.merged * x.positions / v <= kReduceThreads && (x.targets == 1 || positional);
    if (x.merged > 1 && !fits) vector = false, v = 1, x.merged = 1;
    const int64_t packs = x.merged * x.positions / v;
    x.tiles = x.merged > 1 ? 1 : int(ceil_div<int64_t>(packs, 64));
    x.packs = int(ceil_div<int64_t>(packs, x.tiles));
    x.groups = std::max(1, 256 / x.packs);
    const int64_t quantum = int64_t(x.groups) * x.merged;
    const int64_t wanted = ceil_div(kShareElements, std::min<int64_t>(x.positions, x.packs * v));
    x.share = ceil_div(std::max(wanted, least_share), quantum) * quantum;
    x.lanes = 1;
  }
  x.shares = int(ceil_div(x.channels, x.share));
  x.target_tiles = int(positional || x.targets == 1 ? x.targets : ceil_div<int64_t>(x.targets, kTargets));
  return x;
}

template <typename T, int V, int TT, bool POSITIONAL>
void launch_reduce(const ReduceArgs<T>& x, bool channels_last, cudaStream_t stream) {
  const dim3 grid = grid_of(int64_t(x.shares) * x.target_tiles * x.tiles, x.batch);
  if (channels_last) {
    launch(reduce_channels_last<T, V, TT, POSITIONAL>, grid, 256, 0, stream, x);
  } else {
    const int threads = ceil_div(x.packs * x.groups, 32) * 32;
    const size_t shared = sizeof(Accumulate<T>) * x.packs * x.groups * V;
    launch(reduce_channels_first<T, V, TT, POSITIONAL>, grid, threads, shared, stream, x);
  }
}

template <typename T, int V>
void launch_reduce(const ReduceArgs<T>& x, bool channels_last, bool positional, cudaStream_t stream) {
  if (positional) return launch_reduce<T, V, 1, true>(x, channels_last, stream);
  if (x.targets == 1) return launch_reduce<T, V, 1, false>(x, channels_last, stream);
  launch_reduce<T, V, kTargets, false>(x, channels_last, stream);
}

}  // namespace fastcam::cuda
