// Binding of relevance_equilibrium.cuh to PyTorch.
#include "cuda/relevance_equilibrium.cuh"

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "aten.h"
#include "cuda/tensors.h"
#include "relevance.h"

namespace fastcam::cuda {

using at::Tensor;

Tensor relevance_equilibrium(const Tensor& relevance, const Tensor& budgets, const Tensor& divisors, double ratio) {
  const char* op = "relevance_equilibrium";
  check_relevance(op, "relevance", relevance);
  check_budgets(op, budgets, relevance);
  check_alike(op, "divisors", divisors, relevance, 3);
  const c10::cuda::CUDAGuard guard(relevance.device());
  const Tensor result = fastcam::empty_like(divisors);
  if (result.numel() == 0) return result;
  const bool direct = images_in_sequence(result);
  const Tensor out = direct ? result : fastcam::empty(divisors.sizes(), divisors.options());
  const Tensor r = in_image_order_of(out, relevance), z = in_order_of(out, divisors), b = budgets.contiguous();
  by_element_type(op, out, [&](auto zero) {
    using T = decltype(zero);
    C10_CUDA_CHECK(run_relevance_equilibrium(elements<T>(r), elements<Accumulate<T>>(b), elements<T>(z),
                                             fresh_elements<T>(out), r.size(0), r.numel() / r.size(0), ratio,
                                             c10::cuda::getCurrentCUDAStream().stream()));
  });
  if (!direct) result.copy_(out);
  return result;
}

}  // namespace fastcam::cuda
