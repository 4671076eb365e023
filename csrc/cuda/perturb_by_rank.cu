// Binding of perturb_by_rank.cuh to PyTorch.
#include "cuda/perturb_by_rank.cuh"

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "aten.h"
#include "cuda/tensors.h"
#include "perturb_by_rank.h"

namespace fastcam::cuda {
namespace {

using at::Tensor;

template <typename E, typename R>
void compute(const Tensor& images, const Tensor& baseline, const Tensor& ranks, const Tensor& counts, const Tensor& out,
             bool channels_last, bool keep) {
  PerturbArgs<E, R> x = {};
  x.images = elements<E>(images), x.baseline = elements<E>(baseline), x.ranks = elements<R>(ranks);
  x.counts = elements<int64_t>(counts), x.out = fresh_elements<E>(out);
  x.batch = images.size(0), x.steps = counts.size(0);
  x.baseline_image = baseline.size(0) == 1 ? 0 : baseline.numel() / baseline.size(0);
  x.channels = unsigned(images.size(1)), x.pixels = unsigned(images.size(2) * images.size(3));
  x.plain = is_plain(baseline), x.channels_last = channels_last, x.keep = keep;
  C10_CUDA_CHECK(run_perturb_by_rank(x, c10::cuda::getCurrentCUDAStream().stream()));
}

}  // namespace

Tensor perturb_by_rank(const Tensor& images, const Tensor& baseline, const Tensor& ranks, const Tensor& counts, bool keep) {
  check_perturb_by_rank(images, baseline, ranks, counts);
  TORCH_CHECK_VALUE(images.numel() / std::max<int64_t>(1, images.size(0)) < int64_t(1) << 31,
                    "perturb_by_rank: an image must have fewer than 2^31 elements, got ", images.sizes());
  const c10::cuda::CUDAGuard guard(images.device());
  const int64_t steps = counts.size(0);
  const Tensor out = empty_strided({images.size(0), steps, images.size(1), images.size(2), images.size(3)},
                                       step_strides(images, steps), images.options());
  if (out.numel() == 0) return out;
  const bool channels_last = is_channels_last(images);
  const Tensor values = dense_images(images, channels_last), base = dense_baseline(baseline, images);
  const Tensor order = ranks.contiguous(), reach = counts.contiguous();
  const auto by_ranks = [&](auto word) {
    using E = decltype(word);
    order.scalar_type() == at::kInt ? compute<E, int32_t>(values, base, order, reach, out, channels_last, keep)
                                    : compute<E, int64_t>(values, base, order, reach, out, channels_last, keep);
  };
  switch (images.element_size()) {
    case 8: by_ranks(uint64_t()); break;
    case 4: by_ranks(uint32_t()); break;
    default: by_ranks(uint16_t()); break;
  }
  return out;
}

}  // namespace fastcam::cuda
