// Binding of relevance_combine.cuh to PyTorch.
#include "cuda/relevance_combine.cuh"

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "aten.h"
#include "cuda/tensors.h"
#include "relevance.h"

namespace fastcam::cuda {

using at::Tensor;

Tensor relevance_combine(const Tensor& inputs, const Tensor& parts, const Tensor& budgets, bool shift,
                         double threshold) {
  const char* op = "relevance_combine";
  check_relevance(op, "inputs", inputs);
  check_alike(op, "parts", parts, inputs, 3);
  check_budgets(op, budgets, inputs);
  const c10::cuda::CUDAGuard guard(inputs.device());
  const Tensor result = fastcam::empty_like(inputs);
  if (result.numel() == 0) return result;
  const bool direct = images_in_sequence(result);
  const Tensor out = direct ? result : fastcam::empty(inputs.sizes(), inputs.options());
  const Tensor x = in_order_of(out, inputs), t = in_image_order_of(out, parts), b = budgets.contiguous();
  const int64_t batch = x.size(0), length = x.numel() / batch;
  Tensor counts, units;
  if (shift) {
    counts = fastcam::empty(batch * sum_chunks_of(length), x.options().dtype(at::kInt));
    units = fastcam::empty(batch, b.options());
  }
  by_element_type(op, x, [&](auto zero) {
    using T = decltype(zero);
    using A = Accumulate<T>;
    CombineArgs<T> args = {};
    args.inputs = elements<T>(x), args.parts = elements<T>(t), args.budgets = elements<A>(b);
    args.out = fresh_elements<T>(out), args.counts = fresh_elements<int>(counts), args.units = fresh_elements<A>(units);
    args.batch = batch, args.length = length, args.threshold = threshold;
    C10_CUDA_CHECK(run_relevance_combine(args, c10::cuda::getCurrentCUDAStream().stream()));
  });
  if (!direct) result.copy_(out);
  return result;
}

}  // namespace fastcam::cuda
