// Binding of overlay.cuh to PyTorch.
#include "cuda/overlay.cuh"

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "aten.h"
#include "cuda/tensors.h"
#include "overlay.h"

namespace fastcam::cuda {
namespace {

using at::Tensor;
using Numbers = std::optional<at::ArrayRef<double>>;

template <typename T, typename M>
void compute(const Tensor& images, const Tensor& maps, const Tensor& table, const Tensor& out, bool interleaved,
             const OverlayNumbers<Accumulate<T>>& numbers) {
  OverlayArgs<T, M> x = {};
  x.images = elements<T>(images), x.maps = elements<M>(maps), x.table = elements<Accumulate<T>>(table);
  x.out = fresh_elements<uint8_t>(out);
  x.batch = images.size(0), x.targets = maps.dim() == 4 ? maps.size(1) : 1;
  x.channels = unsigned(images.size(1)), x.pixels = unsigned(images.size(2) * images.size(3));
  x.interleaved = interleaved, x.numbers = numbers;
  C10_CUDA_CHECK(run_overlay(x, c10::cuda::getCurrentCUDAStream().stream()));
}

}  // namespace

Tensor overlay(const Tensor& images, const Tensor& maps, const Tensor& table, double alpha, bool is_signed, Numbers mean,
               Numbers std) {
  check_overlay(images, maps, table, alpha, mean, std);
  const int64_t limit = int64_t(1) << 31;
  TORCH_CHECK_VALUE(images.size(2) < limit / images.size(3), "overlay: an image must have fewer than 2^31 pixels, got ",
                    images.sizes());
  const c10::cuda::CUDAGuard guard(images.device());
  auto shape = maps.sizes().vec();
  shape.push_back(3);
  const Tensor out = empty(shape, images.options().dtype(at::kByte));
  if (out.numel() == 0) return out;
  TORCH_CHECK_VALUE(out.numel() / (3 * images.size(2) * images.size(3)) < limit,
                    "overlay: a call must have fewer than 2^31 maps, got ", maps.sizes());
  const bool interleaved = images.size(1) == 3 && is_channels_last(images);
  const Tensor values = dense_images(images, interleaved), m = maps.contiguous(), colours = table.contiguous();
  by_element_type("overlay", images, [&](auto zero) {
    using T = decltype(zero);
    const auto numbers = overlay_numbers<Accumulate<T>>(table, alpha, is_signed, mean, std);
    m.scalar_type() == images.scalar_type()
        ? compute<T, T>(values, m, colours, out, interleaved, numbers)
        : compute<T, Accumulate<T>>(values, m, colours, out, interleaved, numbers);
  });
  return out;
}

}  // namespace fastcam::cuda
