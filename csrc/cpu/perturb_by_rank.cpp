// perturb_by_rank on CPUs: blocks of pixels, the leaf of perturb_by_rank_leaves.h.
//
// A task is (image, block of pixels, step): the block's part of the image, the baseline and the ranks comes from memory for the
// first step and from the cache for the others. Blocks are as large as that allows, since long runs are written faster than
// many short ones.

#include <algorithm>
#include <memory>

#include "aten.h"
#include "cpu/layout.h"
#include "cpu/perturb_by_rank_leaves.h"
#include "cpu/result_memory.h"
#include "perturb_by_rank.h"

namespace fastcam::cpu {
namespace {

using at::Tensor;

constexpr int64_t kBlockBytes = 640 << 10;  // of an image: it stays in L2 or, with a baseline of all pixels, just beyond

struct Problem {
  Images images;
  Tensor baseline, ranks, counts, out;  // dense, in the order of the result
  bool channels_last, keep;
  int64_t channels, pixels;
};

// A plain baseline: kPlainPixels pixels of its values.
template <typename E>
Source<E> plain_source(const E* values, int64_t channels, bool channels_last, E* to) {
  constexpr int64_t pixels = kPlainPixels<E>;
  if (channels_last) {
    for (int64_t p = 0; p < pixels; ++p) std::copy_n(values, channels, to + p * channels);
  } else {
    for (int64_t c = 0; c < channels; ++c) std::fill_n(to + c * pixels, pixels, values[c]);
  }
  return {to, pixels, true};
}

template <typename E, typename R>
void compute(const Problem& x) {
  const int64_t batch = x.ranks.size(0), steps = x.counts.size(0), size = x.channels * x.pixels;
  const int64_t most = std::max<int64_t>(1, kBlockBytes / (int64_t(sizeof(E)) * x.channels));
  const int64_t block = std::min(most, x.pixels), blocks = (x.pixels + block - 1) / block;
  const bool streamed = x.out.nbytes() >= kStreamed;
  const int64_t width = x.channels_last ? x.channels : 1, rows = x.channels_last ? 1 : x.channels;
  const bool plain = is_plain(x.baseline);
  const auto* baselines = static_cast<const E*>(x.baseline.const_data_ptr());
  const auto* ranks = static_cast<const R*>(x.ranks.const_data_ptr());
  const auto* counts = static_cast<const int64_t*>(x.counts.const_data_ptr());
  auto* out = static_cast<E*>(x.out.mutable_data_ptr());
  at::parallel_for(0, batch * blocks * steps, grain(block * x.channels), [&](int64_t begin, int64_t end) {
    const std::unique_ptr<E[]> values(plain ? new E[kPlainPixels<E> * x.channels] : nullptr);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / (blocks * steps), s = task % steps, first = task / steps % blocks * block;
      const E* own = baselines + (x.baseline.size(0) == 1 ? 0 : b) * (plain ? x.channels : size);
      const Source<E> image = {x.images.at<E>(b) + first * (x.channels_last ? x.images.row : 1), x.images.row, false};
      const Source<E> baseline = plain ? plain_source(own, x.channels, x.channels_last, values.get())
                                       : Source<E>{own + first * width, x.pixels, false};
      PerturbArgs<E, R> args;
      args.ranks = ranks + b * x.pixels + first, args.count = counts[s];
      args.pixels = std::min(block, x.pixels - first);
      args.reached = x.keep ? image : baseline, args.elsewhere = x.keep ? baseline : image;
      args.out = out + (b * steps + s) * size + first * width;
      args.rows = rows, args.out_row = x.pixels, args.width = width;
      streamed ? run<Perturb<E, R, true>>(args) : run<Perturb<E, R, false>>(args);
    }
  });
}

template <typename E>
void compute(const Problem& x) {
  x.ranks.scalar_type() == at::kInt ? compute<E, int32_t>(x) : compute<E, int64_t>(x);
}

}  // namespace

Tensor perturb_by_rank(const Tensor& images, const Tensor& baseline, const Tensor& ranks, const Tensor& counts, bool keep) {
  check_perturb_by_rank(images, baseline, ranks, counts);
  const int64_t steps = counts.size(0);
  Problem x;
  x.out = empty_result({images.size(0), steps, images.size(1), images.size(2), images.size(3)}, step_strides(images, steps),
                       images.scalar_type());
  if (x.out.numel() == 0) return x.out;
  x.channels_last = is_channels_last(images), x.keep = keep;
  x.images = as_images(images, x.channels_last);
  x.baseline = dense_baseline(baseline, images), x.ranks = ranks.contiguous(), x.counts = counts.contiguous();
  x.channels = images.size(1), x.pixels = images.size(2) * images.size(3);
  switch (images.element_size()) {
    case 8: compute<int64_t>(x); break;
    case 4: compute<int32_t>(x); break;
    default: compute<int16_t>(x); break;
  }
  return x.out;
}

}  // namespace fastcam::cpu
