// What the CPU and CUDA bindings of mask_by_features share: last-line checks, the chunk, the result.
#pragma once

#include <cmath>
#include <optional>
#include <string_view>

#include "ops.h"

namespace fastcam {

// Pairs start..start+count-1, as rows of the images they belong to.
struct Chunk {
  int64_t count;
  int64_t first_image, images;  // that the chunk touches
  int64_t first_channel;        // of the chunk's first pair
  bool minmax_first;
};

inline Chunk check_mask_by_features(const at::Tensor& images, const at::Tensor& features, int64_t start,
                                    std::optional<int64_t> count, const std::optional<at::Tensor>& noise, double scale,
                                    std::string_view order) {
  const char* op = "mask_by_features";
  check_no_grad(op, images, features, noise.value_or(at::Tensor()));
  check_features(op, images, "images", "(B,C,H,W)");
  check_features(op, features);
  const auto dtype = images.scalar_type();
  TORCH_CHECK_TYPE(dtype == at::kDouble || dtype == at::kFloat || dtype == at::kHalf || dtype == at::kBFloat16, op,
                   ": images must be float64, float32, float16 or bfloat16, got ", dtype);
  check_companion(op, "features", features, images, "images");
  TORCH_CHECK_VALUE(features.size(0) == images.size(0), op, ": images and features must have one batch size, got ",
                    images.size(0), " and ", features.size(0));
  const int64_t channels = features.size(1), pairs = features.size(0) * channels;
  TORCH_CHECK_VALUE(start >= 0 && start <= pairs, op, ": start must be in 0..", pairs, ", got ", start);
  const int64_t rows = count.value_or(pairs - start);
  TORCH_CHECK_VALUE(rows >= 0 && rows <= pairs - start, op, ": count must be in 0..", pairs - start, ", got ", rows);
  if (noise.has_value()) {
    check_companion(op, "noise", *noise, images, "images");
    const bool fits = noise->dim() == 3 && noise->size(0) == rows && noise->sizes().slice(1) == images.sizes().slice(2);
    TORCH_CHECK_VALUE(fits, op, ": noise must be (", rows, ", ", images.size(2), ", ", images.size(3), "), got ",
                      noise->sizes());
  }
  TORCH_CHECK_VALUE(std::isfinite(scale), op, ": scale must be finite, got ", scale);
  const bool minmax_first = order == "minmax_then_resize";
  TORCH_CHECK_VALUE(minmax_first || order == "resize_then_minmax", op, ": unknown order '", order,
                    "', expected resize_then_minmax or minmax_then_resize");
  const int64_t first = start / channels, last = rows > 0 ? (start + rows - 1) / channels : first - 1;
  return {rows, first, last - first + 1, start % channels, minmax_first};
}

}  // namespace fastcam
