// cam_map on CPUs: partition into tasks, the leaves of cam_map_reduce.h and cam_map_finish.h.
//
// Partition: a task is (image, slice of channels, block of positions); it writes its own part of a buffer of partial sums
// (or the raw maps themselves if there is one slice), so there are no atomics. Slices and blocks depend on K, H, W and T only,
// never on the batch or the thread count: equal images give equal bits in any batch and on any number of threads.
#include <ATen/Dispatch.h>

#include <memory>
#include <vector>

#include "aten.h"
#include "cpu/cam_map_finish.h"
#include "cpu/cam_map_reduce.h"
#include "cpu/layout.h"
#include "cpu/resampling.h"
#include "cpu/result_memory.h"
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

constexpr int64_t kCaches = 16 << 20;  // bytes of features that are probably no longer there from the step before

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
    const int64_t blocks = (x.positions() + kStreamBlock - 1) / kStreamBlock;
    result.block = ((x.positions() + blocks - 1) / blocks + 63) / 64 * 64;
    const int64_t slices = std::max<int64_t>(1, tasks / blocks);
    result.slice = ((x.channels + slices - 1) / slices + 7) / 8 * 8;  // whole chains of ChannelStream
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

struct Options {
  bool relu, normalize;
  int64_t height, width;  // of the maps
};

template <typename S>
struct Computation {
  using A = Accumulate<S>;
  const Problem& x;
  const Options& options;
  const Partition part;
  A* sums;  // (slices, batch, targets, positions)
  A* raw;
  A* maps;
  bool* finite;
  const Resampling<A> rows, columns;

  void reduce(int64_t b, int64_t task) const {
    const int64_t slice = task / part.blocks, block = task % part.blocks;
    ReduceArgs<S> args;
    args.features = x.features.at<S>(b);
    args.reference = x.has_reference ? x.reference.at<S>(b) : nullptr;
    args.weights = x.positional ? static_cast<const void*>(x.weights.at<S>(b)) : x.weights.at<A>(b);
    args.feature_row = x.features.row;
    args.reference_row = x.reference.row;
    args.weight_row = x.weights.row;
    args.weight_target = x.weights.target;
    args.channels = x.channels;
    args.positions = x.positions();
    args.t0 = 0, args.t1 = x.targets;
    args.k0 = slice * part.slice, args.k1 = std::min(x.channels, args.k0 + part.slice);
    args.p0 = block * part.block, args.p1 = std::min(x.positions(), args.p0 + part.block);
    args.out = sums + (slice * x.batch + b) * x.targets * x.positions();
    args.out_target = x.positions();
    args.beyond_caches = x.batch * x.channels * x.positions() * static_cast<int64_t>(sizeof(S)) > kCaches;
    x.has_reference ? reduce_image<S, true>(args, x) : reduce_image<S, false>(args, x);
  }

  void finish(int64_t begin, int64_t end) const {
    const bool resized = options.height != x.height || options.width != x.width;
    const int64_t row_stride = stretched_stride(options.width), area = options.height * options.width;
    const std::unique_ptr<A[]> stretched(resized ? new A[x.height * row_stride] : nullptr);
    for (int64_t map = begin; map < end; ++map) {
      FinishArgs<A> args;
      args.partial = sums + map * x.positions();
      args.parts = part.slices, args.part = x.batch * x.targets * x.positions();
      args.raw = raw + map * x.positions(), args.maps = maps + map * area, args.finite = finite + map;
      args.rows = stretched.get(), args.row_stride = row_stride;
      args.x = columns.axis(), args.y = rows.axis();
      args.relu = options.relu, args.normalize = options.normalize;
      run<Finish<A>>(args);
    }
  }

  void execute() const {
    const int64_t tasks = part.slices * part.blocks, threads = at::get_num_threads();
    const int64_t work = part.slice * part.block * x.targets;
    const int64_t finishing = options.height * options.width + x.positions();
    // Enough images for all threads: each is reduced and finished by one thread, hot in its cache, with one barrier
    // less. The partition stays the same, so the bits do too.
    if (x.batch % threads == 0 || x.batch >= 4 * threads) {
      at::parallel_for(0, x.batch, grain(tasks * work + x.targets * finishing), [&](int64_t begin, int64_t end) {
        for (int64_t b = begin; b < end; ++b) {
          for (int64_t task = 0; task < tasks; ++task) reduce(b, task);
          finish(b * x.targets, (b + 1) * x.targets);
        }
      });
      return;
    }
    at::parallel_for(0, x.batch * tasks, grain(work), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) reduce(i / tasks, i % tasks);
    });
    at::parallel_for(0, x.batch * x.targets, grain(finishing), [&](int64_t begin, int64_t end) { finish(begin, end); });
  }
};

template <typename S>
void compute(const Problem& x, const Options& options, Tensor& maps, Tensor& raw, Tensor& finite) {
  using A = Accumulate<S>;
  const Partition part = partition(x);
  Tensor sums = raw;
  if (part.slices > 1) sums = fastcam::empty({part.slices, x.batch * x.targets * x.positions()}, raw.options());
  Computation<S>{x, options, part, sums.mutable_data_ptr<A>(), raw.mutable_data_ptr<A>(), maps.mutable_data_ptr<A>(),
                 finite.mutable_data_ptr<bool>(), {x.height, options.height}, {x.width, options.width}}
      .execute();
}

Images coefficients(const Tensor& weights, at::ScalarType acc) {
  const Tensor dense = weights.to(acc).contiguous();
  return {dense, dense.stride(0), dense.dim() == 3 ? dense.stride(1) : 0, 0};
}

}  // namespace

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
  Options options = {relu, normalize, x.height, x.width};
  if (size.has_value()) {
    TORCH_CHECK_VALUE(size->size() == 2, op, ": size must be (height, width)");
    options.height = (*size)[0].guard_int(__FILE__, __LINE__);
    options.width = (*size)[1].guard_int(__FILE__, __LINE__);
    TORCH_CHECK_VALUE(options.height > 0 && options.width > 0, op, ": size must be positive, got ", options.height, " x ",
                      options.width);
  }
  const auto acc = accumulation_dtype(features.scalar_type());
  std::vector<int64_t> shape = {x.batch};
  if (has_targets) shape.push_back(x.targets);
  Tensor finite = fastcam::empty(shape, features.options().dtype(at::kBool));
  shape.insert(shape.end(), {x.height, x.width});
  Tensor raw = empty_result(shape, acc);
  *(shape.end() - 2) = options.height, shape.back() = options.width;
  Tensor maps = empty_result(shape, acc);
  if (x.batch == 0 || x.targets == 0) return {maps, raw, finite};

  // Multipliers in the accumulation type beside half features: widen the features rather than lose the digits.
  const auto dtype = x.positional ? weights.scalar_type() : features.scalar_type();
  x.channels_last = prefers_channels_last(features);
  x.features = as_images(features.to(dtype), x.channels_last);
  x.has_reference = ref.defined();
  if (x.has_reference) x.reference = as_shared_images(ref.to(dtype), x.channels_last);
  x.weights = x.positional ? as_images(weights, x.channels_last) : coefficients(weights, acc);
  switch (x.features.tensor.scalar_type()) {
    case at::kDouble: compute<double>(x, options, maps, raw, finite); break;
    case at::kFloat: compute<float>(x, options, maps, raw, finite); break;
    case at::kHalf: compute<Half>(x, options, maps, raw, finite); break;
    case at::kBFloat16: compute<BFloat16>(x, options, maps, raw, finite); break;
    default:
      TORCH_CHECK_TYPE(false, op, ": features must be float64, float32, float16 or bfloat16, got ", features.scalar_type());
  }
  return {maps, raw, finite};
}

}  // namespace fastcam::cpu
