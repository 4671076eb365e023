// cam_map on CUDA devices, framework-free: raw pointers, sizes, stream.
//
// Two launches, or three for raw maps above 16 KiB: cam_map_reduce.cuh streams the features once, cam_map_finish.cuh makes
// maps of the sums. Results depend on one image's shape and values only, not on the batch; no atomics, no synchronisation.
#pragma once

#include "cuda/cam_map_finish.cuh"
#include "cuda/cam_map_reduce.cuh"

namespace fastcam::cuda {

// All tensors dense in the same order: (B,K,H,W), or (B,H,W,K) if channels_last.
template <typename T>
struct CamMapArgs {
  const T* features;
  const T* reference;   // (B|1,K,H,W), or null
  const void* weights;  // Accumulate<T> (B,T,K), or T (B,T,K,H,W) if positional
  Accumulate<T>* maps;  // (B,T,OH,OW)
  Accumulate<T>* raw;   // (B,T,H,W)
  bool* finite;         // (B,T)
  int64_t batch, targets, channels;
  int height, width, out_height, out_width;  // H*W and OH*OW below 2^31
  bool shared_reference, positional, channels_last, relu, normalize;
};

// How one call is cut, and the scratch it needs, in elements of the accumulation type.
template <typename T>
struct CamMapPlan {
  ReduceArgs<T> reduce;
  FinishArgs<Accumulate<T>> finish;
  bool vector, small;
  int64_t partials, stats;
};

template <typename T>
CamMapPlan<T> plan_cam_map(const CamMapArgs<T>& x) {
  using A = Accumulate<T>;
  const int64_t positions = int64_t(x.height) * x.width, image = x.channels * positions, maps = x.batch * x.targets;
  CamMapPlan<T> plan;
  // An image (row, in channels_last) must be whole packs, or only the first one would be aligned.
  plan.vector = (x.channels_last ? x.channels : image) % kVector<T> == 0 && aligned(x.features) && aligned(x.reference) &&
                aligned(x.weights);
  ReduceArgs<T>& reduce = plan.reduce = {};
  reduce.features = x.features, reduce.reference = x.reference, reduce.weights = x.weights;
  reduce.batch = x.batch, reduce.targets = x.targets, reduce.channels = x.channels, reduce.positions = positions;
  reduce.reference_batch = x.shared_reference ? 0 : image;
  reduce = cut(reduce, x.channels_last, x.positional, plan.vector);
  plan.partials = int64_t(reduce.shares) * maps * positions;

  plan.small = positions * int64_t(sizeof(A)) <= kSmallMap;
  FinishArgs<A>& finish = plan.finish = {};
  finish.raw = x.raw, finish.out = x.maps, finish.finite = x.finite;
  finish.maps = maps, finish.shares = reduce.shares;
  finish.height = x.height, finish.width = x.width, finish.out_height = x.out_height, finish.out_width = x.out_width;
  finish.relu = x.relu, finish.normalize = x.normalize;
  finish.resize = x.out_height != x.height || x.out_width != x.width;
  finish.chunks = int(ceil_div<int64_t>(positions, kChunk));
  plan.stats = plan.small ? 0 : maps * finish.chunks * 5;
  // Strips change who writes an output, not its value, so they may follow the batch: about 512 blocks in all, and each with
  // at least twice as many outputs as raw values to add up.
  const int64_t outputs = int64_t(x.out_height) * x.out_width;
  const int64_t most = std::max<int64_t>(1, std::min<int64_t>(x.out_height, outputs / (2 * positions)));
  finish.strips = int(plan.small ? std::clamp<int64_t>(512 / std::max<int64_t>(maps, 1), 1, most)
                                 : std::min<int64_t>(x.out_height, ceil_div<int64_t>(outputs, 4096)));
  return plan;
}

template <typename A, int V>
void launch_finish(const FinishArgs<A>& x, bool small, cudaStream_t stream) {
  if (small) {
    const int area = x.height * x.width;
    const size_t shared = sizeof(A) * std::max(area, kFinishThreads) + sizeof(int) * (x.height + x.width + 2);
    launch(finish_small<A, V>, grid_of(x.strips, x.maps), kFinishThreads, shared, stream, x);
  } else {
    launch(finish_raw<A>, grid_of(x.chunks, x.maps), kFinishThreads, 0, stream, x);
    launch(finish_large<A, V>, grid_of(x.strips, x.maps), kFinishThreads, 0, stream, x);
  }
}

// Launches with scratch of plan.partials and plan.stats elements; nothing for an empty batch.
template <typename T>
cudaError_t run_cam_map(CamMapPlan<T> plan, Accumulate<T>* partials, Accumulate<T>* stats, const CamMapArgs<T>& x,
                        cudaStream_t stream) {
  using A = Accumulate<T>;
  if (x.batch * x.targets == 0) return cudaSuccess;
  plan.reduce.partials = partials;
  plan.finish.partials = partials, plan.finish.stats = stats;
  if (plan.vector) {
    launch_reduce<T, kVector<T>>(plan.reduce, x.channels_last, x.positional, stream);
  } else {
    launch_reduce<T, 1>(plan.reduce, x.channels_last, x.positional, stream);
  }
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) return error;
  if (x.out_width % kVector<A> == 0 && aligned(x.maps)) {
    launch_finish<A, kVector<A>>(plan.finish, plan.small, stream);
  } else {
    launch_finish<A, 1>(plan.finish, plan.small, stream);
  }
  return cudaGetLastError();
}

}  // namespace fastcam::cuda
