// The parts of ATen the sources use. ATen/ATen.h, ATen/ops/*.h and torch/library.h take several times longer to parse than a
// kernel to compile; the last is needed in register.cpp only, and of ATen/ops the declarations suffice.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like_ops.h>
#include <ATen/ops/empty_ops.h>
#include <ATen/ops/empty_strided_ops.h>
#include <ATen/ops/zeros_ops.h>
#include <c10/core/GradMode.h>

#include <optional>

namespace fastcam {

// Elements a thread should have at least to do, as in ATen's own elementwise kernels.
constexpr int64_t kGrain = 32768;

inline at::Tensor empty(at::IntArrayRef size, const at::TensorOptions& options,
                        std::optional<at::MemoryFormat> format = std::nullopt) {
  return at::_ops::empty_memory_format::call(c10::fromIntArrayRefSlow(size), c10::optTypeMetaToScalarType(options.dtype_opt()),
                                             options.layout_opt(), options.device_opt(), options.pinned_memory_opt(),
                                             format ? format : options.memory_format_opt());
}

inline at::Tensor empty_strided(at::IntArrayRef size, at::IntArrayRef strides, const at::TensorOptions& options) {
  return at::_ops::empty_strided::call(c10::fromIntArrayRefSlow(size), c10::fromIntArrayRefSlow(strides),
                                       c10::optTypeMetaToScalarType(options.dtype_opt()), options.layout_opt(),
                                       options.device_opt(), options.pinned_memory_opt());
}

inline at::Tensor zeros(at::IntArrayRef size, const at::TensorOptions& options) {
  return at::_ops::zeros::call(c10::fromIntArrayRefSlow(size), c10::optTypeMetaToScalarType(options.dtype_opt()),
                               options.layout_opt(), options.device_opt(), options.pinned_memory_opt());
}

// With the strides of `like` where it is dense.
inline at::Tensor empty_like(const at::Tensor& like) {
  return at::_ops::empty_like::call(like, std::nullopt, std::nullopt, std::nullopt, std::nullopt, std::nullopt);
}

}  // namespace fastcam
