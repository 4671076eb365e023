// perturb_by_rank on CUDA devices, framework-free: raw pointers, sizes, stream.
//
// One launch. A thread takes one pack of neighbouring elements of an image, in the order they lie in memory, and writes it for
// up to kSteps steps, so that images, baseline and ranks are read once for so many results. Elements are words of 2, 4 or 8
// bytes: nothing is computed with them, and NaN keeps its bits.
#pragma once

#include "cuda/common.cuh"

namespace fastcam::cuda {

constexpr int kPerturbThreads = 256;
constexpr unsigned kSteps = 8;  // enough to hide the reads, few enough to fill a GPU with one image

template <typename E, typename R>
struct PerturbArgs {
  const E* images;        // (batch,C,H,W), or (batch,H,W,C) if channels_last
  const E* baseline;      // the same, or (batch,C) if plain
  const R* ranks;         // (batch,H*W)
  const int64_t* counts;  // (steps)
  E* out;                 // (batch,steps) images in the order of `images`
  int64_t batch, steps;
  int64_t baseline_image;     // elements from one baseline to the next, 0 where all images share one
  unsigned channels, pixels;  // channels * pixels below 2^31
  bool plain, channels_last, keep;
};

template <typename E, typename R, int V>
__global__ void __launch_bounds__(kPerturbThreads) perturb_images(const PerturbArgs<E, R> x, unsigned groups) {
  const int64_t number = image_number();
  if (number >= x.batch * groups) return;
  const int64_t image = unsigned(number) / groups, first = int64_t(unsigned(number) % groups) * kSteps;
  const unsigned size = x.channels * x.pixels, at = (blockIdx.x * kPerturbThreads + threadIdx.x) * V;
  if (at >= size) return;
  const R* ranks = x.ranks + image * x.pixels;
  const E* baseline = x.baseline + image * x.baseline_image;
  const Pack<E, V> value = load<V>(x.images + image * size + at);
  Pack<E, V> base;
  R rank[V];
  if (!x.plain) base = load<V>(baseline + at);
  if (x.channels_last) {
    unsigned pixel = at / x.channels, channel = at % x.channels;
#pragma unroll
    for (int j = 0; j < V; ++j) {
      rank[j] = ranks[pixel];
      if (x.plain) base.v[j] = baseline[channel];
      if (++channel == x.channels) ++pixel, channel = 0;
    }
  } else {
    const unsigned channel = at / x.pixels;
    const Pack<R, V> own = load<V>(ranks + at % x.pixels);
#pragma unroll
    for (int j = 0; j < V; ++j) {
      rank[j] = own.v[j];
      if (x.plain) base.v[j] = baseline[channel];
    }
  }
  const int64_t last = min(first + int64_t(kSteps), x.steps);
  E* out = x.out + (image * x.steps + first) * size + at;
  for (int64_t step = first; step < last; ++step, out += size) {
    const int64_t count = x.counts[step];
    Pack<E, V> chosen;
#pragma unroll
    for (int j = 0; j < V; ++j) chosen.v[j] = (rank[j] < count) != x.keep ? base.v[j] : value.v[j];
    store<V>(out, chosen);
  }
}

// ---- host ----

template <typename E, typename R, int V>
void launch_perturb(const PerturbArgs<E, R>& x, cudaStream_t stream) {
  const int64_t groups = ceil_div<int64_t>(x.steps, kSteps), packs = int64_t(x.channels) * x.pixels / V;
  const dim3 grid = grid_of(ceil_div<int64_t>(packs, kPerturbThreads), x.batch * groups);
  launch(perturb_images<E, R, V>, grid, kPerturbThreads, 0, stream, x, unsigned(groups));
}

// Nothing for an empty result, which must not overlap the images.
template <typename E, typename R>
cudaError_t run_perturb_by_rank(const PerturbArgs<E, R>& x, cudaStream_t stream) {
  if (x.batch * x.steps == 0) return cudaSuccess;
  // A pack must lie within an image, in NCHW within a channel, and begin where packs may.
  const unsigned row = x.channels_last ? x.channels * x.pixels : x.pixels;
  bool vector = row % kVector<E> == 0 && aligned(x.images) && aligned(x.out) && aligned(x.ranks);
  vector = vector && (x.plain || aligned(x.baseline));
  vector ? launch_perturb<E, R, kVector<E>>(x, stream) : launch_perturb<E, R, 1>(x, stream);
  return cudaGetLastError();
}

}  // namespace fastcam::cuda
