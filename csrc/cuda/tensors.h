// How the CUDA bindings read tensors: one dense memory order for all tensors of a call.
#pragma once

#include <ATen/ATen.h>

#include <tuple>

#include "ops.h"

namespace fastcam::cuda {

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
