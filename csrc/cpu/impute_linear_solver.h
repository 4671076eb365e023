// The leaf of impute_linear: one image's holes, channel after channel, by conjugate gradients with a multigrid cycle.
//
// Every plane of every level has a frame of zeros one element wide, so neighbours need no test for the border, and a row
// is worked on between its first and last missing cell only; everything beyond stays zero. The frame of a row's end also
// is that of the next row's start.
#pragma once

#include "cpu/leaf.h"
#include "impute_linear_formulas.h"

namespace fastcam::cpu {

template <typename A>
struct ImputeArgs {
  A* values;            // (C,H,W), known pixels in place; the missing ones are written
  const bool* missing;  // (H,W)
  int64_t channels, height, width;
  int iterations;
  ImputeShape shape;
  A* planes;       // zeros: 8 pyramids of shape.offset[levels], then 4 planes of level 0, then 2 rows
  int64_t* spans;  // 2 for each of shape.rows[levels]
  bool* flags;     // a pyramid
};

template <typename A>
int64_t impute_scratch(const ImputeShape& s) {
  return 8 * s.offset[s.levels] + 4 * s.offset[1] + 2 * (s.width[0] + 2);
}

template <typename A>
struct ImputeLevel {
  int64_t height, width, stride;
  A *missing, *scale, *inverse;  // 1 for unknowns; weight of the own value; damped step, 0 for knowns
  A *right, *found, *other, *rest;  // right-hand side, solution, its successor, residual
  A* row;
  const int64_t *first, *last;  // of each row's missing cells, last exclusive
  // (0, 0) of a plane.
  FASTCAM_INLINE A* at(A* plane) const { return plane + stride + 1; }
};

template <typename A>
struct ImputeLinear {
  // Sum of the eight neighbours, sides counted twice, between columns begin and end.
  static FASTCAM_INLINE void around(const A* __restrict row, int64_t stride, int64_t begin, int64_t end,
                                    A* __restrict columns, A* __restrict out) {
    const A *above = row - stride, *below = row + stride;
    for (int64_t x = begin - 1; x <= end; ++x) columns[x + 1] = above[x] + 2 * row[x] + below[x];
    for (int64_t x = begin; x < end; ++x) out[x] = columns[x] + 2 * columns[x + 1] + columns[x + 2] - 4 * row[x];
  }

  // out = found + inverse (right - A found), a damped step; or, for residuals, missing (right - A found).
  template <bool STEP>
  static FASTCAM_INLINE void advance(const ImputeLevel<A>& v, const A* right_, const A* found_, A* out_) {
    for (int64_t y = 0; y < v.height; ++y) {
      const int64_t begin = v.first[y], end = v.last[y], at = (y + 1) * v.stride + 1;
      if (begin >= end) continue;
      A* __restrict out = out_ + at;
      const A *__restrict right = right_ + at, *__restrict found = found_ + at;
      const A *__restrict scale = v.scale + at, *__restrict factor = (STEP ? v.inverse : v.missing) + at;
      around(found, v.stride, begin, end, v.row, out);
      for (int64_t x = begin; x < end; ++x) {
        const A rest = factor[x] * (right[x] - scale[x] * found[x] + out[x]);
        out[x] = STEP ? found[x] + rest : rest;
      }
    }
  }

  static FASTCAM_INLINE void smooth(ImputeLevel<A>& v, int count) {
    for (int i = 0; i < count; ++i) {
      advance<true>(v, v.right, v.found, v.other);
      A* const swapped = v.found;
      v.found = v.other, v.other = swapped;
    }
  }

  static FASTCAM_INLINE void start(ImputeLevel<A>& v) {
    for (int64_t y = 0; y < v.height; ++y) {
      const int64_t at = (y + 1) * v.stride + 1;
      for (int64_t x = v.first[y]; x < v.last[y]; ++x) v.found[at + x] = v.inverse[at + x] * v.right[at + x];
    }
  }

  static FASTCAM_INLINE void restrict_to(const ImputeLevel<A>& fine, const ImputeLevel<A>& coarse) {
    for (int64_t y = 0; y < coarse.height; ++y) {
      const int64_t begin = coarse.first[y], end = coarse.last[y], at = (y + 1) * coarse.stride + 1;
      if (begin >= end) continue;
      const A* __restrict r = fine.rest + (2 * y + 1) * fine.stride + 1;
      const int64_t s = fine.stride;
      A* __restrict columns = fine.row + 1;
      for (int64_t x = 2 * begin - 1; x <= 2 * end; ++x) {
        columns[x] = (r[x - s] + 3 * r[x] + 3 * r[x + s] + r[x + 2 * s]) * A(0.25);
      }
      A* __restrict out = coarse.right + at;
      const A* __restrict missing = coarse.missing + at;
      for (int64_t x = begin; x < end; ++x) {
        const A sum = columns[2 * x - 1] + 3 * columns[2 * x] + 3 * columns[2 * x + 1] + columns[2 * x + 2];
        out[x] = missing[x] * sum * A(0.25);
      }
    }
  }

  static FASTCAM_INLINE void prolong(const ImputeLevel<A>& coarse, const ImputeLevel<A>& fine) {
    for (int64_t y = 0; y < fine.height; ++y) {
      const int64_t begin = fine.first[y], end = fine.last[y], at = (y + 1) * fine.stride + 1;
      if (begin >= end) continue;
      const A* __restrict near = coarse.found + (y / 2 + 1) * coarse.stride + 1;
      const A* __restrict far = near + (y % 2 ? coarse.stride : -coarse.stride);
      A* __restrict columns = coarse.row + 1;
      for (int64_t x = begin / 2 - 1; x <= (end + 1) / 2; ++x) columns[x] = (3 * near[x] + far[x]) * A(0.25);
      A* __restrict out = fine.found + at;
      const A* __restrict missing = fine.missing + at;
      for (int64_t x = begin; x < end; ++x) {
        out[x] += missing[x] * (3 * columns[x / 2] + columns[x / 2 + (x % 2 ? 1 : -1)]) * A(0.25);
      }
    }
  }

  // An approximate solution of A found = right on the first level.
  static FASTCAM_INLINE void cycle(ImputeLevel<A>* levels, int count) {
    for (int l = 0; l + 1 < count; ++l) {
      start(levels[l]);
      smooth(levels[l], 1);
      advance<false>(levels[l], levels[l].right, levels[l].found, levels[l].rest);
      restrict_to(levels[l], levels[l + 1]);
    }
    start(levels[count - 1]);
    smooth(levels[count - 1], kImputeCoarsestSmooths);
    for (int l = count - 2; l >= 0; --l) {
      prolong(levels[l + 1], levels[l]);
      smooth(levels[l], 2);
    }
  }

  // Over the first level's missing cells; rows are summed in lanes, then in double.
  static FASTCAM_INLINE double dot(const ImputeLevel<A>& v, const A* a_, const A* b_) {
    double sum = 0;
    for (int64_t y = 0; y < v.height; ++y) {
      const int64_t begin = v.first[y], end = v.last[y], at = (y + 1) * v.stride + 1;
      const A *__restrict a = a_ + at, *__restrict b = b_ + at;
      A lanes[16] = {};
      int64_t x = begin;
      for (; x + 16 <= end; x += 16) {
        for (int i = 0; i < 16; ++i) lanes[i] += a[x + i] * b[x + i];
      }
      double row = 0;
      for (; x < end; ++x) row += static_cast<double>(a[x]) * b[x];
      for (int i = 0; i < 16; ++i) row += lanes[i];
      sum += row;
    }
    return sum;
  }

  static FASTCAM_INLINE void build(const ImputeArgs<A>& args, ImputeLevel<A>* levels) {
    const ImputeShape& s = args.shape;
    const int64_t pyramid = s.offset[s.levels];
    A* const extra = args.planes + 8 * pyramid + 4 * s.offset[1];
    for (int l = 0; l < s.levels; ++l) {
      ImputeLevel<A>& v = levels[l];
      v.height = s.height[l], v.width = s.width[l], v.stride = s.width[l] + 1;
      A* const base = args.planes + s.offset[l];
      v.missing = base, v.scale = base + pyramid, v.inverse = base + 2 * pyramid, v.right = base + 3 * pyramid;
      v.found = base + 4 * pyramid, v.other = base + 5 * pyramid, v.rest = base + 6 * pyramid;
      v.row = extra;
      int64_t *first = args.spans + s.rows[l], *last = args.spans + s.rows[s.levels] + s.rows[l];
      bool* open = args.flags + s.offset[l];
      const int64_t height = impute_inside(args.height, l), width = impute_inside(args.width, l);
      for (int64_t y = 0; y < v.height; ++y) {
        first[y] = v.width, last[y] = 0;
        for (int64_t x = 0; x < v.width; ++x) {
          const bool unknown = y < height && x < width && (l == 0 ? args.missing[y * args.width + x] : whole(args, l, y, x));
          open[y * v.width + x] = unknown;
          const int64_t at = (y + 1) * v.stride + 1 + x;
          v.missing[at] = unknown, v.scale[at] = A(impute_own_weight(y, x, height, width));
          v.inverse[at] = A(kImputeDamping) * v.missing[at] / v.scale[at];
          if (unknown) {
            first[y] = first[y] < x ? first[y] : x;
            last[y] = x + 1;
          }
        }
      }
      v.first = first, v.last = last;
    }
  }

  // Whether the four elements below one of level l are all unknown or beyond the image.
  static FASTCAM_INLINE bool whole(const ImputeArgs<A>& args, int l, int64_t y, int64_t x) {
    const int64_t height = impute_inside(args.height, l - 1), width = impute_inside(args.width, l - 1);
    const bool* open = args.flags + args.shape.offset[l - 1];
    bool all = true;
    for (int64_t fy = 2 * y; fy < 2 * y + 2; ++fy) {
      for (int64_t fx = 2 * x; fx < 2 * x + 2; ++fx) {
        all = all && (fy >= height || fx >= width || open[fy * args.shape.width[l - 1] + fx]);
      }
    }
    return all;
  }

  template <int BYTES>
  static FASTCAM_INLINE void body(const ImputeArgs<A>& args) {
    const ImputeShape& s = args.shape;
    ImputeLevel<A> levels[kImputeLevels];
    build(args, levels);
    ImputeLevel<A>& top = levels[0];
    const int64_t stride = top.stride, plane = s.offset[1];
    A* const work = args.planes + 8 * s.offset[s.levels];
    A *const solution = work, *const step = work + plane, *const image = work + 2 * plane, *const known = work + 3 * plane;
    for (int64_t c = 0; c < args.channels; ++c) {
      A* const values = args.values + c * args.height * args.width;
      int odd = 0;  // known pixels that are not finite
      for (int64_t y = 0; y < args.height; ++y) {
        for (int64_t x = 0; x < args.width; ++x) {
          const int64_t i = y * args.width + x;
          const A value = args.missing[i] ? A(0) : values[i];
          known[(y + 1) * stride + 1 + x] = value, odd |= !is_finite(value);
        }
      }
      if (odd != 0) {
        for (int64_t i = 0; i < args.height * args.width; ++i) values[i] = args.missing[i] ? A(NAN) : values[i];
        continue;
      }
      for (int64_t y = 0; y < top.height; ++y) {
        const int64_t at = (y + 1) * stride + 1;
        if (top.first[y] >= top.last[y]) continue;
        around(known + at, stride, top.first[y], top.last[y], top.row, top.right + at);
        for (int64_t x = top.first[y]; x < top.last[y]; ++x) {
          top.right[at + x] *= top.missing[at + x];
          solution[at + x] = 0;
        }
      }
      // From here on top.right is the residual of the outer iteration.
      double energy = 0, target = 0;
      for (int i = 0; i <= args.iterations; ++i) {
        cycle(levels, s.levels);
        const double before = energy;
        energy = dot(top, top.right, top.found);
        if (i == 0) target = energy * (sizeof(A) == 4 ? 1e-18 : 1e-34);  // nothing is left to gain
        if (!is_finite(energy)) {  // the values are too large
          for (int64_t x = 0; x < plane; ++x) solution[x] = A(NAN);
        }
        if (i == args.iterations || !(energy > target)) break;
        const A ratio = static_cast<A>(i == 0 ? 0 : energy / before);
        for (int64_t y = 0; y < top.height; ++y) {
          const int64_t at = (y + 1) * stride + 1, begin = at + top.first[y], end = at + top.last[y];
          if (i == 0) {  // what is left there from the last channel may be anything
            for (int64_t x = begin; x < end; ++x) step[x] = 0;
          }
          for (int64_t x = begin; x < end; ++x) step[x] = top.found[x] + ratio * step[x];
        }
        // missing (0 - A step), into image: minus what conjugate gradients call A step.
        advance<false>(top, args.planes + 7 * s.offset[s.levels], step, image);  // of zeros
        const double curvature = -dot(top, step, image);
        if (!(curvature > 0)) break;
        const A length = static_cast<A>(energy / curvature);
        for (int64_t y = 0; y < top.height; ++y) {
          const int64_t at = (y + 1) * stride + 1;
          for (int64_t x = at + top.first[y]; x < at + top.last[y]; ++x) {
            solution[x] += length * step[x], top.right[x] += length * image[x];
          }
        }
      }
      for (int64_t y = 0; y < args.height; ++y) {
        for (int64_t x = 0; x < args.width; ++x) {
          const int64_t i = y * args.width + x;
          if (args.missing[i]) values[i] = solution[(y + 1) * stride + 1 + x];
        }
      }
    }
  }
};

}  // namespace fastcam::cpu
