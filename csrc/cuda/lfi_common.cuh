// What the lfi_* kernels share: teams of threads that walk the positions of a channel, reductions over a team, and
// cam_map's sums over channels.
//
// NCHW: a team is a warp, and a block takes 8 channels. channels_last: 32 channels lie side by side, and a team is 8 threads,
// one of each warp. What a thread adds depends on an image's shape only, so results are bit-equal in any batch; no atomics.
#pragma once

#include "cuda/cam_map_reduce.cuh"
#include "cuda/common.cuh"

namespace fastcam::cuda {

constexpr int kLfiThreads = 256;

struct LfiShape {
  int64_t images, channels, positions;
  bool channels_last;
};

// The place of a thread: a lane of the team with number `member` of `width` in the block.
struct LfiTeam {
  int member, width, lane, lanes;
  int64_t channel, first, step;  // offsets in elements: of the channel's first position, and from one to the next
  bool there;                    // the channel exists
};

__host__ __device__ __forceinline__ int lfi_channels_of_block(bool channels_last) { return channels_last ? 32 : kLfiThreads / 32; }

__device__ __forceinline__ LfiTeam lfi_team(const LfiShape& x, int64_t image) {
  LfiTeam team;
  const int low = threadIdx.x % 32, high = threadIdx.x / 32;
  team.member = x.channels_last ? low : high, team.lane = x.channels_last ? high : low;
  team.width = lfi_channels_of_block(x.channels_last), team.lanes = kLfiThreads / team.width;
  team.channel = int64_t(blockIdx.x) * team.width + team.member;
  team.there = team.channel < x.channels;
  team.first = image * x.channels * x.positions + (x.channels_last ? team.channel : team.channel * x.positions);
  team.step = x.channels_last ? x.channels : 1;
  return team;
}

// The whole block walks one map.
__device__ __forceinline__ LfiTeam lfi_block_team(int64_t image, int64_t positions) {
  return {0, 1, int(threadIdx.x), kLfiThreads, 0, image * positions, 1, true};
}

struct LfiSum {
  template <typename A>
  static __device__ __forceinline__ A both(A x, A y) {
    return x + y;
  }
};

struct LfiLower {
  template <typename A>
  static __device__ __forceinline__ A both(A x, A y) {
    return lfi_lower(x, y);
  }
};

struct LfiHigher {
  template <typename A>
  static __device__ __forceinline__ A both(A x, A y) {
    return x > y ? x : y;
  }
};

// One value of all lanes of each team, by a tree over kLfiThreads `values` in shared memory. All threads of the block.
template <typename OP, typename A>
__device__ __forceinline__ A lfi_over_team(A* values, const LfiTeam& team, A value) {
  const int at = team.lane * team.width + team.member;
  __syncthreads();
  values[at] = value;
  __syncthreads();
  for (int half = team.lanes / 2; half > 0; half /= 2) {
    if (team.lane < half) values[at] = OP::both(values[at], values[at + half * team.width]);
    __syncthreads();
  }
  return values[team.member];
}

// Of the team's channel; `low` is NaN if an element is.
template <typename T>
__device__ __forceinline__ Extremes<Accumulate<T>> lfi_extremes(Accumulate<T>* values, const LfiTeam& team,
                                                                const T* x, int64_t positions) {
  using A = Accumulate<T>;
  A low = team.there ? widen(x[team.first]) : A(0), high = low;
  if (team.there) {
    for (int64_t p = team.lane; p < positions; p += team.lanes) {
      const A value = widen(x[team.first + p * team.step]);
      low = lfi_lower(value, low), high = value > high ? value : high;
    }
  }
  low = lfi_over_team<LfiLower>(values, team, low);
  return {low, lfi_over_team<LfiHigher>(values, team, high)};
}

// A channel's share of what the lanes of its team have added.
template <typename A>
__device__ __forceinline__ LfiShares<A> lfi_team_shares(A* values, const LfiTeam& team, A total, A weighted, A lowest,
                                                        A highest, A extent) {
  total = lfi_over_team<LfiSum>(values, team, total);
  weighted = lfi_over_team<LfiSum>(values, team, weighted);
  lowest = lfi_over_team<LfiSum>(values, team, lowest);
  highest = lfi_over_team<LfiSum>(values, team, highest);
  return lfi_shares(total, weighted, lowest, highest, extent);
}

// A position's sum over the shares of the channels, in order.
template <typename A>
__device__ __forceinline__ A lfi_add_shares(const A* partials, int shares, int64_t stride, int64_t at) {
  A sum = 0;
  for (int i = 0; i < shares; ++i) sum += partials[i * stride + at];
  return sum;
}

// ---- host ----

inline dim3 lfi_grid(const LfiShape& x) {
  return grid_of(ceil_div<int64_t>(x.channels, lfi_channels_of_block(x.channels_last)), x.images);
}

// How the sum over channels is cut, and its scratch in elements of the accumulation type.
template <typename T>
struct LfiSumPlan {
  ReduceArgs<T> reduce;
  bool vector, positional, channels_last;
  int64_t partials;
};

// `weights`: Accumulate<T> (B,K), or T like the features if positional.
template <typename T>
LfiSumPlan<T> plan_lfi_sum(const T* features, const void* weights, bool positional, const LfiShape& x) {
  const int64_t image = x.channels * x.positions;
  LfiSumPlan<T> plan = {};
  plan.positional = positional, plan.channels_last = x.channels_last;
  // An image (row, in channels_last) must be whole packs, or only the first one would be aligned.
  plan.vector = (x.channels_last ? x.channels : image) % kVector<T> == 0 && aligned(features) && aligned(weights);
  plan.reduce.features = features, plan.reduce.weights = weights;
  plan.reduce.batch = x.images, plan.reduce.targets = 1;
  plan.reduce.channels = x.channels, plan.reduce.positions = x.positions;
  plan.reduce = cut(plan.reduce, x.channels_last, positional, plan.vector);
  plan.partials = plan.reduce.shares * x.images * x.positions;
  return plan;
}

template <typename T>
cudaError_t run_lfi_sum(LfiSumPlan<T> plan, Accumulate<T>* partials, cudaStream_t stream) {
  plan.reduce.partials = partials;
  if (plan.vector) {
    launch_reduce<T, kVector<T>>(plan.reduce, plan.channels_last, plan.positional, stream);
  } else {
    launch_reduce<T, 1>(plan.reduce, plan.channels_last, plan.positional, stream);
  }
  return cudaGetLastError();
}

}  // namespace fastcam::cuda
