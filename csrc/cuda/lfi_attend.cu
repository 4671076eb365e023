// Binding of lfi_attend.cuh to PyTorch.
#include "cuda/lfi_attend.cuh"

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "aten.h"
#include "cuda/lfi_tensors.h"

namespace fastcam::cuda {

using at::Tensor;

std::tuple<Tensor, Tensor, Tensor> lfi_attend(const Tensor& features, const Tensor& importance,
                                              std::string_view constant_map) {
  const char* op = "lfi_attend";
  refuse_grad(op, features, importance);
  check_features(op, features);
  check_importance(op, importance, features);
  const bool keeps = keeps_constant(op, constant_map);
  const c10::cuda::CUDAGuard guard(features.device());
  const LfiTensors x(features);
  const auto options = features.options().dtype(accumulation_dtype(features.scalar_type()));
  const Tensor attention = fastcam::empty({features.size(0), 1, features.size(2), features.size(3)}, options);
  const Tensor raw = fastcam::empty(attention.sizes(), options);
  if (x.result.numel() == 0) return {x.result, attention, raw};
  const Tensor s = widened(importance);
  by_element_type(op, x.features, [&](auto zero) {
    using T = decltype(zero);
    using A = Accumulate<T>;
    LfiAttendArgs<T> args = {};
    args.features = elements<T>(x.features), args.importance = elements<A>(s), args.out = fresh_elements<T>(x.out);
    args.attention = fresh_elements<A>(attention), args.raw = fresh_elements<A>(raw);
    args.shape = x.shape(), args.keeps_constant = keeps;
    const auto plan = plan_lfi_attend(args);
    const Tensor partials = fastcam::empty(plan.partials, options);
    C10_CUDA_CHECK(
        run_lfi_attend(plan, args, fresh_elements<A>(partials), c10::cuda::getCurrentCUDAStream().stream()));
  });
  return {x.finished(), attention, raw};
}

}  // namespace fastcam::cuda
