// How the bindings of the lfi_* ops read and write tensors like the features.
#pragma once

#include "cuda/lfi_common.cuh"
#include "cuda/tensors.h"
#include "lfi.h"
#include "order.h"

namespace fastcam::cuda {

// Features as dense images; a result like them, and what is written: that result if it lies as they do, else a stand-in.
struct LfiTensors {
  bool channels_last;
  at::Tensor features, result, out;

  explicit LfiTensors(const at::Tensor& given)
      : channels_last(is_channels_last(given)), features(dense_images(given, channels_last)), result(fastcam::empty_like(given)) {
    out = lies_as(result, features.strides()) ? result : fastcam::empty_like(features);
  }

  at::Tensor like_features(const at::Tensor& x) const { return dense_images(x, channels_last); }

  LfiShape shape() const {
    return {features.size(0), features.size(1), features.size(2) * features.size(3), channels_last};
  }

  at::Tensor finished() const { return out.is_same(result) ? result : result.copy_(out); }
};

}  // namespace fastcam::cuda
