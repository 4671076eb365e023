// cam_map on CPUs: partition into tasks, the leaves of cam_map_reduce.h and cam_map_finish.h, registration.
//
// Partition: a task is (image, slice of channels, block of positions); it writes its own part of a buffer of partial sums
// (or the raw maps themselves if there is one slice), so there are no atomics. Slices and blocks depend on K, H, W and T only,
// never on the batch or the thread count: equal images give equal bits in any batch and on any number of threads.
#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <torch/library.h>

#include <memory>
#include <vector>

#include "cpu/cam_map_finish.h"
#include "cpu/cam_map_reduce.h"
#include "cpu/layout.h"
#include "ops.h"

namespace fastcam::cpu {
namespace {

using at::Tensor;

struct Problem {
  Images features, reference, weights;
  bool has_reference, positional, channels_last;
  int64_t batch, targets, channels, height, width;
  int64_t positions() const { return height * width; }
};

struct Partition {
  int64_t slices, slice;  // of channels
  int64_t blocks, block;  // of positions
};

Partition partition(const Problem& x) {
  constexpr int64_t kTaskWork = 65536;  // multiply-adds that dwarf the cost of handing out a task
  Partition result = {1, x.channels, 1, x.positions()};
  const int64_t work = x.channels * x.positions() * x.targets;
  const int64_t tasks = std::clamp<int64_t>(work / kTaskWork, 1, 16);
  if (x.channels_last) {
    result.block = std::max<int64_t>(4, (x.positions() / tasks + 3) / 4 * 4);
  } else {
    // Long blocks keep memory streams long; when they are too few, channels are split instead.
    result.block = std::max<int64_t>(kStreamBlock, (x.positions() / tasks + 63) / 64 * 64);
    const int64_t blocks = (x.positions() + result.block - 1) / result.block;
    const int64_t slices = std::max<int64_t>(1, tasks / blocks);
    result.slice = (x.channels + slices - 1) / slices;
    result.slices = (x.channels + result.slice - 1) / result.slice;
  }
  result.blocks = (x.positions() + result.block - 1) / result.block;
  return result;
}

template <typename S, bool REF>
void reduce_image(const ReduceArgs<S>& args, const Problem& x) {
  if (x.channels_last) {
    return x.positional ? run<PositionDots<S, REF, true>>(args) : run<PositionDots<S, REF, false>>(args);
  }
  if (x.positional) return run<ChannelStream<S, REF, true>>(args);
  // Up to one register tile of positions, or several targets: sums fit registers; else stream rows through L1.
  if (x.targets > 1 || x.positions() <= 64) return run<ChannelTile<S, REF>>(args);
  run<ChannelStream<S, REF, false>>(args);
}

template <typename S>
void reduce(const Problem& x, const Partition& part, Accumulate<S>* partial) {
  using A = Accumulate<S>;
  const int64_t map = x.positions(), image = x.targets * map;
  const int64_t tasks = x.batch * part.slices * part.blocks;
  at::parallel_for(0, tasks, grain(part.slice * part.block * x.targets), [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t block = task % part.blocks, slice = task / part.blocks % part.slices;
      const int64_t b = task / (part.blocks * part.slices);
      ReduceArgs<S> args;
      args.features = x.features.at<S>(b);
      args.reference = x.has_reference ? x.reference.at<S>(b) : nullptr;
      args.weights = x.positional ? static_cast<const void*>(x.weights.at<S>(b)) : x.weights.at<A>(b);
      args.feature_row = x.features.row;
      args.reference_row = x.reference.row;
      args.weight_row = x.weights.row;
      args.weight_target = x.weights.target;
      args.channels = x.channels;
      args.positions = map;
      args.t0 = 0, args.t1 = x.targets;
      args.k0 = slice * part.slice, args.k1 = std::min(x.channels, args.k0 + part.slice);
      args.p0 = block * part.block, args.p1 = std::min(map, args.p0 + part.block);
      args.out = partial + (slice * x.batch + b) * image;
      args.out_target = map;
      x.has_reference ? reduce_image<S, true>(args, x) : reduce_image<S, false>(args, x);
    }
  });
}

template <typename A>
void finish(const Problem& x, const Partition& part, const A* partial, A* raw, A* maps, bool* finite, bool relu,
            bool normalize, int64_t out_height, int64_t out_width) {
  std::vector<int32_t> indices(2 * (out_height + out_width));
  std::vector<A> shares(out_height + out_width);
  int32_t* y_index = indices.data();
  int32_t* x_index = y_index + 2 * out_height;
  fill_axis(x.height, out_height, y_index, y_index + out_height, shares.data());
  fill_axis(x.width, out_width, x_index, x_index + out_width, shares.data() + out_height);
  const bool resized = out_height != x.height || out_width != x.width;
  const int64_t map = x.positions(), area = out_height * out_width, row_stride = (out_width + 15) / 16 * 16;
  at::parallel_for(0, x.batch * x.targets, grain(area + map), [&](int64_t begin, int64_t end) {
    const std::unique_ptr<A[]> rows(resized ? new A[x.height * row_stride] : nullptr);
    for (int64_t i = begin; i < end; ++i) {
      FinishArgs<A> args;
      args.partial = partial + i * map;
      args.parts = part.slices, args.part = x.batch * x.targets * map;
      args.raw = raw + i * map, args.maps = maps + i * area, args.finite = finite + i;
      args.rows = rows.get(), args.row_stride = row_stride;
      args.x = {x_index, x_index + out_width, shares.data() + out_height, x.width, out_width};
      args.y = {y_index, y_index + out_height, shares.data(), x.height, out_height};
      args.relu = relu, args.normalize = normalize;
      run<Finish<A>>(args);
    }
  });
}

template <typename S>
void compute(const Problem& x, Tensor& maps, Tensor& raw, Tensor& finite, bool relu, bool normalize, int64_t out_height,
             int64_t out_width) {
  using A = Accumulate<S>;
  const Partition part = partition(x);
  Tensor sums = raw;
  if (part.slices > 1) sums = at::empty({part.slices, x.batch * x.targets * x.positions()}, raw.options());
  reduce<S>(x, part, sums.mutable_data_ptr<A>());
  finish<A>(x, part, sums.const_data_ptr<A>(), raw.mutable_data_ptr<A>(), maps.mutable_data_ptr<A>(),
            finite.mutable_data_ptr<bool>(), relu, normalize, out_height, out_width);
}

Images coefficients(const Tensor& weights, at::ScalarType acc) {
  const Tensor dense = weights.to(acc).contiguous();
  return {dense, dense.stride(0), dense.dim() == 3 ? dense.stride(1) : 0, 0};
}

std::tuple<Tensor, Tensor, Tensor> cam_map(const Tensor& features, const Tensor& weights,
                                           const std::optional<Tensor>& reference, bool relu, bool normalize,
                                           at::OptionalSymIntArrayRef size) {
  const char* op = "cam_map";
  const Tensor ref = reference.value_or(Tensor());
  refuse_grad(op, features, weights, ref);
  check_features(op, features);
  check_companion(op, "weights", weights, features);
  check_reference(op, ref, features);
  Problem x;
  x.positional = weights.dim() >= 4;
  if (x.positional) {
    check_positional(op, "weights", weights, features);
  } else {
    TORCH_CHECK_VALUE((weights.dim() == 2 || weights.dim() == 3) && weights.size(0) == features.size(0) &&
                          weights.size(-1) == features.size(1),
                      op, ": weights must be (B,K) or (B,T,K) for features ", features.sizes(), ", got ", weights.sizes());
  }
  const bool has_targets = weights.dim() == 3 || weights.dim() == 5;
  x.batch = features.size(0), x.channels = features.size(1), x.height = features.size(2), x.width = features.size(3);
  x.targets = has_targets ? weights.size(1) : 1;
  int64_t out_height = x.height, out_width = x.width;
  if (size.has_value()) {
    TORCH_CHECK_VALUE(size->size() == 2, op, ": size must be (height, width)");
    out_height = (*size)[0].guard_int(__FILE__, __LINE__);
    out_width = (*size)[1].guard_int(__FILE__, __LINE__);
    TORCH_CHECK_VALUE(out_height > 0 && out_width > 0, op, ": size must be positive, got ", out_height, " x ", out_width);
  }
  const auto acc = accumulation_dtype(features.scalar_type());
  std::vector<int64_t> shape = {x.batch};
  if (has_targets) shape.push_back(x.targets);
  Tensor finite = at::empty(shape, features.options().dtype(at::kBool));
  shape.insert(shape.end(), {x.height, x.width});
  Tensor raw = at::empty(shape, features.options().dtype(acc));
  *(shape.end() - 2) = out_height, shape.back() = out_width;
  Tensor maps = at::empty(shape, features.options().dtype(acc));
  advise_huge_pages(maps);
  if (x.batch == 0 || x.targets == 0) return {maps, raw, finite};

  x.channels_last = prefers_channels_last(features);
  x.features = as_images(features, x.channels_last);
  x.has_reference = ref.defined();
  if (x.has_reference) {
    x.reference = as_images(ref.to(features.scalar_type()), x.channels_last);
    if (ref.size(0) == 1) x.reference.batch = 0;
  }
  // Multipliers in the accumulation type beside half features: widen the features rather than lose the digits.
  if (x.positional && weights.scalar_type() != features.scalar_type()) {
    x.features = as_images(features.to(acc), x.channels_last);
    if (x.has_reference) {
      x.reference = as_images(ref.to(acc), x.channels_last);
      if (ref.size(0) == 1) x.reference.batch = 0;
    }
  }
  x.weights = x.positional ? as_images(weights, x.channels_last) : coefficients(weights, acc);
  switch (x.features.tensor.scalar_type()) {
    case at::kDouble: compute<double>(x, maps, raw, finite, relu, normalize, out_height, out_width); break;
    case at::kFloat: compute<float>(x, maps, raw, finite, relu, normalize, out_height, out_width); break;
    case at::kHalf: compute<Half>(x, maps, raw, finite, relu, normalize, out_height, out_width); break;
    case at::kBFloat16: compute<BFloat16>(x, maps, raw, finite, relu, normalize, out_height, out_width); break;
    default: TORCH_CHECK_TYPE(false, op, ": features must be float64, float32, float16 or bfloat16, got ", features.scalar_type());
  }
  return {maps, raw, finite};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastcam, CPU, m) { m.impl("cam_map.with_raw", cam_map); }

}  // namespace fastcam::cpu
