// Binding of cam_map.cuh to PyTorch.
#include "cuda/cam_map.cuh"

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <vector>

#include "aten.h"
#include "cuda/tensors.h"
#include "ops.h"

namespace fastcam::cuda {
namespace {

using at::Tensor;

template <typename T>
void compute(CamMapArgs<T> x, const Tensor& features, const Tensor& weights, const Tensor& reference, const Tensor& maps,
             const Tensor& raw, const Tensor& finite) {
  using A = Accumulate<T>;
  x.features = static_cast<const T*>(features.const_data_ptr());
  x.reference = reference.defined() ? static_cast<const T*>(reference.const_data_ptr()) : nullptr;
  x.weights = weights.const_data_ptr();
  x.maps = maps.mutable_data_ptr<A>(), x.raw = raw.mutable_data_ptr<A>(), x.finite = finite.mutable_data_ptr<bool>();
  const CamMapPlan<T> plan = plan_cam_map(x);
  const Tensor partials = fastcam::empty(plan.partials, raw.options()), stats = fastcam::empty(plan.stats, raw.options());
  C10_CUDA_CHECK(run_cam_map(plan, partials.mutable_data_ptr<A>(), stats.mutable_data_ptr<A>(), x,
                             c10::cuda::getCurrentCUDAStream().stream()));
}

// The shape, layout and options, for any element type.
template <typename T>
CamMapArgs<T> retyped(const CamMapArgs<float>& x) {
  CamMapArgs<T> y = {};
  y.batch = x.batch, y.targets = x.targets, y.channels = x.channels;
  y.height = x.height, y.width = x.width, y.out_height = x.out_height, y.out_width = x.out_width;
  y.shared_reference = x.shared_reference, y.positional = x.positional, y.channels_last = x.channels_last;
  y.relu = x.relu, y.normalize = x.normalize;
  return y;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> cam_map(const Tensor& features, const Tensor& weights,
                                           const std::optional<Tensor>& reference, bool relu, bool normalize,
                                           at::OptionalSymIntArrayRef size) {
  const char* op = "cam_map";
  Tensor ref = reference.value_or(Tensor());
  refuse_grad(op, features, weights, ref);
  check_features(op, features);
  check_companion(op, "weights", weights, features);
  check_reference(op, ref, features);
  CamMapArgs<float> x = {};
  x.positional = weights.dim() >= 4;
  if (x.positional) {
    check_positional(op, "weights", weights, features);
  } else {
    TORCH_CHECK_VALUE((weights.dim() == 2 || weights.dim() == 3) && weights.size(0) == features.size(0) &&
                          weights.size(-1) == features.size(1),
                      op, ": weights must be (B,K) or (B,T,K) for features ", features.sizes(), ", got ", weights.sizes());
  }
  const bool has_targets = weights.dim() == 3 || weights.dim() == 5;
  int64_t height = features.size(2), width = features.size(3), out_height = height, out_width = width;
  if (size.has_value()) {
    TORCH_CHECK_VALUE(size->size() == 2, op, ": size must be (height, width), got ", *size);
    out_height = (*size)[0].guard_int(__FILE__, __LINE__);
    out_width = (*size)[1].guard_int(__FILE__, __LINE__);
    TORCH_CHECK_VALUE(out_height > 0 && out_width > 0, op, ": size must be positive, got ", out_height, " x ", out_width);
  }
  const int64_t limit = int64_t(1) << 31;
  TORCH_CHECK_VALUE(height < limit / width && out_height < limit / out_width, op, ": one map must have fewer than 2^31 ",
                    "positions, got ", height, " x ", width, " resized to ", out_height, " x ", out_width);
  x.batch = features.size(0), x.targets = has_targets ? weights.size(1) : 1, x.channels = features.size(1);
  x.height = int(height), x.width = int(width), x.out_height = int(out_height), x.out_width = int(out_width);
  x.relu = relu, x.normalize = normalize;

  const c10::cuda::CUDAGuard guard(features.device());
  const auto acc = accumulation_dtype(features.scalar_type());
  std::vector<int64_t> shape = {x.batch};
  if (has_targets) shape.push_back(x.targets);
  const Tensor finite = fastcam::empty(shape, features.options().dtype(at::kBool));
  shape.insert(shape.end(), {height, width});
  const Tensor raw = fastcam::empty(shape, features.options().dtype(acc));
  *(shape.end() - 2) = out_height, shape.back() = out_width;
  const Tensor maps = fastcam::empty(shape, features.options().dtype(acc));
  if (x.batch == 0 || x.targets == 0) return {maps, raw, finite};

  x.channels_last = is_channels_last(features);
  x.shared_reference = ref.defined() && ref.size(0) == 1;
  const Tensor w = x.positional ? dense_images(weights, x.channels_last) : weights.to(acc).contiguous();
  const auto [wide, wide_ref] = widened_with(x.positional ? weights : features, features, ref);
  const Tensor f = dense_images(wide, x.channels_last);
  const Tensor r = wide_ref.defined() ? dense_images(wide_ref, x.channels_last) : wide_ref;
  switch (f.scalar_type()) {
    case at::kDouble: compute(retyped<double>(x), f, w, r, maps, raw, finite); break;
    case at::kFloat: compute(x, f, w, r, maps, raw, finite); break;
    case at::kHalf: compute(retyped<__half>(x), f, w, r, maps, raw, finite); break;
    case at::kBFloat16: compute(retyped<__nv_bfloat16>(x), f, w, r, maps, raw, finite); break;
    default:
      TORCH_CHECK_TYPE(false, op, ": features must be float64, float32, float16 or bfloat16, got ", f.scalar_type());
  }
  return {maps, raw, finite};
}

}  // namespace fastcam::cuda
