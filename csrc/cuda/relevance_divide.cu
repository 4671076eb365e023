// Binding of relevance_divide.cuh to PyTorch.
#include "cuda/relevance_divide.cuh"

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "aten.h"
#include "cuda/tensors.h"
#include "relevance.h"

namespace fastcam::cuda {

using at::Tensor;

Tensor relevance_divide(const Tensor& relevance, const Tensor& divisor, const std::optional<Tensor>& factor,
                        double epsilon) {
  const char* op = "relevance_divide";
  check_relevance(op, "relevance", relevance);
  check_alike(op, "divisor", divisor, relevance);
  if (factor) check_alike(op, "factor", *factor, relevance);
  const c10::cuda::CUDAGuard guard(relevance.device());
  const Tensor out = fastcam::empty_like(relevance);
  if (out.numel() == 0) return out;
  const Tensor r = in_order_of(out, relevance), d = in_order_of(out, divisor);
  const Tensor f = factor ? in_order_of(out, *factor) : Tensor();
  by_element_type(op, out, [&](auto zero) {
    using T = decltype(zero);
    C10_CUDA_CHECK(run_relevance_divide(elements<T>(r), elements<T>(d), elements<T>(f), fresh_elements<T>(out),
                                        out.numel(), epsilon, c10::cuda::getCurrentCUDAStream().stream()));
  });
  return out;
}

}  // namespace fastcam::cuda
