// What the CPU and CUDA bindings of overlay share: last-line checks, and its arithmetic beside formulas.h.
#pragma once

#include <optional>

#include "ops.h"
#include "overlay_formulas.h"

namespace fastcam {

inline void check_overlay(const at::Tensor& images, const at::Tensor& maps, const at::Tensor& table, double alpha,
                          const std::optional<at::ArrayRef<double>>& mean, const std::optional<at::ArrayRef<double>>& std) {
  const char* op = "overlay";
  check_no_grad(op, images, maps, table);
  check_features(op, images, "images", "(B,3,H,W) or (B,1,H,W)");
  const auto dtype = images.scalar_type();
  TORCH_CHECK_TYPE(dtype == at::kDouble || dtype == at::kFloat || dtype == at::kHalf || dtype == at::kBFloat16, op,
                   ": images must be float64, float32, float16 or bfloat16, got ", dtype);
  TORCH_CHECK_VALUE(images.size(1) == 1 || images.size(1) == 3, op, ": images must have 1 or 3 channels, got ",
                    images.sizes());
  check_companion(op, "maps", maps, images, "images");
  TORCH_CHECK_VALUE((maps.dim() == 3 || maps.dim() == 4) && maps.size(0) == images.size(0) &&
                        maps.sizes().slice(maps.dim() - 2) == images.sizes().slice(2),
                    op, ": maps must be (B,H,W) or (B,T,H,W) of images ", images.sizes(), ", got ", maps.sizes());
  TORCH_CHECK_VALUE(table.device() == images.device(), op, ": table is on ", table.device(), ", images on ",
                    images.device());
  TORCH_CHECK_TYPE(table.scalar_type() == accumulation_dtype(dtype), op, ": table is ", table.scalar_type());
  TORCH_CHECK_VALUE(table.dim() == 2 && table.size(1) == 3 && table.size(0) >= 1 && table.size(0) <= 65536, op,
                    ": table must be (L,3) with L in 1..65536, got ", table.sizes());
  TORCH_CHECK_VALUE(alpha >= 0 && alpha <= 1, op, ": alpha must lie in [0,1], got ", alpha);
  TORCH_CHECK_VALUE(mean.has_value() == std.has_value(), op, ": give both mean and std or neither");
  if (!mean.has_value()) return;
  for (const auto& values : {*mean, *std}) {
    TORCH_CHECK_VALUE(values.size() == 1 || values.size() == 3, op, ": mean and std must hold one number or three, got ",
                      values.size());
  }
}

template <typename A>
OverlayNumbers<A> overlay_numbers(const at::Tensor& table, double alpha, bool is_signed,
                                  const std::optional<at::ArrayRef<double>>& mean,
                                  const std::optional<at::ArrayRef<double>>& std) {
  const A lowest = is_signed ? A(-1) : A(0);
  OverlayNumbers<A> x = {{1, 1, 1}, {0, 0, 0}, A(alpha), lowest, A(table.size(0) - 1) / (A(1) - lowest)};
  for (int c = 0; mean.has_value() && c < 3; ++c) {
    x.scale[c] = A((*std)[std->size() == 1 ? 0 : c]), x.shift[c] = A((*mean)[mean->size() == 1 ? 0 : c]);
  }
  return x;
}

}  // namespace fastcam
