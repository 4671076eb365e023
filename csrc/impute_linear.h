// What the CPU and CUDA bindings of impute_linear share: last-line checks.
#pragma once

#include "impute_linear_formulas.h"
#include "ops.h"

namespace fastcam {

inline void check_impute_linear(const at::Tensor& images, const at::Tensor& missing, int64_t iterations) {
  const char* op = "impute_linear";
  check_no_grad(op, images);
  check_features(op, images, "images", "(N,C,H,W)");
  TORCH_CHECK_TYPE(missing.scalar_type() == at::kBool, op, ": missing must be bool, got ", missing.scalar_type());
  TORCH_CHECK_VALUE(missing.device() == images.device(), op, ": missing is on ", missing.device(), ", images on ",
                    images.device());
  TORCH_CHECK_VALUE(missing.dim() == 3 && missing.size(0) == images.size(0) && missing.size(1) == images.size(2) &&
                        missing.size(2) == images.size(3),
                    op, ": missing must fit images ", images.sizes(), ", got ", missing.sizes());
  TORCH_CHECK_VALUE(iterations >= 1 && iterations < (int64_t{1} << 31), op, ": iterations must be at least 1, got ",
                    iterations);
  const auto dtype = images.scalar_type();
  TORCH_CHECK_TYPE(dtype == at::kDouble || dtype == at::kFloat || dtype == at::kHalf || dtype == at::kBFloat16, op,
                   ": images must be float64, float32, float16 or bfloat16, got ", dtype);
}

}  // namespace fastcam
