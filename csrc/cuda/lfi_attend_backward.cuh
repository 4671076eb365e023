// lfi_attend_backward on CUDA devices, framework-free: raw pointers, sizes, stream.
//
//   a = sum_k grad_k F_k + grad_attention;  d = a / (max P - min P)
//   p = d + [P lowest] (sum d A - sum d) / count - [P highest] sum d A / count, + grad_raw;  0 where P <= 0
//   grad_features_k = (1 + A) grad_k + s_k p;  grad_importance_k = sum p F_k
//
// Three launches: cam_map_reduce.cuh adds the channels up, a block a map goes back through its scaling, and one pass over
// features and gradient finds both results.
#pragma once

#include "cuda/lfi_common.cuh"

namespace fastcam::cuda {

// All like the features dense in one order; maps (images, positions).
template <typename T>
struct LfiAttendBackwardArgs {
  const T* grad;
  const T* features;
  const Accumulate<T>* importance;      // (images, channels)
  const Accumulate<T>* grad_attention;  // null for none,
  const Accumulate<T>* grad_raw;        // like this
  const Accumulate<T>* attention;
  const Accumulate<T>* raw;
  T* out;
  Accumulate<T>* grad_importance;  // (images, channels)
  Accumulate<T>* map_gradient;     // scratch, a map
  LfiShape shape;
  bool keeps_constant;
};

template <typename T>
__global__ void __launch_bounds__(kLfiThreads) lfi_map_gradient(const LfiAttendBackwardArgs<T> x,
                                                                const Accumulate<T>* partials, int shares) {
  using A = Accumulate<T>;
  __shared__ A values[kLfiThreads];
  const int64_t image = image_number(), positions = x.shape.positions;
  if (image >= x.shape.images) return;  // whole blocks
  const LfiTeam team = lfi_block_team(image, positions);
  const Extremes<A> range = lfi_extremes(values, team, x.raw, positions);
  const A extent = range.high - range.low;
  const bool constant = range.low == range.high;
  A total = 0, weighted = 0, lowest = 0, highest = 0;
  for (int64_t p = team.lane; p < positions; p += team.lanes) {
    const int64_t at = team.first + p;
    A d = lfi_add_shares(partials, shares, x.shape.images * positions, at);
    if (x.grad_attention != nullptr) d += x.grad_attention[at];
    x.map_gradient[at] = d;
    total += d, weighted += d * x.attention[at];
    lowest += x.raw[at] == range.low ? A(1) : A(0), highest += x.raw[at] == range.high ? A(1) : A(0);
  }
  const LfiShares<A> found = lfi_team_shares(values, team, total, weighted, lowest, highest, extent);
  for (int64_t p = team.lane; p < positions; p += team.lanes) {
    const int64_t at = team.first + p;
    A d = x.map_gradient[at];
    if (x.attention[at] != x.attention[at]) {
      d = A(NAN);
    } else if (!constant) {
      d = lfi_through_min_max(d, x.raw[at], range.low, range.high, found.at_low, found.at_high);
    } else if (!x.keeps_constant) {
      d = A(0);
    }
    if (x.grad_raw != nullptr) d += x.grad_raw[at];
    x.map_gradient[at] = x.raw[at] <= A(0) ? A(0) : d;
  }
}

template <typename T>
__global__ void __launch_bounds__(kLfiThreads) lfi_share_out(const LfiAttendBackwardArgs<T> x) {
  using A = Accumulate<T>;
  __shared__ A values[kLfiThreads];
  const int64_t image = image_number(), positions = x.shape.positions;
  if (image >= x.shape.images) return;  // whole blocks
  const LfiTeam team = lfi_team(x.shape, image);
  const int64_t row = image * x.shape.channels + team.channel;
  A sum = 0;
  if (team.there) {
    const A s = x.importance[row];
#pragma unroll 2
    for (int64_t p = team.lane; p < positions; p += team.lanes) {
      const int64_t at = team.first + p * team.step, map = image * positions + p;
      const A d = x.map_gradient[map];
      sum += d * widen(x.features[at]);
      x.out[at] = narrow<T>((A(1) + x.attention[map]) * widen(x.grad[at]) + s * d);
    }
  }
  sum = lfi_over_team<LfiSum>(values, team, sum);
  if (team.there && team.lane == 0) x.grad_importance[row] = sum;
}

// ---- host ----

template <typename T>
LfiSumPlan<T> plan_lfi_attend_backward(const LfiAttendBackwardArgs<T>& x) {
  return plan_lfi_sum(x.features, x.grad, true, x.shape);
}

// Launches with scratch of plan.partials elements beside x.map_gradient; nothing for an empty batch.
template <typename T>
cudaError_t run_lfi_attend_backward(const LfiSumPlan<T>& plan, const LfiAttendBackwardArgs<T>& x, Accumulate<T>* partials,
                                    cudaStream_t stream) {
  if (x.shape.images == 0) return cudaSuccess;
  const cudaError_t error = run_lfi_sum(plan, partials, stream);
  if (error != cudaSuccess) return error;
  const Accumulate<T>* sums = partials;
  launch(lfi_map_gradient<T>, grid_of(1, x.shape.images), kLfiThreads, 0, stream, x, sums, plan.reduce.shares);
  launch(lfi_share_out<T>, lfi_grid(x.shape), kLfiThreads, 0, stream, x);
  return cudaGetLastError();
}

}  // namespace fastcam::cuda
