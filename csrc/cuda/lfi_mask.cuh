// lfi_mask on CUDA devices, framework-free: raw pointers, sizes, stream.
//
//   N = (F - min F) / (max F - min F), 1 in a constant channel, 0 where F is 0;  masks = N grey
//
// One launch: a team finds the extremes of its channel and reads it again, from the cache, to write the masks.
#pragma once

#include "cuda/lfi_common.cuh"

namespace fastcam::cuda {

// All like the features dense in one order.
template <typename T>
struct LfiMaskArgs {
  const T* features;
  const Accumulate<T>* grey;  // (images, positions)
  T* out;
  LfiShape shape;
};

template <typename T>
__global__ void __launch_bounds__(kLfiThreads) lfi_mask_channels(const LfiMaskArgs<T> x) {
  using A = Accumulate<T>;
  __shared__ A values[kLfiThreads];
  const int64_t image = image_number(), positions = x.shape.positions;
  if (image >= x.shape.images) return;  // whole blocks
  const LfiTeam team = lfi_team(x.shape, image);
  const Extremes<A> range = lfi_extremes(values, team, x.features, positions);
  if (!team.there) return;
#pragma unroll 2
  for (int64_t p = team.lane; p < positions; p += team.lanes) {
    const int64_t at = team.first + p * team.step;
    x.out[at] = narrow<T>(lfi_normalized(A(widen(x.features[at])), range.low, range.high) * x.grey[image * positions + p]);
  }
}

// ---- host ----

template <typename T>
cudaError_t run_lfi_mask(const LfiMaskArgs<T>& x, cudaStream_t stream) {
  if (x.shape.images == 0) return cudaSuccess;
  launch(lfi_mask_channels<T>, lfi_grid(x.shape), kLfiThreads, 0, stream, x);
  return cudaGetLastError();
}

}  // namespace fastcam::cuda
