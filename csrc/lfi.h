// What the bindings of the lfi_* ops share, on every device: checks of maps and importances.
#pragma once


#include <string_view>

#include "aten.h"
#include "ops.h"

namespace fastcam {

// (B,1,h,w) for features (B,K,h,w).
inline void check_map(const char* op, const char* name, const at::Tensor& map, const at::Tensor& features) {
  check_companion(op, name, map, features);
  TORCH_CHECK_VALUE(map.dim() == 4 && map.size(0) == features.size(0) && map.size(1) == 1 &&
                        map.sizes().slice(2) == features.sizes().slice(2),
                    op, ": ", name, " must be (B,1,h,w) for features ", features.sizes(), ", got ", map.sizes());
}

// The same in the accumulation type.
inline void check_wide_map(const char* op, const char* name, const at::Tensor& map, const at::Tensor& features) {
  check_map(op, name, map, features);
  TORCH_CHECK_TYPE(map.scalar_type() == accumulation_dtype(features.scalar_type()), op, ": ", name, " is ",
                   map.scalar_type(), ", features are ", features.scalar_type());
}

inline void check_importance(const char* op, const at::Tensor& importance, const at::Tensor& features) {
  check_companion(op, "importance", importance, features);
  TORCH_CHECK_VALUE(importance.sizes() == features.sizes().slice(0, 2), op, ": importance must be ",
                    features.sizes().slice(0, 2), ", got ", importance.sizes());
}

// A gradient of a tensor like the features.
inline void check_grad(const char* op, const char* name, const at::Tensor& grad, const at::Tensor& features) {
  check_companion(op, name, grad, features);
  TORCH_CHECK_TYPE(grad.scalar_type() == features.scalar_type(), op, ": ", name, " is ", grad.scalar_type(),
                   ", features are ", features.scalar_type());
  TORCH_CHECK_VALUE(grad.sizes() == features.sizes(), op, ": ", name, " must be ", features.sizes(), ", got ", grad.sizes());
}

// Whether a constant map is its own attention; else that is 0.
inline bool keeps_constant(const char* op, std::string_view constant_map) {
  TORCH_CHECK_VALUE(constant_map == "raw" || constant_map == "zeros", op, ": unknown constant_map '", constant_map,
                    "', expected raw or zeros");
  return constant_map == "raw";
}

// A map or importances as kernels read them: contiguous, in the accumulation type; no tensor stays none.
inline at::Tensor widened(const at::Tensor& x) {
  return x.defined() ? x.to(accumulation_dtype(x.scalar_type())).contiguous() : x;
}

}  // namespace fastcam
