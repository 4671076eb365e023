// Binding of relevance_add.cuh to PyTorch.
#include "cuda/relevance_add.cuh"

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "aten.h"
#include "cuda/tensors.h"
#include "relevance.h"

namespace fastcam::cuda {

using at::Tensor;

std::tuple<Tensor, Tensor> relevance_add(const Tensor& relevance, const Tensor& first, const Tensor& second,
                                         const std::optional<Tensor>& factor, double epsilon) {
  const char* op = "relevance_add";
  check_relevance(op, "relevance", relevance);
  check_alike(op, "first", first, relevance);
  check_alike(op, "second", second, relevance);
  if (factor) check_alike(op, "factor", *factor, relevance);
  const c10::cuda::CUDAGuard guard(relevance.device());
  const Tensor out = fastcam::empty_like(relevance), other = fastcam::empty_like(relevance);
  if (out.numel() == 0) return {out, other};
  const Tensor r = in_order_of(out, relevance), a = in_order_of(out, first), b = in_order_of(out, second);
  const Tensor f = factor ? in_order_of(out, *factor) : Tensor();
  by_element_type(op, out, [&](auto zero) {
    using T = decltype(zero);
    C10_CUDA_CHECK(run_relevance_add(elements<T>(r), elements<T>(a), elements<T>(b), elements<T>(f),
                                     fresh_elements<T>(out), fresh_elements<T>(other), out.numel(), epsilon,
                                     c10::cuda::getCurrentCUDAStream().stream()));
  });
  return {out, other};
}

}  // namespace fastcam::cuda
