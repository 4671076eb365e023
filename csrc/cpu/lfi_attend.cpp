// lfi_attend on CPUs: partition into tasks, the leaves of cam_map_reduce.h and lfi_attend_leaves.h.
//
// A task is an image, whose features are read twice, the second time from the cache; so results depend neither on the batch
// nor on the thread count.

#include "aten.h"
#include "cpu/cam_map_reduce.h"
#include "cpu/lfi_attend_leaves.h"
#include "cpu/lfi_images.h"

namespace fastcam::cpu {
namespace {

using at::Tensor;

template <typename S>
void weighted_sum(const ReduceArgs<S>& args, bool channels_last) {
  if (channels_last) return run<PositionDots<S, false, false>>(args);
  args.positions <= 64 ? run<ChannelTile<S, false>>(args) : run<ChannelStream<S, false, false>>(args);
}

template <typename S>
void compute(const Tensor& features, const Tensor& importance, const LfiResult& out, const Tensor& attention,
             const Tensor& raw, bool keeps_constant, bool channels_last) {
  using A = Accumulate<S>;
  const int64_t channels = features.size(1), positions = features.size(2) * features.size(3);
  const Images images = as_images(features, channels_last);
  const A* weights = importance.const_data_ptr<A>();
  A *maps = attention.mutable_data_ptr<A>(), *sums = raw.mutable_data_ptr<A>();
  at::parallel_for(0, features.size(0), grain(2 * channels * positions), [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      ReduceArgs<S> reduce = {};
      reduce.features = images.at<S>(b), reduce.feature_row = images.row, reduce.weights = weights + b * channels;
      reduce.channels = channels, reduce.positions = positions;
      reduce.t1 = 1, reduce.k1 = channels, reduce.p1 = positions;
      reduce.out = sums + b * positions;
      weighted_sum(reduce, channels_last);
      const LfiAttentionArgs<A> map = {sums + b * positions, maps + b * positions, positions, keeps_constant};
      run<LfiAttention<A>>(map);
      const LfiRaiseArgs<S> args = {images.at<S>(b), map.attention, out.at<S>(b), images.row, out.images.row, channels,
                                    positions};
      channels_last ? run<LfiRaisePositions<S>>(args) : run<LfiRaiseChannels<S>>(args);
    }
  });
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> lfi_attend(const Tensor& features, const Tensor& importance,
                                              std::string_view constant_map) {
  const char* op = "lfi_attend";
  refuse_grad(op, features, importance);
  check_features(op, features);
  check_importance(op, importance, features);
  const bool keeps = keeps_constant(op, constant_map), channels_last = prefers_channels_last(features);
  const auto options = features.options().dtype(accumulation_dtype(features.scalar_type()));
  const Tensor attention = fastcam::empty({features.size(0), 1, features.size(2), features.size(3)}, options);
  const Tensor raw = fastcam::empty(attention.sizes(), options);
  const LfiResult out(features, channels_last);
  if (out.tensor.numel() == 0) return {out.tensor, attention, raw};
  const Tensor s = widened(importance);
  switch (features.scalar_type()) {
    case at::kDouble: compute<double>(features, s, out, attention, raw, keeps, channels_last); break;
    case at::kFloat: compute<float>(features, s, out, attention, raw, keeps, channels_last); break;
    case at::kHalf: compute<Half>(features, s, out, attention, raw, keeps, channels_last); break;
    case at::kBFloat16: compute<BFloat16>(features, s, out, attention, raw, keeps, channels_last); break;
    default: TORCH_CHECK_TYPE(false, op, ": features are ", features.scalar_type());
  }
  return {out.finished(), attention, raw};
}

}  // namespace fastcam::cpu
