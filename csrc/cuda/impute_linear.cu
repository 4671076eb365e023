// Binding of impute_linear.cuh to PyTorch.
#include "cuda/impute_linear.cuh"

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "aten.h"
#include "cuda/tensors.h"
#include "impute_linear.h"

namespace fastcam::cuda {

using at::Tensor;

Tensor impute_linear(const Tensor& images, const Tensor& missing, int64_t iterations) {
  check_impute_linear(images, missing, iterations);
  const int64_t height = images.size(2), width = images.size(3), systems = images.size(0) * images.size(1);
  const auto plan = plan_impute_linear(systems, height, width);
  TORCH_CHECK_VALUE(plan.shape.offset[plan.shape.levels] < (int64_t{1} << 31),
                    "impute_linear: one image must have fewer than 3/4 2^31 pixels, got ", images.sizes());
  const c10::cuda::CUDAGuard guard(images.device());
  const Tensor out = fastcam::empty(images.sizes(), images.options(), at::MemoryFormat::Contiguous);
  if (out.numel() == 0) return out;
  const Tensor pixels = images.contiguous(), holes = missing.contiguous();
  const auto options = images.options().dtype(accumulation_dtype(images.scalar_type()));
  const Tensor scratch = fastcam::empty(plan.values, options), weights = fastcam::empty(plan.weights, options.dtype(at::kByte));
  by_element_type("impute_linear", pixels, [&](auto zero) {
    using T = decltype(zero);
    ImputeArgs<T> x = {};
    x.images = elements<T>(pixels), x.missing = elements<bool>(holes), x.out = fresh_elements<T>(out);
    x.scratch = fresh_elements<Accumulate<T>>(scratch), x.weights = fresh_elements<uint8_t>(weights);
    x.systems = systems, x.channels = images.size(1), x.height = int(height), x.width = int(width);
    x.iterations = int(iterations);
    C10_CUDA_CHECK(run_impute_linear(plan, x, c10::cuda::getCurrentCUDAStream().stream()));
  });
  return out;
}

}  // namespace fastcam::cuda
