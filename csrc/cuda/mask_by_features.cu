// Binding of mask_by_features.cuh to PyTorch.
#include "cuda/mask_by_features.cuh"

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "aten.h"
#include "cuda/tensors.h"
#include "mask_by_features.h"
#include "ops.h"

namespace fastcam::cuda {
namespace {

using at::Tensor;

struct Problem {
  Tensor images, features, noise, out;  // images dense; both they and the features those of the chunk
  Chunk chunk;
  double scale;
  bool channels_last;
};

// T: of the images; F: of the features, T or Accumulate<T>.
template <typename T, typename F>
void compute_typed(const Problem& x) {
  using A = Accumulate<T>;
  MapArgs<F> maps = {};
  maps.features = static_cast<const F*>(x.features.const_data_ptr());
  maps.image = x.features.stride(0), maps.channel = x.features.stride(1);
  maps.row = x.features.stride(2), maps.column = x.features.stride(3);
  maps.pairs = {x.chunk.count, unsigned(x.chunk.first_channel), unsigned(x.features.size(1))};
  maps.height = int(x.features.size(2)), maps.width = int(x.features.size(3));
  maps.out_height = int(x.images.size(2)), maps.out_width = int(x.images.size(3));
  maps.minmax_first = x.chunk.minmax_first;
  MaskArgs<T> masks = {};
  masks.images = static_cast<const T*>(x.images.const_data_ptr());
  masks.out = static_cast<T*>(x.out.mutable_data_ptr());
  masks.noise = x.noise.defined() ? x.noise.const_data_ptr<A>() : nullptr;
  masks.channels = unsigned(x.images.size(1)), masks.scale = A(x.scale), masks.channels_last = x.channels_last;
  const Tensor scratch = fastcam::empty({x.chunk.count * scratch_a_row(maps.height, maps.width)},
                                   x.images.options().dtype(accumulation_dtype(x.images.scalar_type())));
  C10_CUDA_CHECK(run_mask_by_features(maps, masks, scratch.mutable_data_ptr<A>(),
                                      c10::cuda::getCurrentCUDAStream().stream()));
}

template <typename T>
void compute(const Problem& x) {
  const bool wide = x.features.scalar_type() != x.images.scalar_type();
  wide ? compute_typed<T, Accumulate<T>>(x) : compute_typed<T, T>(x);
}

// (count,C,H,W) in the layout that the op promises.
Tensor empty_masked_images(const Tensor& images, const Chunk& chunk) {
  const auto format = is_channels_last(images) ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
  return fastcam::empty({chunk.count, images.size(1), images.size(2), images.size(3)}, images.options(), format);
}

}  // namespace

Tensor mask_by_features(const Tensor& images, const Tensor& features, int64_t start, std::optional<int64_t> count,
                        const std::optional<Tensor>& noise, double scale, std::string_view order) {
  const char* op = "mask_by_features";
  Problem x = {};
  x.chunk = check_mask_by_features(images, features, start, count, noise, scale, order);
  const int64_t limit = int64_t(1) << 31;
  TORCH_CHECK_VALUE(images.size(2) < limit / images.size(3) && features.size(2) < limit / features.size(3), op,
                    ": one image and one map must have fewer than 2^31 positions, got ", images.sizes(), " and ",
                    features.sizes());
  TORCH_CHECK_VALUE(images.size(1) <= limit / 2048, op, ": images must have at most 2^20 channels, got ", images.sizes());
  TORCH_CHECK_VALUE(features.size(1) < limit && x.chunk.count < limit, op, ": a chunk must have fewer than 2^31 rows, and "
                    "an image fewer than 2^31 feature maps, got ", x.chunk.count, " and ", features.size(1));

  const c10::cuda::CUDAGuard guard(images.device());
  x.out = empty_masked_images(images, x.chunk);
  if (x.out.numel() == 0) return x.out;
  x.scale = scale, x.channels_last = is_channels_last(images);
  x.images = dense_images(images.narrow(0, x.chunk.first_image, x.chunk.images), x.channels_last);
  x.features = features.narrow(0, x.chunk.first_image, x.chunk.images);
  if (noise.has_value()) x.noise = noise->to(accumulation_dtype(images.scalar_type())).contiguous();
  switch (images.scalar_type()) {
    case at::kDouble: compute<double>(x); break;
    case at::kFloat: compute<float>(x); break;
    case at::kHalf: compute<__half>(x); break;
    case at::kBFloat16: compute<__nv_bfloat16>(x); break;
    default: break;  // refused above
  }
  return x.out;
}

}  // namespace fastcam::cuda
