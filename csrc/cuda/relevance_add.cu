// Binding of relevance_add.cuh to PyTorch.
#include "cuda/relevance_add.cuh"

#include <ATen/ATen.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "cuda/tensors.h"
#include "relevance.h"

namespace fastcam::cuda {
namespace {

using at::Tensor;

std::tuple<Tensor, Tensor> relevance_add(const Tensor& relevance, const Tensor& first, const Tensor& second,
                                         const std::optional<Tensor>& factor, double epsilon) {
  const char* op = "relevance_add";
  check_relevance(op, "relevance", relevance);
  check_alike(op, "first", first, relevance);
  check_alike(op, "second", second, relevance);
  if (factor) check_alike(op, "factor", *factor, relevance);
  const c10::cuda::CUDAGuard guard(relevance.device());
  const Tensor out = at::empty_like(relevance), other = at::empty_like(relevance);
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

}  // namespace

TORCH_LIBRARY_IMPL(fastcam, CUDA, m) { m.impl("relevance_add", relevance_add); }

}  // namespace fastcam::cuda
