// What the CPU and CUDA bindings of perturb_by_rank share: last-line checks, memory orders, the result's shape.
#pragma once

#include <vector>

#include "ops.h"
#include "order.h"

namespace fastcam {

inline void check_perturb_by_rank(const at::Tensor& images, const at::Tensor& baseline, const at::Tensor& ranks,
                                  const at::Tensor& counts) {
  const char* op = "perturb_by_rank";
  check_no_grad(op, images, baseline);
  check_features(op, images, "images", "(B,C,H,W)");
  const auto dtype = images.scalar_type();
  TORCH_CHECK_TYPE(dtype == at::kDouble || dtype == at::kFloat || dtype == at::kHalf || dtype == at::kBFloat16, op,
                   ": images must be float64, float32, float16 or bfloat16, got ", dtype);
  TORCH_CHECK_TYPE(baseline.scalar_type() == dtype, op, ": baseline is ", baseline.scalar_type(), ", images are ", dtype);
  bool fits = baseline.dim() == 4 && baseline.size(1) == images.size(1);
  for (int64_t d = 0; fits && d < 4; ++d) fits = baseline.size(d) == 1 || baseline.size(d) == images.size(d);
  TORCH_CHECK_VALUE(fits, op, ": baseline must be broadcastable to the images and have their channels, got ",
                    baseline.sizes(), " for ", images.sizes());
  TORCH_CHECK_TYPE(ranks.scalar_type() == at::kInt || ranks.scalar_type() == at::kLong, op,
                   ": ranks must be int32 or int64, got ", ranks.scalar_type());
  TORCH_CHECK_VALUE(ranks.dim() == 3 && ranks.size(0) == images.size(0) && ranks.sizes().slice(1) == images.sizes().slice(2),
                    op, ": ranks must be (B,H,W) of images ", images.sizes(), ", got ", ranks.sizes());
  TORCH_CHECK_TYPE(counts.scalar_type() == at::kLong, op, ": counts must be int64, got ", counts.scalar_type());
  TORCH_CHECK_VALUE(counts.dim() == 1, op, ": counts must be (S,), got ", counts.sizes());
  for (const at::Tensor& x : {baseline, ranks, counts}) {
    TORCH_CHECK_VALUE(x.device() == images.device(), op, ": all tensors must be on one device, got ", x.device(), " and ",
                      images.device());
  }
}

// Strides of the result (B,S,C,H,W): those of its images, one after the other.
inline std::vector<int64_t> step_strides(const at::Tensor& images, int64_t steps) {
  const int64_t c = images.size(1), h = images.size(2), w = images.size(3);
  if (is_channels_last(images)) return {steps * c * h * w, c * h * w, 1, w * c, c};
  return {steps * c * h * w, c * h * w, h * w, w, 1};
}

// One value a channel serves every pixel of an image.
inline bool is_plain(const at::Tensor& baseline) { return baseline.size(2) == 1 && baseline.size(3) == 1; }

// Dense in the order of the result's images: all pixels of a baseline, or its channels if it is plain.
inline at::Tensor dense_baseline(const at::Tensor& baseline, const at::Tensor& images) {
  if (is_plain(baseline)) return baseline.contiguous();
  const auto format = is_channels_last(images) ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
  return baseline.expand({-1, -1, images.size(2), images.size(3)}).contiguous(format);
}

}  // namespace fastcam
