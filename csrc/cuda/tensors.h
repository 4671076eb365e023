// How the CUDA bindings read tensors: one dense memory order for all tensors of a call.
#pragma once


#include <tuple>

#include "aten.h"
#include "cuda/common.cuh"
#include "ops.h"

namespace fastcam::cuda {

// f, with a value of the type of x's elements.
template <typename F>
void by_element_type(const char* op, const at::Tensor& x, F f) {
  switch (x.scalar_type()) {
    case at::kDouble: return f(double());
    case at::kFloat: return f(float());
    case at::kHalf: return f(__half());
    case at::kBFloat16: return f(__nv_bfloat16());
    default: TORCH_CHECK_TYPE(false, op, ": dtype must be float64, float32, float16 or bfloat16, got ", x.scalar_type());
  }
}

// Null for no tensor.
template <typename T>
const T* elements(const at::Tensor& x) {
  return x.defined() ? static_cast<const T*>(x.const_data_ptr()) : nullptr;
}

template <typename T>
T* fresh_elements(const at::Tensor& x) {
  return x.defined() ? static_cast<T*>(x.mutable_data_ptr()) : nullptr;
}

// (B,K,H,W) or (B,T,K,H,W) as dense images in the given order; copies only what does not lie so.
inline at::Tensor dense_images(const at::Tensor& x, bool channels_last) {
  const at::Tensor images = x.dim() == 5 ? x.flatten(0, 1) : x;
  return images.contiguous(channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous);
}

// A tensor of images and its reference in one element type. Multipliers in the accumulation type beside half features:
// the features are widened rather than the multipliers' digits lost, at the cost of a copy.
inline std::tuple<at::Tensor, at::Tensor> widened_with(const at::Tensor& other, at::Tensor features, at::Tensor reference) {
  if (other.scalar_type() != features.scalar_type()) features = features.to(other.scalar_type());
  if (reference.defined()) reference = reference.to(features.scalar_type());
  return {features, reference};
}

}  // namespace fastcam::cuda
