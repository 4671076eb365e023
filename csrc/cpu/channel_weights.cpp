// channel_weights on CPUs: partition into tasks, the leaves of channel_weights_reduce.h.
//
// A task is (image, block of channels); each channel is reduced whole by one task and in one order, so results depend
// neither on the batch nor on the thread count.

#include "aten.h"
#include "cpu/channel_weights_reduce.h"
#include "cpu/layout.h"
#include "ops.h"

namespace fastcam::cpu {
namespace {

using at::Tensor;

struct Problem {
  Images features, reference, multipliers;
  bool has_reference, channels_last;
  int64_t batch, targets, channels, positions;
};

template <typename S, bool REF, Mode MODE>
void compute_images(const Problem& x, Tensor& out) {
  // Reading is so fast that what a thread costs to wake is what it reads of 4 kGrain elements.
  const int64_t work = (x.positions * (x.targets + (MODE != Mode::kMean)) + 3) / 4;
  // Whole images are whole memory streams; channels are divided only where images are fewer than threads, into tasks worth
  // a thread. Each channel's sum is the same wherever the cut is.
  const int64_t pieces = std::max<int64_t>(1, (at::get_num_threads() + x.batch - 1) / x.batch);
  const int64_t least = kGrain / work;
  const int64_t block = (std::max((x.channels + pieces - 1) / pieces, least) + 127) / 128 * 128;
  const int64_t blocks = (x.channels + block - 1) / block;
  auto* result = out.mutable_data_ptr<Accumulate<S>>();
  at::parallel_for(0, x.batch * blocks, grain(work * std::min(block, x.channels)), [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / blocks, k = task % blocks * block;
      ChannelArgs<S> args;
      args.features = x.features.at<S>(b);
      args.reference = REF ? x.reference.at<S>(b) : nullptr;
      args.multipliers = x.multipliers.at<S>(b);
      args.feature_row = x.features.row;
      args.reference_row = x.reference.row;
      args.multiplier_row = x.multipliers.row;
      args.multiplier_target = x.multipliers.target;
      args.channels = x.channels, args.positions = x.positions, args.targets = x.targets;
      args.k0 = k, args.k1 = std::min(x.channels, k + block);
      args.out = result + b * x.targets * x.channels;
      x.channels_last ? run<PositionSums<S, REF, MODE>>(args) : run<ChannelSums<S, REF, MODE>>(args);
    }
  });
}

template <typename S>
void compute(const Problem& x, Mode mode, Tensor& out) {
  if (mode == Mode::kMean) return compute_images<S, false, Mode::kMean>(x, out);
  if (x.has_reference) {
    if (mode == Mode::kSum) return compute_images<S, true, Mode::kSum>(x, out);
    if (mode == Mode::kXGrad) return compute_images<S, true, Mode::kXGrad>(x, out);
    return compute_images<S, true, Mode::kGradCamPP>(x, out);
  }
  if (mode == Mode::kSum) return compute_images<S, false, Mode::kSum>(x, out);
  if (mode == Mode::kXGrad) return compute_images<S, false, Mode::kXGrad>(x, out);
  compute_images<S, false, Mode::kGradCamPP>(x, out);
}

Mode parse(std::string_view mode) {
  if (mode == "mean") return Mode::kMean;
  if (mode == "sum") return Mode::kSum;
  if (mode == "xgrad") return Mode::kXGrad;
  TORCH_CHECK_VALUE(mode == "grad_cam_pp", "channel_weights: unknown mode '", mode,
                    "', expected mean, sum, xgrad or grad_cam_pp");
  return Mode::kGradCamPP;
}

}  // namespace

Tensor channel_weights(const Tensor& features, const Tensor& multipliers, const std::optional<Tensor>& reference,
                       std::string_view mode_name) {
  const char* op = "channel_weights";
  const Tensor ref = reference.value_or(Tensor());
  refuse_grad(op, features, multipliers, ref);
  check_features(op, features);
  check_companion(op, "multipliers", multipliers, features);
  check_positional(op, "multipliers", multipliers, features);
  check_reference(op, ref, features);
  const Mode mode = parse(mode_name);
  const auto acc = accumulation_dtype(features.scalar_type());
  Tensor out = fastcam::empty(multipliers.sizes().slice(0, multipliers.dim() - 2), features.options().dtype(acc));
  if (out.numel() == 0) return out;

  Problem x;
  x.batch = features.size(0), x.channels = features.size(1), x.positions = features.size(2) * features.size(3);
  x.targets = multipliers.dim() == 5 ? multipliers.size(1) : 1;
  x.has_reference = ref.defined() && mode != Mode::kMean;
  // "mean" reads only the multipliers, so their order decides; else the features'.
  x.channels_last = mode == Mode::kMean ? prefers_channels_last(multipliers) : prefers_channels_last(features);
  x.multipliers = as_images(multipliers, x.channels_last);
  // Multipliers in the accumulation type beside half features: widen the features rather than lose the digits.
  const auto dtype = multipliers.scalar_type();
  if (mode != Mode::kMean) x.features = as_images(features.to(dtype), x.channels_last);
  if (x.has_reference) x.reference = as_shared_images(ref.to(dtype), x.channels_last);
  switch (dtype) {
    case at::kDouble: compute<double>(x, mode, out); break;
    case at::kFloat: compute<float>(x, mode, out); break;
    case at::kHalf: compute<Half>(x, mode, out); break;
    case at::kBFloat16: compute<BFloat16>(x, mode, out); break;
    default: TORCH_CHECK_TYPE(false, op, ": features must be float64, float32, float16 or bfloat16, got ", dtype);
  }
  return out;
}

}  // namespace fastcam::cpu
