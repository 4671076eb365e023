// Binding of relevance_budgets.cuh to PyTorch.
#include "cuda/relevance_budgets.cuh"

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "aten.h"
#include "cuda/tensors.h"
#include "relevance.h"

namespace fastcam::cuda {

using at::Tensor;

Tensor relevance_budgets(const Tensor& relevance) {
  const char* op = "relevance_budgets";
  check_relevance(op, "relevance", relevance);
  const c10::cuda::CUDAGuard guard(relevance.device());
  const auto options = relevance.options().dtype(accumulation_dtype(relevance.scalar_type()));
  if (relevance.numel() == 0) return fastcam::zeros({relevance.size(0), 2}, options);
  const Tensor out = fastcam::empty({relevance.size(0), 2}, options);
  const Tensor r = images_in_sequence(relevance) ? relevance : relevance.contiguous();
  const int64_t batch = r.size(0), length = r.numel() / batch;
  const Tensor scratch = fastcam::empty({scratch_of_budgets(batch, length)}, options);
  by_element_type(op, r, [&](auto zero) {
    using T = decltype(zero);
    using A = Accumulate<T>;
    C10_CUDA_CHECK(run_relevance_budgets(elements<T>(r), fresh_elements<A>(out), fresh_elements<A>(scratch), batch, length,
                                         c10::cuda::getCurrentCUDAStream().stream()));
  });
  return out;
}

}  // namespace fastcam::cuda
