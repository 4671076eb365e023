// lfi_mask_backward on CUDA devices, framework-free: raw pointers, sizes, stream.
//
//   d = grad grey / (max F - min F), 0 where F is 0;  N = (F - min F) / (max F - min F)
//   out = d + [F lowest] (sum d N - sum d) / count - [F highest] sum d N / count;  0 in a constant channel
//
// One launch: a team finds the extremes and the sums of its channel and reads it again, from the cache, to write.
#pragma once

#include "cuda/lfi_common.cuh"

namespace fastcam::cuda {

// All like the features dense in one order.
template <typename T>
struct LfiMaskBackwardArgs {
  const T* grad;
  const T* features;
  const Accumulate<T>* grey;  // (images, positions)
  T* out;
  LfiShape shape;
};

template <typename T>
__global__ void __launch_bounds__(kLfiThreads) lfi_mask_gradient(const LfiMaskBackwardArgs<T> x) {
  using A = Accumulate<T>;
  __shared__ A values[kLfiThreads];
  const int64_t image = image_number(), positions = x.shape.positions;
  if (image >= x.shape.images) return;  // whole blocks
  const LfiTeam team = lfi_team(x.shape, image);
  const A* grey = x.grey + image * positions;
  const Extremes<A> range = lfi_extremes(values, team, x.features, positions);
  const A extent = range.high - range.low;
  A total = 0, weighted = 0, lowest = 0, highest = 0;
  if (team.there) {
#pragma unroll 2
    for (int64_t p = team.lane; p < positions; p += team.lanes) {
      const int64_t at = team.first + p * team.step;
      const A f = widen(x.features[at]), d = lfi_passed(A(widen(x.grad[at])), grey[p], f);
      total += d, weighted += d * ((f - range.low) / extent);
      lowest += f == range.low ? A(1) : A(0), highest += f == range.high ? A(1) : A(0);
    }
  }
  const LfiShares<A> shares = lfi_team_shares(values, team, total, weighted, lowest, highest, extent);
  if (!team.there) return;
  const bool constant = range.low == range.high;
#pragma unroll 2
  for (int64_t p = team.lane; p < positions; p += team.lanes) {
    const int64_t at = team.first + p * team.step;
    const A f = widen(x.features[at]), d = lfi_passed(A(widen(x.grad[at])), grey[p], f);
    const A found = lfi_through_min_max(d, f, range.low, range.high, shares.at_low, shares.at_high);
    x.out[at] = narrow<T>(constant ? A(0) : found);
  }
}

// ---- host ----

template <typename T>
cudaError_t run_lfi_mask_backward(const LfiMaskBackwardArgs<T>& x, cudaStream_t stream) {
  if (x.shape.images == 0) return cudaSuccess;
  launch(lfi_mask_gradient<T>, lfi_grid(x.shape), kLfiThreads, 0, stream, x);
  return cudaGetLastError();
}

}  // namespace fastcam::cuda
