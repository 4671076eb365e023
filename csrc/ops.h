// What every kernel binding shares, on every device: result dtypes and the checks that keep a bare torch.ops call from
// reading out of bounds. The friendly messages are in fastcam/ops/; these are the last line of defence.
#pragma once

#include "aten.h"

namespace fastcam {

inline at::ScalarType accumulation_dtype(at::ScalarType dtype) {
  return dtype == at::kDouble ? at::kDouble : at::kFloat;
}

inline bool needs_grad(const at::Tensor& t) { return t.defined() && t.requires_grad(); }

// A raw kernel's result would claim to be differentiable and then yield no gradient.
template <typename... Tensors>
void refuse_grad(const char* op, const Tensors&... tensors) {
  TORCH_CHECK(!(at::GradMode::is_enabled() && (needs_grad(tensors) || ...)), "torch.ops.fastcam.", op,
              " is not differentiable; call fastcam.ops.", op, ", detach the inputs, or call under torch.no_grad()");
}

// For an op without a gradient, however it is called.
template <typename... Tensors>
void check_no_grad(const char* op, const Tensors&... tensors) {
  TORCH_CHECK(!(at::GradMode::is_enabled() && (needs_grad(tensors) || ...)), "fastcam.ops.", op,
              " is not differentiable; detach the inputs, or call under torch.no_grad()");
}

inline void check_features(const char* op, const at::Tensor& features, const char* name = "features",
                           const char* shape = "(B,K,H,W)") {
  TORCH_CHECK_VALUE(features.dim() == 4, op, ": ", name, " must be ", shape, ", got ", features.sizes());
  TORCH_CHECK_VALUE(features.size(1) > 0 && features.size(2) > 0 && features.size(3) > 0, op, ": ", name,
                    " need at least one channel, row and column, got ", features.sizes());
}

inline void check_companion(const char* op, const char* name, const at::Tensor& value, const at::Tensor& features,
                            const char* of = "features") {
  TORCH_CHECK_VALUE(value.device() == features.device(), op, ": ", name, " is on ", value.device(), ", ", of, " on ",
                    features.device());
  TORCH_CHECK_TYPE(value.scalar_type() == features.scalar_type() ||
                       value.scalar_type() == accumulation_dtype(features.scalar_type()),
                   op, ": ", name, " is ", value.scalar_type(), ", ", of, " are ", features.scalar_type());
}

inline void check_reference(const char* op, const at::Tensor& reference, const at::Tensor& features,
                            const char* of = "features") {
  if (!reference.defined()) return;
  check_companion(op, "reference", reference, features, of);
  TORCH_CHECK_VALUE(reference.dim() == features.dim() && reference.sizes().slice(1) == features.sizes().slice(1) &&
                        (reference.size(0) == 1 || reference.size(0) == features.size(0)),
                    op, ": reference must be ", features.sizes(), " or have batch 1, got ", reference.sizes());
}

// A value for every element of the inputs, a reference of the same type, one dimension or more.
inline void check_elementwise(const char* op, const at::Tensor& multipliers, const at::Tensor& inputs,
                              const at::Tensor& reference) {
  TORCH_CHECK_VALUE(inputs.dim() > 0, op, ": inputs must be (B,...), got 0 dimensions");
  check_companion(op, "multipliers", multipliers, inputs, "inputs");
  TORCH_CHECK_VALUE(multipliers.sizes() == inputs.sizes(), op, ": multipliers must be ", inputs.sizes(), ", got ",
                    multipliers.sizes());
  check_reference(op, reference, inputs, "inputs");
  TORCH_CHECK_TYPE(reference.scalar_type() == inputs.scalar_type(), op, ": reference is ", reference.scalar_type(),
                   ", inputs are ", inputs.scalar_type());
}

// (B,K,H,W) or (B,T,K,H,W) for features (B,K,H,W).
inline void check_positional(const char* op, const char* name, const at::Tensor& value, const at::Tensor& features) {
  const bool fits = (value.dim() == 4 || value.dim() == 5) && value.size(0) == features.size(0) &&
                    value.sizes().slice(value.dim() - 3) == features.sizes().slice(1);
  TORCH_CHECK_VALUE(fits, op, ": ", name, " must end in ", features.sizes().slice(1), ", got ", value.sizes());
}

// True for channels_last images; any layout that is neither counts as NCHW.
inline bool is_channels_last(const at::Tensor& images) {
  return !images.is_contiguous() && images.is_contiguous(at::MemoryFormat::ChannelsLast);
}

}  // namespace fastcam
