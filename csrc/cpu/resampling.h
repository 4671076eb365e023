// The tables of cam_map_finish.h's bilinear resize, owned: made once a call, read by every task.
#pragma once

#include <vector>

#include "cpu/cam_map_finish.h"

namespace fastcam::cpu {

// Where each output index reads, along one axis.
template <typename A>
struct Resampling {
  std::vector<int32_t> first, second;
  std::vector<A> share;
  int64_t in;

  Resampling(int64_t in, int64_t out) : first(out), second(out), share(out), in(in) {
    fill_axis(in, out, first.data(), second.data(), share.data());
  }
  Axis<A> axis() const {
    return {first.data(), second.data(), share.data(), in, static_cast<int64_t>(share.size())};
  }
};

// Elements between the horizontally stretched rows: whole vectors of any width.
inline int64_t stretched_stride(int64_t width) { return (width + 15) / 16 * 16; }

}  // namespace fastcam::cpu
