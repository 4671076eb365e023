// mask_by_features on CPUs: one task a row, of the leaves of cam_map_finish.h and mask_by_features_leaves.h.
//
// A row's mask is made once, in its thread's scratch, and read by all channels from cache. Rows are independent, so a chunk is
// bit-equal to the slice of the whole, on any number of threads.

#include <memory>

#include "aten.h"
#include "cpu/layout.h"
#include "cpu/mask_by_features_leaves.h"
#include "cpu/resampling.h"
#include "cpu/result_memory.h"
#include "mask_by_features.h"
#include "ops.h"

namespace fastcam::cpu {
namespace {

using at::Tensor;

struct Problem {
  Images images;  // those of the chunk
  Tensor features, noise;
  bool channels_last, minmax_first;
  double scale;
  int64_t first_pair;  // counted from the first pair of the first image above
  int64_t count, channels, height, width;
  int64_t positions() const { return height * width; }
};

// Min-max scaling and resizing of one map after the other, in buffers that are reused.
template <typename A>
class MaskMaker {
 public:
  MaskMaker(const Axis<A>& rows, const Axis<A>& columns)
      : rows_(rows), columns_(columns), row_stride_(stretched_stride(columns.out)),
        resized_(rows.in != rows.out || columns.in != columns.out),
        map_(new A[rows.in * columns.in]), scaled_(new A[rows.in * columns.in]),
        stretched_(resized_ ? new A[rows.in * row_stride_] : nullptr), mask_(new A[rows.out * columns.out]) {}

  A* map() { return map_.get(); }

  // The mask of map(), which is overwritten.
  A* make(bool minmax_first) {
    FinishArgs<A> args = {};
    args.parts = 1, args.finite = &finite_, args.relu = false;
    if (minmax_first) {
      args.partial = args.raw = map_.get(), args.maps = scaled_.get(), args.normalize = true;
      args.x.in = args.x.out = columns_.in, args.y.in = args.y.out = rows_.in;
      run<Finish<A>>(args);
    }
    A* const map = minmax_first ? scaled_.get() : map_.get();
    args.partial = args.raw = map, args.maps = mask_.get(), args.normalize = !minmax_first;
    args.rows = stretched_.get(), args.row_stride = row_stride_, args.x = columns_, args.y = rows_;
    run<Finish<A>>(args);
    return mask_.get();
  }

 private:
  const Axis<A> rows_, columns_;
  const int64_t row_stride_;
  const bool resized_;
  const std::unique_ptr<A[]> map_, scaled_, stretched_, mask_;
  bool finite_ = false;
};

template <typename F>
void gather(const Tensor& features, int64_t image, int64_t channel, Accumulate<F>* out) {
  GatherArgs<F> args;
  args.map = static_cast<const F*>(features.const_data_ptr()) + image * features.stride(0) + channel * features.stride(1);
  args.height = features.size(2), args.width = features.size(3);
  args.row = features.stride(2), args.column = features.stride(3);
  args.out = out;
  run<Gather<F>>(args);
}

// S: of the images; F: of the features, S or Accumulate<S>.
template <typename S, typename F>
void compute_rows(const Problem& x, Tensor& result) {
  using A = Accumulate<S>;
  const Resampling<A> rows(x.features.size(2), x.height), columns(x.features.size(3), x.width);
  auto* out = static_cast<S*>(result.mutable_data_ptr());
  const A* noise = x.noise.defined() ? x.noise.const_data_ptr<A>() : nullptr;
  const int64_t work = x.positions() * (x.channels + 2) + x.features.size(2) * x.features.size(3);
  at::parallel_for(0, x.count, grain(work), [&](int64_t begin, int64_t end) {
    MaskMaker<A> maker(rows.axis(), columns.axis());
    for (int64_t row = begin; row < end; ++row) {
      const int64_t pair = x.first_pair + row, image = pair / x.features.size(1);
      gather<F>(x.features, image, pair % x.features.size(1), maker.map());
      MaskArgs<S> args;
      args.image = x.images.at<S>(image);
      args.out = out + row * x.channels * x.positions();
      args.mask = maker.make(x.minmax_first);
      args.noise = noise == nullptr ? nullptr : noise + row * x.positions();
      args.scale = static_cast<A>(x.scale);
      args.streamed = result.nbytes() >= kStreamed;
      args.channels = x.channels, args.positions = x.positions(), args.image_channel = x.images.row;
      x.channels_last ? run<MaskPositions<S>>(args) : run<MaskChannels<S>>(args);
    }
  });
}

template <typename S>
void compute(const Problem& x, Tensor& result) {
  const bool wide = x.features.scalar_type() != x.images.tensor.scalar_type();
  wide ? compute_rows<S, Accumulate<S>>(x, result) : compute_rows<S, S>(x, result);
}

}  // namespace

Tensor mask_by_features(const Tensor& images, const Tensor& features, int64_t start, std::optional<int64_t> count,
                        const std::optional<Tensor>& noise, double scale, std::string_view order) {
  const Chunk chunk = check_mask_by_features(images, features, start, count, noise, scale, order);
  Problem x;
  x.channels_last = is_channels_last(images);
  const int64_t c = images.size(1), h = images.size(2), w = images.size(3), size = c * h * w;
  const int64_t strides[] = {size, x.channels_last ? 1 : h * w, x.channels_last ? w * c : w, x.channels_last ? c : 1};
  Tensor result = empty_result({chunk.count, c, h, w}, strides, images.scalar_type());
  if (result.numel() == 0) return result;

  x.images = as_images(images.narrow(0, chunk.first_image, chunk.images), x.channels_last);
  x.features = features.narrow(0, chunk.first_image, chunk.images);
  if (noise.has_value()) x.noise = noise->to(accumulation_dtype(images.scalar_type())).contiguous();
  x.minmax_first = chunk.minmax_first, x.scale = scale;
  x.first_pair = chunk.first_channel, x.count = chunk.count;
  x.channels = c, x.height = h, x.width = w;
  switch (images.scalar_type()) {
    case at::kDouble: compute<double>(x, result); break;
    case at::kFloat: compute<float>(x, result); break;
    case at::kHalf: compute<Half>(x, result); break;
    case at::kBFloat16: compute<BFloat16>(x, result); break;
    default: break;  // refused above
  }
  return result;
}

}  // namespace fastcam::cpu
