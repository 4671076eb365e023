// Arithmetic of impute_linear and the sizes of its pyramid, for host and device. No framework.
//
// All equations are 12 times the op's: with whole weights a constant solves them without a rounding error, which a hole that
// is nearly everything would multiply by its size.
#pragma once

#include <cstdint>

#include "formulas.h"

namespace fastcam {

constexpr int kImputeLevels = 24;
constexpr double kImputeDamping = 0.8;
constexpr int kImputeCoarsestSmooths = 8;

// Depth of the pyramid, and its size in elements of a plane, frames of zeros included: rows have one beside them, which the
// next row shares, and a row above and below.
struct ImputeShape {
  int64_t height[kImputeLevels], width[kImputeLevels], offset[kImputeLevels + 1], rows[kImputeLevels + 1];
  int levels;
};

inline ImputeShape impute_shape(int64_t height, int64_t width) {
  ImputeShape s = {};
  const int64_t side = height < width ? height : width;
  int bits = 0;
  while (((side - 1) >> bits) != 0) ++bits;
  const int depth = bits > 3 ? bits - 3 : 0;
  const int64_t unit = int64_t{1} << depth;
  s.levels = depth + 1;
  for (int l = 0; l <= depth; ++l) {
    s.height[l] = ((height + unit - 1) / unit * unit) >> l, s.width[l] = ((width + unit - 1) / unit * unit) >> l;
    s.offset[l + 1] = s.offset[l] + (s.height[l] + 2) * (s.width[l] + 1) + 1;
    s.rows[l + 1] = s.rows[l] + s.height[l] + 2;
  }
  return s;
}

// Rows (columns) of a level that hold a part of the image.
FASTCAM_HD int64_t impute_inside(int64_t size, int level) { return (size + (int64_t{1} << level) - 1) >> level; }

// What an element's own value counts in its equation: the weights of its neighbours within height x width; 1 without any.
FASTCAM_HD int impute_own_weight(int64_t y, int64_t x, int64_t height, int64_t width) {
  const int vertical = (y > 0) + (y + 1 < height), horizontal = (x > 0) + (x + 1 < width);
  const int weight = 2 * (vertical + horizontal) + vertical * horizontal;
  return weight > 0 ? weight : 1;
}

// Sum of the eight neighbours, sides counted twice.
template <typename A>
FASTCAM_HD A impute_around(const A* p, int64_t stride) {
  const A corners = (p[-stride - 1] + p[-stride + 1]) + (p[stride - 1] + p[stride + 1]);
  return (corners + 2 * (p[-stride] + p[stride])) + 2 * (p[-1] + p[1]);
}

// Of a coarse element's four rows of four fine ones, the first at p: the transpose of impute_up.
template <typename A>
FASTCAM_HD A impute_down(const A* p, int64_t stride) {
  A rows[4];
  for (int i = 0; i < 4; ++i) {
    const A* r = p + i * stride;
    rows[i] = (r[0] + 3 * r[1] + 3 * r[2] + r[3]) * A(0.25);
  }
  return (rows[0] + 3 * rows[1] + 3 * rows[2] + rows[3]) * A(0.25);
}

// A fine element between its own coarse one and those beside it, `down` and `right` of it or before it.
template <typename A>
FASTCAM_HD A impute_up(const A* near, int64_t down, int64_t right) {
  const A own = (3 * near[0] + near[down]) * A(0.25), beside = (3 * near[right] + near[down + right]) * A(0.25);
  return (3 * own + beside) * A(0.25);
}

}  // namespace fastcam
