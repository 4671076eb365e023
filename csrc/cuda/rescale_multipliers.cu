// Binding of rescale_multipliers.cuh to PyTorch.
#include "cuda/rescale_multipliers.cuh"

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "aten.h"
#include "ops.h"
#include "order.h"

namespace fastcam::cuda {
namespace {

using at::Tensor;

template <typename T, typename G>
void compute(const Runs& runs, const Tensor& out, double negative_slope) {
  RescaleArgs<T, G> x = {};
  x.multipliers = static_cast<const G*>(runs.multipliers.const_data_ptr());
  x.inputs = static_cast<const T*>(runs.inputs.const_data_ptr());
  x.reference = static_cast<const T*>(runs.reference.const_data_ptr());
  x.out = static_cast<G*>(out.mutable_data_ptr());
  x.runs = runs.runs, x.length = runs.length;
  x.negative_slope = static_cast<Accumulate<T>>(negative_slope);
  C10_CUDA_CHECK(run_rescale_multipliers(x, c10::cuda::getCurrentCUDAStream().stream()));
}

template <typename T>
void compute_half(const Runs& x, const Tensor& out, double negative_slope) {
  out.scalar_type() == at::kFloat ? compute<T, float>(x, out, negative_slope) : compute<T, T>(x, out, negative_slope);
}

}  // namespace

Tensor rescale_multipliers(const Tensor& multipliers, const Tensor& inputs, const Tensor& reference,
                           double negative_slope) {
  const char* op = "rescale_multipliers";
  refuse_grad(op, multipliers, inputs, reference);
  check_elementwise(op, multipliers, inputs, reference);
  const c10::cuda::CUDAGuard guard(inputs.device());
  const Tensor out = fastcam::empty_like(multipliers);
  if (out.numel() == 0) return out;
  const Runs x = as_runs(out, multipliers, inputs, reference);
  switch (inputs.scalar_type()) {
    case at::kDouble: compute<double, double>(x, out, negative_slope); break;
    case at::kFloat: compute<float, float>(x, out, negative_slope); break;
    case at::kHalf: compute_half<__half>(x, out, negative_slope); break;
    case at::kBFloat16: compute_half<__nv_bfloat16>(x, out, negative_slope); break;
    default:
      TORCH_CHECK_TYPE(false, op, ": inputs must be float64, float32, float16 or bfloat16, got ", inputs.scalar_type());
  }
  return out;
}

}  // namespace fastcam::cuda
