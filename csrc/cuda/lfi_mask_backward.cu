// Binding of lfi_mask_backward.cuh to PyTorch.
#include "cuda/lfi_mask_backward.cuh"

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "aten.h"
#include "cuda/lfi_tensors.h"

namespace fastcam::cuda {

using at::Tensor;

Tensor lfi_mask_backward(const Tensor& grad, const Tensor& features, const Tensor& grey) {
  const char* op = "lfi_mask_backward";
  check_no_grad(op, grad, features, grey);
  check_features(op, features);
  check_grad(op, "grad", grad, features);
  check_map(op, "grey", grey, features);
  const c10::cuda::CUDAGuard guard(features.device());
  const LfiTensors x(features);
  if (x.result.numel() == 0) return x.result;
  const Tensor dense = x.like_features(grad), g = widened(grey);
  by_element_type(op, x.features, [&](auto zero) {
    using T = decltype(zero);
    const LfiMaskBackwardArgs<T> args = {elements<T>(dense), elements<T>(x.features), elements<Accumulate<T>>(g),
                                         fresh_elements<T>(x.out), x.shape()};
    C10_CUDA_CHECK(run_lfi_mask_backward(args, c10::cuda::getCurrentCUDAStream().stream()));
  });
  return x.finished();
}

}  // namespace fastcam::cuda
