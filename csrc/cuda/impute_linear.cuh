// impute_linear on CUDA devices, framework-free: raw pointers, sizes, stream.
//
// One launch: a block solves the system of one channel of one image from its scratch, by conjugate gradients preconditioned
// with a multigrid cycle, and goes on to the next. Steps are parted by barriers of the block, so nothing is waited for on the
// host, and what a thread adds depends on the image's shape only: results are bit-equal in any batch; no atomics.
#pragma once

#include "cuda/common.cuh"
#include "impute_linear_formulas.h"

namespace fastcam::cuda {

constexpr int kImputeThreads = 512;
constexpr int64_t kImputeBlocks = 264;  // at once, each with its scratch: two for each of 132 multiprocessors

template <typename T>
struct ImputeArgs {
  const T* images;      // (systems, height, width)
  const bool* missing;  // (systems / channels, height, width)
  T* out;
  Accumulate<T>* scratch;  // 4 pyramids and 2 planes for each block
  uint8_t* weights;        // `pyramid` for each block
  int64_t systems, channels;
  int height, width;          // of an image,
  int top_height, top_width;  // rounded up to whole elements of the coarsest level
  int depth, pyramid, iterations;  // levels below the first, elements of all levels
};

// A level of the pyramid.
template <typename A>
struct ImputeLevel {
  int height, width, level;
  A *right, *found, *other, *rest;  // right-hand side, solution, its predecessor, residual: of element (0, 0)
  uint8_t* weights;                 // of an unknown element's own value in its equation; 0 for known ones

  __device__ __forceinline__ int stride() const { return width + 1; }
  __device__ __forceinline__ int plane() const { return (height + 2) * (width + 1) + 1; }
  __device__ __forceinline__ int place(int i) const { return i + i / width; }
};

template <typename A>
__device__ __forceinline__ void impute_move(ImputeLevel<A>& v, int elements) {
  v.right += elements, v.found += elements, v.other += elements, v.rest += elements, v.weights += elements;
}

template <typename A>
__device__ __forceinline__ ImputeLevel<A> impute_below(ImputeLevel<A> v) {
  const int from = v.plane() - v.stride();  // element (0, 0) has a row and an element before it
  v.height /= 2, v.width /= 2, v.level += 1;
  impute_move(v, from + v.stride());
  return v;
}

template <typename A>
__device__ __forceinline__ ImputeLevel<A> impute_above(ImputeLevel<A> v) {
  const int back = v.stride();
  v.height *= 2, v.width *= 2, v.level -= 1;
  impute_move(v, -(v.plane() - v.stride() + back));
  return v;
}

#define FASTCAM_IMPUTE_EACH(v, i) for (int i = int(threadIdx.x); i < (v).height * (v).width; i += kImputeThreads)

// A first solution from zeros.
template <typename A>
__device__ __forceinline__ void impute_start(const ImputeLevel<A>& v, A* to) {
  FASTCAM_IMPUTE_EACH(v, i) {
    const int at = v.place(i);
    const A weight = v.weights[at];
    to[at] = weight > 0 ? A(kImputeDamping) / weight * v.right[at] : A(0);
  }
  __syncthreads();
}

// to = from + a damped step towards the solution.
template <typename A>
__device__ __forceinline__ void impute_smooth(const ImputeLevel<A>& v, const A* from, A* to) {
  FASTCAM_IMPUTE_EACH(v, i) {
    const int at = v.place(i);
    const A weight = v.weights[at];
    A value = 0;
    if (weight > 0) {
      const A own = from[at];
      value = own + A(kImputeDamping) / weight * (v.right[at] - weight * own + impute_around(from + at, v.stride()));
    }
    to[at] = value;
  }
  __syncthreads();
}

// to = right - what the equations make of `from`; right may be null, for zeros.
template <typename A>
__device__ __forceinline__ void impute_residual(const ImputeLevel<A>& v, const A* right, const A* from, A* to) {
  FASTCAM_IMPUTE_EACH(v, i) {
    const int at = v.place(i);
    const A weight = v.weights[at], rest = impute_around(from + at, v.stride()) - weight * from[at];
    to[at] = weight > 0 ? (right == nullptr ? rest : right[at] + rest) : A(0);
  }
  __syncthreads();
}

template <typename A>
__device__ __forceinline__ void impute_restrict(const ImputeLevel<A>& fine, const ImputeLevel<A>& coarse) {
  FASTCAM_IMPUTE_EACH(coarse, i) {
    const int at = coarse.place(i), y = i / coarse.width, x = i % coarse.width;
    const A* first = fine.rest + (2 * y - 1) * fine.stride() + 2 * x - 1;
    coarse.right[at] = coarse.weights[at] > 0 ? impute_down(first, fine.stride()) : A(0);
  }
  __syncthreads();
}

template <typename A>
__device__ __forceinline__ void impute_prolong(const ImputeLevel<A>& coarse, const ImputeLevel<A>& fine) {
  FASTCAM_IMPUTE_EACH(fine, i) {
    const int at = fine.place(i), y = i / fine.width, x = i % fine.width;
    if (fine.weights[at] == 0) continue;
    const A* near = coarse.found + y / 2 * coarse.stride() + x / 2;
    fine.found[at] += impute_up(near, y % 2 ? coarse.stride() : -coarse.stride(), x % 2 ? 1 : -1);
  }
  __syncthreads();
}

// An approximate solution on the first level, in its `found`.
template <typename A>
__device__ __forceinline__ void impute_cycle(const ImputeLevel<A>& top, int depth) {
  ImputeLevel<A> v = top;
  while (v.level < depth) {
    impute_start(v, v.other);
    impute_smooth(v, v.other, v.found);
    impute_residual(v, v.right, v.found, v.rest);
    const ImputeLevel<A> below = impute_below(v);
    impute_restrict(v, below);
    v = below;
  }
  impute_start(v, v.found);
  for (int i = 0; i < kImputeCoarsestSmooths / 2; ++i) {
    impute_smooth(v, v.found, v.other);
    impute_smooth(v, v.other, v.found);
  }
  while (v.level > 0) {
    const ImputeLevel<A> above = impute_above(v);
    impute_prolong(v, above);
    v = above;
    impute_smooth(v, v.found, v.other);
    impute_smooth(v, v.other, v.found);
  }
}

// Of every thread's share, for every thread.
__device__ __forceinline__ double impute_total(double* values, double share) {
  __syncthreads();
  values[threadIdx.x] = share;
  add_rows(values, kImputeThreads, 1);
  return values[0];
}

// Which elements are unknown: those of a coarse level whose four all are, or lie beyond the image.
template <typename A>
__device__ __forceinline__ void impute_mark(const ImputeLevel<A>& top, const bool* missing, int depth, int height, int width) {
  FASTCAM_IMPUTE_EACH(top, i) {
    const int y = i / top.width, x = i % top.width;
    const bool unknown = y < height && x < width && missing[int64_t(y) * width + x];
    top.weights[top.place(i)] = uint8_t(unknown ? impute_own_weight(y, x, height, width) : 0);
  }
  __syncthreads();
  for (ImputeLevel<A> fine = top; fine.level < depth;) {
    const ImputeLevel<A> v = impute_below(fine);
    const int fine_rows = int(impute_inside(height, fine.level)), fine_columns = int(impute_inside(width, fine.level));
    const int rows = (fine_rows + 1) / 2, columns = (fine_columns + 1) / 2;
    FASTCAM_IMPUTE_EACH(v, i) {
      const int y = i / v.width, x = i % v.width;
      bool unknown = y < rows && x < columns;
      for (int j = 0; j < 4; ++j) {
        const int fy = 2 * y + j / 2, fx = 2 * x + j % 2;
        unknown = unknown && (fy >= fine_rows || fx >= fine_columns || fine.weights[fy * fine.stride() + fx] > 0);
      }
      v.weights[v.place(i)] = uint8_t(unknown ? impute_own_weight(y, x, rows, columns) : 0);
    }
    __syncthreads();
    fine = v;
  }
}

template <typename T>
__global__ void __launch_bounds__(kImputeThreads) impute_linear(const ImputeArgs<T> x) {
  using A = Accumulate<T>;
  __shared__ double values[kImputeThreads];
  ImputeLevel<A> top = {x.top_height, x.top_width, 0, nullptr, nullptr, nullptr, nullptr, nullptr};
  const int plane = top.plane(), stride = top.stride(), first = stride + 1;
  const int64_t size = 4 * int64_t(x.pyramid) + 2 * plane;
  A* const scratch = x.scratch + blockIdx.x * size;
  top.right = scratch + first, top.found = top.right + x.pyramid, top.other = top.found + x.pyramid;
  top.rest = top.other + x.pyramid, top.weights = x.weights + int64_t(blockIdx.x) * x.pyramid + first;
  A* const solution = scratch + 4 * int64_t(x.pyramid) + first;
  A* const step = solution + plane;
  for (int64_t i = threadIdx.x; i < size; i += kImputeThreads) scratch[i] = 0;  // of which frames stay
  for (int64_t system = blockIdx.x; system < x.systems; system += gridDim.x) {
    const T* image = x.images + system * x.height * x.width;
    const bool* missing = x.missing + system / x.channels * x.height * x.width;
    __syncthreads();
    impute_mark(top, missing, x.depth, x.height, x.width);
    double share = 0;
    FASTCAM_IMPUTE_EACH(top, i) {  // the known neighbours' part of the equations
      const int at = top.place(i), y = i / top.width, column = i % top.width;
      const bool unknown = top.weights[at] > 0;
      A sum = 0;
      for (int j = 0; j < 9; ++j) {
        const int dy = j / 3 - 1, dx = j % 3 - 1, ny = y + dy, nx = column + dx;
        if (unknown == (j == 4) || ny < 0 || nx < 0 || ny >= x.height || nx >= x.width) continue;
        if (top.weights[at + dy * stride + dx] > 0) continue;
        const A known = widen(image[int64_t(ny) * x.width + nx]);
        if (unknown) sum += A(dy != 0 && dx != 0 ? 1 : 2) * known;
        share += double(known - known);  // NaN unless it is finite
      }
      top.right[at] = sum, solution[at] = 0;
    }
    double energy = 0, target = 0;
    bool finite = impute_total(values, share) == 0;
    for (int round = 0; round < x.iterations && finite; ++round) {
      impute_cycle(top, x.depth);
      share = 0;
      FASTCAM_IMPUTE_EACH(top, i) share += double(top.right[top.place(i)]) * top.found[top.place(i)];
      const double before = energy;
      energy = impute_total(values, share);
      if (round == 0) target = energy * (sizeof(A) == 4 ? 1e-18 : 1e-34);  // nothing is left to gain
      finite = is_finite(energy);
      if (!(energy > target)) break;  // the same for all threads, as are all choices by totals
      const A ratio = A(round == 0 ? 0 : energy / before);
      FASTCAM_IMPUTE_EACH(top, i) {
        const int at = top.place(i);
        step[at] = round == 0 ? top.found[at] : top.found[at] + ratio * step[at];
      }
      __syncthreads();
      impute_residual(top, static_cast<const A*>(nullptr), step, top.rest);  // minus the equations' left sides
      share = 0;
      FASTCAM_IMPUTE_EACH(top, i) share -= double(step[top.place(i)]) * top.rest[top.place(i)];
      const double curvature = impute_total(values, share);
      if (!(curvature > 0)) break;
      const A length = A(energy / curvature);
      FASTCAM_IMPUTE_EACH(top, i) {
        const int at = top.place(i);
        solution[at] += length * step[at], top.right[at] += length * top.rest[at];
      }
      __syncthreads();
    }
    T* out = x.out + system * x.height * x.width;
    FASTCAM_IMPUTE_EACH(top, i) {
      const int y = i / top.width, column = i % top.width, at = top.place(i);
      if (y >= x.height || column >= x.width) continue;
      const int64_t pixel = int64_t(y) * x.width + column;
      out[pixel] = top.weights[at] > 0 ? narrow<T>(finite ? solution[at] : A(NAN)) : image[pixel];
    }
  }
}

#undef FASTCAM_IMPUTE_EACH

// ---- host ----

struct ImputePlan {
  int64_t blocks, values, weights;  // and how much scratch they need
  ImputeShape shape;
};

inline ImputePlan plan_impute_linear(int64_t systems, int64_t height, int64_t width) {
  ImputePlan plan = {std::min(systems, kImputeBlocks), 0, 0, impute_shape(height, width)};
  const int64_t pyramid = plan.shape.offset[plan.shape.levels];
  plan.values = plan.blocks * (4 * pyramid + 2 * plan.shape.offset[1]), plan.weights = plan.blocks * pyramid;
  return plan;
}

// Nothing for an empty batch. A pyramid must have fewer than 2^31 elements.
template <typename T>
cudaError_t run_impute_linear(const ImputePlan& plan, ImputeArgs<T> x, cudaStream_t stream) {
  if (x.systems == 0) return cudaSuccess;
  x.top_height = int(plan.shape.height[0]), x.top_width = int(plan.shape.width[0]);
  x.depth = plan.shape.levels - 1, x.pyramid = int(plan.shape.offset[plan.shape.levels]);
  launch(impute_linear<T>, grid_of(plan.blocks, 1), kImputeThreads, 0, stream, x);
  return cudaGetLastError();
}

}  // namespace fastcam::cuda
