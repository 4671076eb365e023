// overlay on CPUs: blocks of pixels, the leaf of overlay_leaves.h.

#include "aten.h"
#include "cpu/layout.h"
#include "cpu/overlay_leaves.h"
#include "cpu/result_memory.h"
#include "overlay.h"

namespace fastcam::cpu {
namespace {

using at::Tensor;
using Numbers = std::optional<at::ArrayRef<double>>;

constexpr int64_t kBlock = 4096;  // pixels of a task

template <typename S, typename M>
void compute(const Tensor& images, const Tensor& maps, const Tensor& table, const Tensor& out,
             const OverlayNumbers<Accumulate<S>>& numbers) {
  using A = Accumulate<S>;
  OverlayArgs<S, M> all = {};
  all.interleaved = images.size(1) == 3 && is_channels_last(images);
  const Images from = as_images(images, all.interleaved);
  all.channel = images.size(1) == 1 ? 0 : from.row, all.table = table.const_data_ptr<A>(), all.numbers = numbers;
  all.streamed = out.nbytes() >= kStreamed;
  const int64_t pixels = images.size(2) * images.size(3), targets = maps.dim() == 4 ? maps.size(1) : 1;
  const int64_t blocks = (pixels + kBlock - 1) / kBlock;
  const auto* values = static_cast<const M*>(maps.const_data_ptr());
  auto* bytes = static_cast<uint8_t*>(out.mutable_data_ptr());
  at::parallel_for(0, images.size(0) * targets * blocks, grain(8 * std::min(kBlock, pixels)), [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t map = task / blocks, first = task % blocks * kBlock;
      OverlayArgs<S, M> args = all;
      args.pixels = std::min(kBlock, pixels - first);
      args.image = from.at<S>(map / targets) + (all.interleaved ? 3 * first : first);
      args.map = values + map * pixels + first, args.out = bytes + 3 * (map * pixels + first);
      run<Overlay<S, M>>(args);
    }
  });
}

template <typename S>
void compute(const Tensor& images, const Tensor& maps, const Tensor& table, const Tensor& out, double alpha, bool is_signed,
             const Numbers& mean, const Numbers& std) {
  using A = Accumulate<S>;
  const auto numbers = overlay_numbers<A>(table, alpha, is_signed, mean, std);
  const Tensor rows = empty({table.size(0), 4}, table.options());  // the fourth number is never used
  rows.narrow(1, 0, 3).copy_(table);
  maps.scalar_type() == images.scalar_type() ? compute<S, S>(images, maps, rows, out, numbers)
                                             : compute<S, A>(images, maps, rows, out, numbers);
}

}  // namespace

Tensor overlay(const Tensor& images, const Tensor& maps, const Tensor& table, double alpha, bool is_signed, Numbers mean,
               Numbers std) {
  check_overlay(images, maps, table, alpha, mean, std);
  auto shape = maps.sizes().vec();
  shape.push_back(3);
  const Tensor out = empty_result(shape, at::kByte);
  if (out.numel() == 0) return out;
  const Tensor m = maps.contiguous();
  switch (images.scalar_type()) {
    case at::kDouble: compute<double>(images, m, table, out, alpha, is_signed, mean, std); break;
    case at::kFloat: compute<float>(images, m, table, out, alpha, is_signed, mean, std); break;
    case at::kHalf: compute<Half>(images, m, table, out, alpha, is_signed, mean, std); break;
    case at::kBFloat16: compute<BFloat16>(images, m, table, out, alpha, is_signed, mean, std); break;
    default: break;  // refused above
  }
  return out;
}

}  // namespace fastcam::cpu
