// perturb_by_rank on CPUs: blocks of pixels, the leaves of perturb_by_rank_leaves.h.
//
// A task is (image, block of pixels, group of steps): its part of the image, the baseline and the ranks comes from memory for
// the first step of the group and from the cache for the others. Blocks are as large as that allows, since long runs are
// written faster than many short ones.

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
constexpr int64_t kSteps = 8;

struct Problem {
  Images images;
  Tensor baseline, ranks, counts, out;  // dense, in the order of the result
  bool channels_last, keep;
  int64_t channels, pixels;
};

// `pixels` pixels of a plain baseline.
template <typename E>
void spread(const E* values, int64_t channels, int64_t pixels, bool channels_last, E* to) {
  if (channels_last) {
    for (int64_t p = 0; p < pixels; ++p) std::copy_n(values, channels, to + p * channels);
  } else {
    for (int64_t c = 0; c < channels; ++c) std::fill_n(to + c * pixels, pixels, values[c]);
  }
}

template <typename E, typename R>
void compute(const Problem& x) {
  const int64_t batch = x.ranks.size(0), steps = x.counts.size(0), size = x.channels * x.pixels;
  const int64_t most = std::max<int64_t>(1, kBlockBytes / (int64_t(sizeof(E)) * x.channels));
  const int64_t block = std::min(most, x.pixels), blocks = (x.pixels + block - 1) / block;
  const int64_t groups = (steps + kSteps - 1) / kSteps;
  const bool streamed = x.out.nbytes() >= kStreamed;
  const int64_t repeats = x.channels_last ? x.channels : 1, rows = x.channels_last ? 1 : x.channels;
  const bool plain = is_plain(x.baseline);
  const auto* baselines = static_cast<const E*>(x.baseline.const_data_ptr());
  const auto* ranks = static_cast<const R*>(x.ranks.const_data_ptr());
  const auto* counts = static_cast<const int64_t*>(x.counts.const_data_ptr());
  auto* out = static_cast<E*>(x.out.mutable_data_ptr());
  const int64_t work = block * x.channels * std::min(steps, kSteps);
  at::parallel_for(0, batch * blocks * groups, grain(work), [&](int64_t begin, int64_t end) {
    const std::unique_ptr<E[]> mask(new E[block * repeats]), values(new E[plain ? block * x.channels : 1]);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / (blocks * groups), group = task % groups;
      const int64_t first = task / groups % blocks * block, pixels = std::min(block, x.pixels - first);
      const E* image = x.images.at<E>(b) + first * (x.channels_last ? x.images.row : 1);
      const E* own = baselines + (x.baseline.size(0) == 1 ? 0 : b) * (plain ? x.channels : size);
      if (plain) spread(own, x.channels, pixels, x.channels_last, values.get());
      const E* baseline = plain ? values.get() : own + first * repeats;
      const int64_t image_row = x.images.row, baseline_row = plain ? pixels : x.pixels;
      ReachedArgs<E, R> reached = {ranks + b * x.pixels + first, 0, pixels, mask.get(), repeats};
      ChoiceArgs<E> choice = {x.keep ? image : baseline, x.keep ? baseline : image, mask.get(), nullptr, rows,
                              pixels * repeats, x.keep ? image_row : baseline_row, x.keep ? baseline_row : image_row,
                              x.pixels};
      for (int64_t s = group * kSteps; s < std::min(steps, (group + 1) * kSteps); ++s) {
        reached.count = counts[s], choice.out = out + (b * steps + s) * size + first * repeats;
        run<Reached<E, R>>(reached);
        streamed ? run<Choice<E, true>>(choice) : run<Choice<E, false>>(choice);
      }
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
