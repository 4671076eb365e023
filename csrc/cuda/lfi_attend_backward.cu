// Binding of lfi_attend_backward.cuh to PyTorch.
#include "cuda/lfi_attend_backward.cuh"

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "aten.h"
#include "cuda/lfi_tensors.h"

namespace fastcam::cuda {

using at::Tensor;

std::tuple<Tensor, Tensor> lfi_attend_backward(const Tensor& grad_attended, const std::optional<Tensor>& grad_attention,
                                               const std::optional<Tensor>& grad_raw, const Tensor& features,
                                               const Tensor& importance, const Tensor& attention, const Tensor& raw,
                                               std::string_view constant_map) {
  const char* op = "lfi_attend_backward";
  const Tensor given = grad_attention.value_or(Tensor()), extra = grad_raw.value_or(Tensor());
  check_no_grad(op, grad_attended, given, extra, features, importance, attention, raw);
  check_features(op, features);
  check_grad(op, "grad_attended", grad_attended, features);
  check_importance(op, importance, features);
  check_wide_map(op, "attention", attention, features);
  check_wide_map(op, "raw", raw, features);
  if (given.defined()) check_wide_map(op, "grad_attention", given, features);
  if (extra.defined()) check_wide_map(op, "grad_raw", extra, features);
  const bool keeps = keeps_constant(op, constant_map);
  const c10::cuda::CUDAGuard guard(features.device());
  const LfiTensors x(features);
  const Tensor s = widened(importance), grad_s = fastcam::empty(s.sizes(), s.options());
  if (x.result.numel() == 0) return {x.result, grad_s.to(importance.scalar_type())};
  const Tensor grad = x.like_features(grad_attended);
  const Tensor from_attention = widened(given), from_raw = widened(extra), a = widened(attention), p = widened(raw);
  const Tensor map_gradient = fastcam::empty(p.sizes(), p.options());
  by_element_type(op, x.features, [&](auto zero) {
    using T = decltype(zero);
    using A = Accumulate<T>;
    LfiAttendBackwardArgs<T> args = {};
    args.grad = elements<T>(grad), args.features = elements<T>(x.features), args.importance = elements<A>(s);
    args.grad_attention = elements<A>(from_attention), args.grad_raw = elements<A>(from_raw);
    args.attention = elements<A>(a), args.raw = elements<A>(p), args.out = fresh_elements<T>(x.out);
    args.grad_importance = fresh_elements<A>(grad_s), args.map_gradient = fresh_elements<A>(map_gradient);
    args.shape = x.shape(), args.keeps_constant = keeps;
    const auto plan = plan_lfi_attend_backward(args);
    const Tensor partials = fastcam::empty(plan.partials, p.options());
    C10_CUDA_CHECK(
        run_lfi_attend_backward(plan, args, fresh_elements<A>(partials), c10::cuda::getCurrentCUDAStream().stream()));
  });
  return {x.finished(), grad_s.to(importance.scalar_type())};
}

}  // namespace fastcam::cuda
