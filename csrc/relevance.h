// What the bindings of the relevance_* ops share, on every device: checks and memory orders.
#pragma once

#include <c10/util/strides.h>

#include <vector>

#include "aten.h"
#include "ops.h"
#include "order.h"

namespace fastcam {

inline void check_relevance(const char* op, const char* name, const at::Tensor& x) {
  TORCH_CHECK_VALUE(x.dim() >= 2, op, ": ", name, " must be (B,C,...), got ", x.sizes());
  check_no_grad(op, x);
}

// A tensor of the type and device of `like`, with `times` its batch.
inline void check_alike(const char* op, const char* name, const at::Tensor& x, const at::Tensor& like, int64_t times = 1) {
  TORCH_CHECK_VALUE(x.device() == like.device(), op, ": ", name, " is on ", x.device(), ", expected ", like.device());
  TORCH_CHECK_TYPE(x.scalar_type() == like.scalar_type(), op, ": ", name, " is ", x.scalar_type(), ", expected ",
                   like.scalar_type());
  TORCH_CHECK_VALUE(x.dim() == like.dim() && x.sizes().slice(1) == like.sizes().slice(1) &&
                        x.size(0) == times * like.size(0),
                    op, ": ", name, " must be ", times, " times the batch of ", like.sizes(), ", got ", x.sizes());
  check_no_grad(op, x);
}

inline void check_budgets(const char* op, const at::Tensor& budgets, const at::Tensor& like) {
  TORCH_CHECK_VALUE(budgets.device() == like.device() && budgets.dim() == 2 && budgets.size(0) == like.size(0) &&
                        budgets.size(1) == 2,
                    op, ": budgets must be (", like.size(0), ", 2) on ", like.device(), ", got ", budgets.sizes(), " on ",
                    budgets.device());
  TORCH_CHECK_TYPE(budgets.scalar_type() == accumulation_dtype(like.scalar_type()), op, ": budgets are ",
                   budgets.scalar_type());
  check_no_grad(op, budgets);
}

// Whether images lie densely one after the other, in whatever order each has its elements.
inline bool images_in_sequence(const at::Tensor& x) {
  return x.is_non_overlapping_and_dense() && (x.size(0) < 2 || x.stride(0) * x.size(0) == x.numel());
}

// x, of any number of images, in the order of `out`, whose images lie in sequence.
inline at::Tensor in_image_order_of(const at::Tensor& out, const at::Tensor& x) {
  auto strides = out.strides().vec();
  strides[0] = out.numel() / out.size(0);
  return with_strides(strides, x);
}

// Of relevance_split's result, and its strides.
inline at::MemoryFormat split_format(const at::Tensor& x) {
  const auto last = x.dim() == 5 ? at::MemoryFormat::ChannelsLast3d : at::MemoryFormat::ChannelsLast;
  const bool four = x.dim() == 4 || x.dim() == 5;
  return four && !x.is_contiguous() && x.is_contiguous(last) ? last : at::MemoryFormat::Contiguous;
}

inline std::vector<int64_t> split_strides(at::IntArrayRef sizes, at::MemoryFormat format) {
  if (format == at::MemoryFormat::ChannelsLast) return c10::get_channels_last_strides_2d(sizes);
  if (format == at::MemoryFormat::ChannelsLast3d) return c10::get_channels_last_strides_3d(sizes);
  const auto strides = c10::contiguous_strides(sizes);
  return {strides.begin(), strides.end()};
}

}  // namespace fastcam
