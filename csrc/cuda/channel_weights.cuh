// channel_weights on CUDA devices, framework-free: raw pointers, sizes, stream.
//
//   A = features - reference, S_k = sum_ij A_k, Z = H*W
//   mean: sum G / Z        sum: sum G*A        xgrad: sum G*A / S_k        grad_cam_pp: sum relu(G) / (2 + S_k*G)
//
// NCHW up to 256 positions: a block moves some whole channels, one run of numbers, in 16-byte packs to shared memory and a few
// lanes sum each channel there, so odd H*W cost nothing. NCHW above: a warp walks one channel. channels_last: a thread walks
// the positions of one pack of channels. Images beyond a chunk of positions are summed per chunk, then `finish_chunks` adds the
// chunks in order. Chunks depend on one image's shape only, so results are bit-equal in any batch; no atomics, no
// synchronisation.
#pragma once

#include "cuda/common.cuh"

namespace fastcam::cuda {

enum class Mode : int { mean, sum, xgrad, grad_cam_pp, shift };  // shift: S_k itself

constexpr int kWeightThreads = 256;
constexpr int kStagedPositions = 256;  // NCHW images up to here go through shared memory
constexpr int kStagedElements = 2048;  // of a block, for each of its two tensors
constexpr int kPackLanes = 16;         // channels_last: packs a block reads side by side, 256 bytes
constexpr int kRowWarps = 4;           // NCHW above: warps of a block; small blocks reach more multiprocessors
constexpr int kChunkRows = 4096;       // NCHW: positions of a chunk
constexpr int kChunkPixels = 256;      // channels_last: positions of a chunk

template <typename T>
struct WeightArgs {
  const T* features;
  const T* reference;    // (B|1,K,H,W), or null
  const T* multipliers;  // (B,T,K,H,W), in the features' order
  const Accumulate<T>* shifts;  // (B,K), for grad_cam_pp in chunks
  Accumulate<T>* out;           // (B,T,K), or in chunks (3,chunks,B*T,K)
  int64_t maps, targets, channels, positions;
  int64_t reference_batch;  // stride between its images: 0 for one shared reference
  int chunk, chunks;        // positions
  int rows;                 // NCHW, staged: channels of a block
  Mode mode;
};

template <typename A>
struct Sums {
  A main = 0, shift = 0, magnitude = 0;
};

// Adds one position. `shift` is S_k and used by grad_cam_pp alone.
template <typename A>
__device__ __forceinline__ void add(Sums<A>& sums, Mode mode, A g, A a, A shift) {
  switch (mode) {
    case Mode::mean: sums.main += g; break;
    case Mode::sum: sums.main += g * a; break;
    case Mode::xgrad: sums.main += g * a, sums.shift += a, sums.magnitude += a < A(0) ? -a : a; break;
    case Mode::grad_cam_pp: sums.main += grad_cam_pp_term(shift, g); break;
    case Mode::shift: sums.main += a; break;
  }
}

__device__ __forceinline__ bool reads_multipliers(Mode mode) { return mode != Mode::shift; }
__device__ __forceinline__ bool reads_features(Mode mode) { return mode != Mode::mean && mode != Mode::grad_cam_pp; }

template <typename A>
__device__ __forceinline__ A coefficient(const Sums<A>& sums, Mode mode, int64_t positions) {
  if (mode == Mode::mean) return sums.main / A(positions);
  if (mode == Mode::xgrad) return xgrad_coefficient(sums.main, sums.shift, sums.magnitude);
  return sums.main;
}

// The finished coefficient of channel k, or the chunk's sums.
template <typename T>
__device__ __forceinline__ void store(const WeightArgs<T>& x, const Sums<Accumulate<T>>& sums, int64_t map, int64_t k,
                                      int64_t chunk) {
  const int64_t rows = x.maps * x.channels, row = map * x.channels + k;
  if (x.chunks == 1) {
    x.out[row] = coefficient(sums, x.mode, x.positions);
    return;
  }
  x.out[chunk * rows + row] = sums.main;
  if (x.mode != Mode::xgrad) return;
  x.out[(x.chunks + chunk) * rows + row] = sums.shift;
  x.out[(2 * x.chunks + chunk) * rows + row] = sums.magnitude;
}

template <typename A>
__device__ __forceinline__ Sums<A> add_lanes(Sums<A> sums, Mode mode, int lanes) {
  sums.main = add_lanes(sums.main, lanes);
  if (mode == Mode::xgrad) sums.shift = add_lanes(sums.shift, lanes), sums.magnitude = add_lanes(sums.magnitude, lanes);
  return sums;
}

// V multipliers and differences from memory; zeros for what is not asked for.
template <int V, typename T>
__device__ __forceinline__ void values_at(const WeightArgs<T>& x, const T* features, const T* reference,
                                          const T* multipliers, int64_t at, bool with_features, bool with_multipliers,
                                          Accumulate<T> (&g)[V], Accumulate<T> (&a)[V]) {
#pragma unroll
  for (int j = 0; j < V; ++j) g[j] = a[j] = 0;
  if (with_multipliers) {
    const Pack<T, V> m = load<V>(multipliers + at);
#pragma unroll
    for (int j = 0; j < V; ++j) g[j] = widen(m.v[j]);
  }
  if (with_features) difference<V>(features, reference, at, a);
}

template <typename T, int V>
__global__ void __launch_bounds__(kWeightThreads) weigh_staged(const WeightArgs<T> x) {
  using A = Accumulate<T>;
  const int64_t map = image_number();
  if (map >= x.maps) return;
  const int positions = int(x.positions);
  const int64_t k0 = int64_t(blockIdx.x) * x.rows, image = x.channels * x.positions;
  const int rows = int(min(int64_t(x.rows), x.channels - k0)), length = rows * positions;
  A* staged_g = dynamic_shared<A>();
  A* staged_a = staged_g + x.rows * positions;
  const T* features = x.features + map / x.targets * image + k0 * positions;
  const T* reference = x.reference ? x.reference + map / x.targets * x.reference_batch + k0 * positions : nullptr;
  const T* multipliers = x.multipliers + map * image + k0 * positions;
  const bool two_passes = x.mode == Mode::grad_cam_pp;
#pragma unroll 2
  for (int e = threadIdx.x * V; e < length; e += kWeightThreads * V) {
    A g[V], a[V];
    values_at<V>(x, features, reference, multipliers, e, reads_features(x.mode) || two_passes, reads_multipliers(x.mode), g, a);
#pragma unroll
    for (int j = 0; j < V; ++j) staged_g[e + j] = g[j], staged_a[e + j] = a[j];
  }
  __syncthreads();
  int lanes = 32;
  while (lanes > 1 && lanes * x.rows > kWeightThreads) lanes /= 2;
  const int lane = threadIdx.x % lanes;
  // All threads take part in the shuffles: rows beyond the last one sum nothing.
  for (int first = 0; first < rows; first += kWeightThreads / lanes) {
    const int row = first + threadIdx.x / lanes;
    const int begin = row * positions + lane, end = row < rows ? (row + 1) * positions : 0;
    A shift = 0;
    if (two_passes) {
      for (int e = begin; e < end; e += lanes) shift += staged_a[e];
      shift = add_lanes(shift, lanes);
    }
    Sums<A> sums;
    for (int e = begin; e < end; e += lanes) add(sums, x.mode, staged_g[e], staged_a[e], shift);
    sums = add_lanes(sums, x.mode, lanes);
    if (lane == 0 && row < rows) store(x, sums, map, k0 + row, 0);
  }
}

// Sum over `count` positions of one channel, by one warp.
template <typename T, int V>
__device__ __forceinline__ Sums<Accumulate<T>> walk(const WeightArgs<T>& x, Mode mode, const T* features,
                                                    const T* reference, const T* multipliers, int count,
                                                    Accumulate<T> shift) {
  using A = Accumulate<T>;
  Sums<A> sums;
#pragma unroll 4
  for (int e = threadIdx.x % 32 * V; e < count; e += 32 * V) {
    A g[V], a[V];
    values_at<V>(x, features, reference, multipliers, e, reads_features(mode), reads_multipliers(mode), g, a);
#pragma unroll
    for (int j = 0; j < V; ++j) add(sums, mode, g[j], a[j], shift);
  }
  return add_lanes(sums, mode, 32);
}

template <typename T, int V>
__global__ void __launch_bounds__(kRowWarps * 32) weigh_rows(const WeightArgs<T> x) {
  using A = Accumulate<T>;
  const int64_t map = image_number();
  const int64_t row = int64_t(blockIdx.x) * kRowWarps + threadIdx.x / 32;  // a channel's chunk
  if (map >= x.maps || row >= x.channels * x.chunks) return;                       // whole warps
  const int64_t k = unsigned(row) / unsigned(x.chunks);
  const int part = int(unsigned(row) % unsigned(x.chunks));
  const int64_t image = map / x.targets, start = int64_t(part) * x.chunk;
  const int count = int(min(int64_t(x.chunk), x.positions - start));
  const int64_t at = k * x.positions + start, size = x.channels * x.positions;
  const T* features = x.features + image * size + at;
  const T* reference = x.reference ? x.reference + image * x.reference_batch + at : nullptr;
  const T* multipliers = x.multipliers + map * size + at;
  A shift = 0;
  if (x.mode == Mode::grad_cam_pp) {
    shift = x.chunks == 1 ? walk<T, V>(x, Mode::shift, features, reference, multipliers, count, A(0)).main
                          : x.shifts[image * x.channels + k];
  }
  const Sums<A> sums = walk<T, V>(x, x.mode, features, reference, multipliers, count, shift);
  if (threadIdx.x % 32 == 0) store(x, sums, map, k, part);
}

// Sums of V channels over the positions of this thread's row, then over the block's rows; row 0 has the result.
template <typename T, int V>
__device__ __forceinline__ void walk_pixels(const WeightArgs<T>& x, Mode mode, const T* features, const T* reference,
                                            const T* multipliers, int count, bool active,
                                            const Accumulate<T> (&shift)[V], Accumulate<T>* values,
                                            Sums<Accumulate<T>> (&sums)[V]) {
  using A = Accumulate<T>;
  constexpr int kRows = kWeightThreads / kPackLanes, kWidth = kPackLanes * V;
#pragma unroll
  for (int j = 0; j < V; ++j) sums[j] = {};
  if (active) {
#pragma unroll 2
    for (int p = threadIdx.x / kPackLanes; p < count; p += kRows) {
      A g[V], a[V];
      values_at<V>(x, features, reference, multipliers, p * x.channels, reads_features(mode), reads_multipliers(mode), g, a);
#pragma unroll
      for (int j = 0; j < V; ++j) add(sums[j], mode, g[j], a[j], shift[j]);
    }
  }
  const int column = threadIdx.x % kPackLanes * V;
  const auto over_rows = [&](A Sums<A>::*sum) {
    __syncthreads();
#pragma unroll
    for (int j = 0; j < V; ++j) values[threadIdx.x * V + j] = sums[j].*sum;
    add_rows(values, kRows, kWidth);
#pragma unroll
    for (int j = 0; j < V; ++j) sums[j].*sum = values[column + j];
  };
  over_rows(&Sums<A>::main);
  if (mode == Mode::xgrad) over_rows(&Sums<A>::shift), over_rows(&Sums<A>::magnitude);
}

template <typename T, int V>
__global__ void __launch_bounds__(kWeightThreads) weigh_pixels(const WeightArgs<T> x) {
  using A = Accumulate<T>;
  __shared__ A values[kWeightThreads * V];
  const int64_t map = image_number();
  if (map >= x.maps) return;
  const int part = int(blockIdx.x) % x.chunks;
  const int64_t k = (int64_t(int(blockIdx.x) / x.chunks) * kPackLanes + threadIdx.x % kPackLanes) * V;
  const bool active = k < x.channels;
  const int64_t image = map / x.targets, start = int64_t(part) * x.chunk, size = x.channels * x.positions;
  const int count = int(min(int64_t(x.chunk), x.positions - start));
  const int64_t at = start * x.channels + k;
  const T* features = x.features + image * size + at;
  const T* reference = x.reference ? x.reference + image * x.reference_batch + at : nullptr;
  const T* multipliers = x.multipliers + map * size + at;
  A shift[V] = {};
  Sums<A> sums[V];
  if (x.mode == Mode::grad_cam_pp) {
    if (x.chunks == 1) {
      walk_pixels<T, V>(x, Mode::shift, features, reference, multipliers, count, active, shift, values, sums);
#pragma unroll
      for (int j = 0; j < V; ++j) shift[j] = sums[j].main;
    } else if (active) {
#pragma unroll
      for (int j = 0; j < V; ++j) shift[j] = x.shifts[image * x.channels + k + j];
    }
  }
  walk_pixels<T, V>(x, x.mode, features, reference, multipliers, count, active, shift, values, sums);
  if (threadIdx.x >= kPackLanes || !active) return;
#pragma unroll
  for (int j = 0; j < V; ++j) store(x, sums[j], map, k + j, part);
}

template <typename A>
__global__ void __launch_bounds__(kWeightThreads) finish_chunks(const A* partials, A* out, int64_t rows, int chunks,
                                                                int64_t positions, Mode mode) {
  const int64_t row = int64_t(blockIdx.x) * kWeightThreads + threadIdx.x;
  if (row >= rows) return;
  Sums<double> sums;  // nearly equal floats would round the same way at every addition
#pragma unroll 4
  for (int part = 0; part < chunks; ++part) {
    sums.main += partials[part * rows + row];
    if (mode != Mode::xgrad) continue;
    sums.shift += partials[(chunks + part) * rows + row];
    sums.magnitude += partials[(2 * chunks + part) * rows + row];
  }
  out[row] = A(coefficient(sums, mode, positions));
}

// ---- host ----

template <typename T>
struct WeightPlan {
  WeightArgs<T> args;
  bool channels_last, vector;
  int64_t scratch;  // elements of the accumulation type
};

// `x` without chunk, chunks, rows and shifts: all tensors dense in the same order.
template <typename T>
WeightPlan<T> plan_channel_weights(WeightArgs<T> x, bool channels_last) {
  const int64_t limit = channels_last ? kChunkPixels : kChunkRows;
  x.chunk = int(std::min(x.positions, limit)), x.chunks = int(ceil_div<int64_t>(x.positions, x.chunk));
  // Whole blocks of 8 channels keep every block's first pack aligned, whatever H*W is.
  x.rows = int(std::max<int64_t>(1, kStagedElements / x.positions / 8) * 8);
  const bool staged = !channels_last && x.positions <= kStagedPositions;
  const int64_t run = channels_last ? x.channels : staged ? x.channels * x.positions : x.positions;
  const bool vector = run % kVector<T> == 0 && aligned(x.features) && aligned(x.reference) && aligned(x.multipliers);
  const int64_t sums = x.mode == Mode::xgrad ? 3 : 1, images = x.maps / x.targets;
  int64_t scratch = x.chunks == 1 ? 0 : sums * x.chunks * x.maps * x.channels;
  // Grad-CAM++ in chunks: room for S_k, whose own chunk sums (an image's, not a target's) fit where the sums go later.
  if (x.chunks > 1 && x.mode == Mode::grad_cam_pp) scratch += images * x.channels;
  return {x, channels_last, vector, scratch};
}

template <typename T, int V>
void launch_weigh(const WeightArgs<T>& x, bool channels_last, cudaStream_t stream) {
  if (channels_last) {
    const int64_t tiles = ceil_div<int64_t>(x.channels, kPackLanes * V);
    launch(weigh_pixels<T, V>, grid_of(tiles * x.chunks, x.maps), kWeightThreads, 0, stream, x);
  } else if (x.positions <= kStagedPositions) {
    const size_t shared = 2 * sizeof(Accumulate<T>) * x.rows * x.positions;
    const int64_t blocks = ceil_div<int64_t>(x.channels, x.rows);
    launch(weigh_staged<T, V>, grid_of(blocks, x.maps), kWeightThreads, shared, stream, x);
  } else {
    const int64_t blocks = ceil_div<int64_t>(x.channels * x.chunks, kRowWarps);
    launch(weigh_rows<T, V>, grid_of(blocks, x.maps), kRowWarps * 32, 0, stream, x);
  }
}

template <typename T>
cudaError_t weigh(const WeightPlan<T>& plan, WeightArgs<T> x, Accumulate<T>* out, Accumulate<T>* scratch,
                  cudaStream_t stream) {
  x.out = x.chunks == 1 ? out : scratch;
  plan.vector ? launch_weigh<T, kVector<T>>(x, plan.channels_last, stream) : launch_weigh<T, 1>(x, plan.channels_last, stream);
  if (x.chunks > 1) {
    const int64_t rows = x.maps * x.channels;
    const Accumulate<T>* partials = scratch;
    launch(finish_chunks<Accumulate<T>>, grid_of(ceil_div<int64_t>(rows, kWeightThreads), 1), kWeightThreads, 0, stream,
           partials, out, rows, x.chunks, x.positions, x.mode);
  }
  return cudaGetLastError();
}

// Launches with scratch of plan.scratch elements; nothing for an empty batch.
template <typename T>
cudaError_t run_channel_weights(const WeightPlan<T>& plan, Accumulate<T>* scratch, cudaStream_t stream) {
  WeightArgs<T> x = plan.args;
  if (x.maps == 0) return cudaSuccess;
  Accumulate<T>* out = x.out;
  if (x.chunks > 1 && x.mode == Mode::grad_cam_pp) {
    WeightArgs<T> shift = x;
    shift.mode = Mode::shift, shift.maps = x.maps / x.targets, shift.targets = 1;
    Accumulate<T>* shifts = scratch + x.chunks * x.maps * x.channels;
    const cudaError_t error = weigh(plan, shift, shifts, scratch, stream);
    if (error != cudaSuccess) return error;
    x.shifts = shifts;
  }
  return weigh(plan, x, out, scratch, stream);
}

}  // namespace fastcam::cuda
