// lfi_attend on CUDA devices, framework-free: raw pointers, sizes, stream.
//
//   P = max(sum_k s_k F_k, 0);  A = (P - min P) / (max P - min P), NaN if P is not finite;  attended = (1 + A) F
//
// Three launches: cam_map_reduce.cuh adds the channels up, a block a map adds its shares and scales it, and one pass over
// the features multiplies.
#pragma once

#include "cuda/lfi_common.cuh"

namespace fastcam::cuda {

// All like the features dense in one order; maps (images, positions).
template <typename T>
struct LfiAttendArgs {
  const T* features;
  const Accumulate<T>* importance;  // (images, channels)
  T* out;
  Accumulate<T>* attention;
  Accumulate<T>* raw;
  LfiShape shape;
  bool keeps_constant;
};

template <typename A>
__global__ void __launch_bounds__(kLfiThreads) lfi_scale_map(const A* partials, int shares, A* raw, A* attention,
                                                             int64_t images, int64_t positions, bool keeps_constant) {
  __shared__ A values[kLfiThreads];
  const int64_t image = image_number();
  if (image >= images) return;  // whole blocks
  const LfiTeam team = lfi_block_team(image, positions);
  for (int64_t p = team.lane; p < positions; p += team.lanes) {
    raw[team.first + p] = relu(lfi_add_shares(partials, shares, images * positions, team.first + p));
  }
  __syncthreads();
  const Extremes<A> range = lfi_extremes(values, team, static_cast<const A*>(raw), positions);
  const A extent = range.high - range.low;
  for (int64_t p = team.lane; p < positions; p += team.lanes) {
    const A value = raw[team.first + p];
    const A scaled = extent == A(0) ? (keeps_constant ? value : A(0)) : (value - range.low) / extent;
    attention[team.first + p] = is_finite(extent) ? scaled : A(NAN);
  }
}

template <typename T>
__global__ void __launch_bounds__(kLfiThreads) lfi_raise(const LfiAttendArgs<T> x) {
  using A = Accumulate<T>;
  const int64_t image = image_number(), positions = x.shape.positions;
  if (image >= x.shape.images) return;
  const LfiTeam team = lfi_team(x.shape, image);
  if (!team.there) return;
#pragma unroll 2
  for (int64_t p = team.lane; p < positions; p += team.lanes) {
    const int64_t at = team.first + p * team.step;
    x.out[at] = narrow<T>((A(1) + x.attention[image * positions + p]) * widen(x.features[at]));
  }
}

// ---- host ----

template <typename T>
LfiSumPlan<T> plan_lfi_attend(const LfiAttendArgs<T>& x) {
  return plan_lfi_sum(x.features, x.importance, false, x.shape);
}

// Launches with scratch of plan.partials elements; nothing for an empty batch.
template <typename T>
cudaError_t run_lfi_attend(const LfiSumPlan<T>& plan, const LfiAttendArgs<T>& x, Accumulate<T>* partials,
                           cudaStream_t stream) {
  using A = Accumulate<T>;
  if (x.shape.images == 0) return cudaSuccess;
  const cudaError_t error = run_lfi_sum(plan, partials, stream);
  if (error != cudaSuccess) return error;
  const A* sums = partials;
  launch(lfi_scale_map<A>, grid_of(1, x.shape.images), kLfiThreads, 0, stream, sums, plan.reduce.shares, x.raw, x.attention,
         x.shape.images, x.shape.positions, x.keeps_constant);
  launch(lfi_raise<T>, lfi_grid(x.shape), kLfiThreads, 0, stream, x);
  return cudaGetLastError();
}

}  // namespace fastcam::cuda
