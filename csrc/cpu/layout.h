// Reads (...,K,H,W) tensors as images of rows: channels x positions (NCHW) or positions x channels (channels_last),
// without a copy where rows are dense, whatever the outer strides are.
#pragma once

#include "aten.h"
#include <ATen/Parallel.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fastcam::cpu {

// A (B,[T,]K,H,W) tensor whose rows are dense in the given order; strides in elements.
struct Images {
  at::Tensor tensor;  // keeps the memory alive
  int64_t batch = 0, target = 0, row = 0;

  template <typename S>
  const S* at(int64_t b, int64_t t = 0) const {
    return tensor.defined() ? static_cast<const S*>(tensor.const_data_ptr()) + b * batch + t * target : nullptr;
  }
};

inline bool rows_are_channels(const at::Tensor& x) {
  const auto d = x.dim();
  return (x.size(d - 1) == 1 || x.stride(d - 1) == 1) && (x.size(d - 2) == 1 || x.stride(d - 2) == x.size(d - 1));
}

inline int64_t position_stride(const at::Tensor& x) {
  const auto d = x.dim();
  return x.size(d - 1) > 1 ? x.stride(d - 1) : x.stride(d - 2);
}

inline bool rows_are_positions(const at::Tensor& x) {
  const auto d = x.dim();
  return (x.size(d - 3) == 1 || x.stride(d - 3) == 1) &&
         (x.size(d - 2) == 1 || x.stride(d - 2) == x.size(d - 1) * position_stride(x));
}

// Which order to read features in: their own if dense, else the one they are copied to. A single position is best
// read as one row of channels.
inline bool prefers_channels_last(const at::Tensor& x) {
  const bool single = x.size(-1) * x.size(-2) == 1;
  return rows_are_positions(x) && (single || !rows_are_channels(x));
}

inline Images as_images(const at::Tensor& x, bool channels_last) {
  at::Tensor dense = x;
  if (channels_last && !rows_are_positions(x)) {
    dense = x.movedim(-3, -1).contiguous().movedim(-1, -3);
  } else if (!channels_last && !rows_are_channels(x)) {
    dense = x.contiguous();
  }
  const int64_t target = dense.dim() == 5 ? dense.stride(1) : 0;
  const int64_t row = channels_last ? position_stride(dense) : dense.stride(dense.dim() - 3);
  return {dense, dense.stride(0), target, row};
}

// A reference of batch 1 serves every image.
inline Images as_shared_images(const at::Tensor& x, bool channels_last) {
  Images images = as_images(x, channels_last);
  if (x.size(0) == 1) images.batch = 0;
  return images;
}

// Large results are mostly fresh mappings (glibc never recycles 32 MiB and more), and faulting them in by 4 KiB pages can
// take far longer than computing them. A hint: where huge pages are off nothing changes.
inline void advise_huge_pages(const void* fresh, size_t size) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHuge = uintptr_t{2} << 20;
  if (size < 2 * kHuge) return;
  const auto begin = reinterpret_cast<uintptr_t>(fresh);
  const uintptr_t first = (begin + kHuge - 1) / kHuge * kHuge, last = (begin + size) / kHuge * kHuge;
  madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

// Tasks a thread must have at least, so that a thread is worth waking.
inline int64_t grain(int64_t work_per_task) {
  return std::max<int64_t>(1, kGrain / std::max<int64_t>(1, work_per_task));
}

}  // namespace fastcam::cpu
