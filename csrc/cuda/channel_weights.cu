// Binding of channel_weights.cuh to PyTorch.
#include "cuda/channel_weights.cuh"

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "aten.h"
#include "cuda/tensors.h"
#include "ops.h"

namespace fastcam::cuda {
namespace {

using at::Tensor;

Mode mode_of(const char* op, std::string_view name) {
  if (name == "mean") return Mode::mean;
  if (name == "sum") return Mode::sum;
  if (name == "xgrad") return Mode::xgrad;
  TORCH_CHECK_VALUE(name == "grad_cam_pp", op, ": mode must be mean, sum, xgrad or grad_cam_pp, got ", name);
  return Mode::grad_cam_pp;
}

template <typename T>
void compute(const Tensor& features, const Tensor& multipliers, const Tensor& reference, const Tensor& out, Mode mode,
             bool channels_last) {
  using A = Accumulate<T>;
  WeightArgs<T> x = {};
  x.features = static_cast<const T*>(features.const_data_ptr());
  x.reference = reference.defined() ? static_cast<const T*>(reference.const_data_ptr()) : nullptr;
  x.multipliers = static_cast<const T*>(multipliers.const_data_ptr());
  x.out = out.mutable_data_ptr<A>();
  x.channels = features.size(1), x.positions = features.size(2) * features.size(3);
  x.maps = out.numel() / x.channels, x.targets = x.maps / features.size(0);
  x.reference_batch = reference.defined() && reference.size(0) > 1 ? x.channels * x.positions : 0;
  x.mode = mode;
  const WeightPlan<T> plan = plan_channel_weights(x, channels_last);
  const Tensor scratch = fastcam::empty(plan.scratch, out.options());
  C10_CUDA_CHECK(run_channel_weights(plan, scratch.mutable_data_ptr<A>(), c10::cuda::getCurrentCUDAStream().stream()));
}

}  // namespace

Tensor channel_weights(const Tensor& features, const Tensor& multipliers, const std::optional<Tensor>& reference,
                       std::string_view mode) {
  const char* op = "channel_weights";
  const Tensor ref = reference.value_or(Tensor());
  refuse_grad(op, features, multipliers, ref);
  check_features(op, features);
  check_companion(op, "multipliers", multipliers, features);
  check_positional(op, "multipliers", multipliers, features);
  check_reference(op, ref, features);
  const Mode wanted = mode_of(op, mode);

  const c10::cuda::CUDAGuard guard(features.device());
  const Tensor out = fastcam::empty(multipliers.sizes().slice(0, multipliers.dim() - 2),
                               features.options().dtype(accumulation_dtype(features.scalar_type())));
  if (out.numel() == 0) return out;
  // A mean never reads the features: the multipliers' own type and order are what matters then.
  const bool unread = wanted == Mode::mean;
  const Tensor g = multipliers.dim() == 5 ? multipliers.flatten(0, 1) : multipliers;
  const bool channels_last = is_channels_last(unread ? g : features);
  const auto [wide, wide_ref] = unread ? std::tuple(g, Tensor()) : widened_with(multipliers, features, ref);
  const Tensor m = dense_images(g, channels_last);
  const Tensor f = unread ? m : dense_images(wide, channels_last);
  const Tensor r = wide_ref.defined() ? dense_images(wide_ref, channels_last) : wide_ref;
  switch (m.scalar_type()) {
    case at::kDouble: compute<double>(f, m, r, out, wanted, channels_last); break;
    case at::kFloat: compute<float>(f, m, r, out, wanted, channels_last); break;
    case at::kHalf: compute<__half>(f, m, r, out, wanted, channels_last); break;
    case at::kBFloat16: compute<__nv_bfloat16>(f, m, r, out, wanted, channels_last); break;
    default:
      TORCH_CHECK_TYPE(false, op, ": features must be float64, float32, float16 or bfloat16, got ", m.scalar_type());
  }
  return out;
}

}  // namespace fastcam::cuda
