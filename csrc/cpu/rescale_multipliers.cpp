// rescale_multipliers on CPUs: flat ranges of the result, the leaf of rescale_multipliers_scale.h.
//
// Every element is computed alone, so results depend neither on the batch nor on the thread count.

#include <ATen/Parallel.h>

#include <algorithm>

#include "aten.h"
#include "cpu/rescale_multipliers_scale.h"
#include "cpu/result_memory.h"
#include "ops.h"
#include "order.h"

namespace fastcam::cpu {
namespace {

using at::Tensor;

template <typename S, typename G>
void compute(const Runs& x, const Tensor& out, double negative_slope) {
  const auto* multipliers = static_cast<const G*>(x.multipliers.const_data_ptr());
  const auto* inputs = static_cast<const S*>(x.inputs.const_data_ptr());
  const auto* reference = static_cast<const S*>(x.reference.const_data_ptr());
  auto* result = static_cast<G*>(out.mutable_data_ptr());
  at::parallel_for(0, out.numel(), kGrain, [&](int64_t begin, int64_t end) {
    while (begin < end) {  // to the end of a run of the reference, at most
      const int64_t offset = begin % x.length;
      RescaleArgs<S, G> args;
      args.multipliers = multipliers + begin, args.inputs = inputs + begin, args.out = result + begin;
      args.reference = reference + offset;
      args.count = std::min(x.length - offset, end - begin);
      args.negative_slope = static_cast<Accumulate<S>>(negative_slope);
      run<Rescale<S, G>>(args);
      begin += args.count;
    }
  });
}

template <typename S>
void compute_half(const Runs& x, const Tensor& out, double negative_slope) {
  out.scalar_type() == at::kFloat ? compute<S, float>(x, out, negative_slope) : compute<S, S>(x, out, negative_slope);
}

}  // namespace

Tensor rescale_multipliers(const Tensor& multipliers, const Tensor& inputs, const Tensor& reference,
                           double negative_slope) {
  const char* op = "rescale_multipliers";
  refuse_grad(op, multipliers, inputs, reference);
  check_elementwise(op, multipliers, inputs, reference);
  const Tensor out = empty_result_like(multipliers);
  if (out.numel() == 0) return out;
  const Runs x = as_runs(out, multipliers, inputs, reference);
  switch (inputs.scalar_type()) {
    case at::kDouble: compute<double, double>(x, out, negative_slope); break;
    case at::kFloat: compute<float, float>(x, out, negative_slope); break;
    case at::kHalf: compute_half<Half>(x, out, negative_slope); break;
    case at::kBFloat16: compute_half<BFloat16>(x, out, negative_slope); break;
    default:
      TORCH_CHECK_TYPE(false, op, ": inputs must be float64, float32, float16 or bfloat16, got ", inputs.scalar_type());
  }
  return out;
}

}  // namespace fastcam::cpu
