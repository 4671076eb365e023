// lfi_attend_backward on CPUs: partition into tasks, the leaves of cam_map_reduce.h and lfi_attend_backward_leaves.h.
//
// A task is an image, whose features and gradient are read twice, the second time from the cache; so results depend neither
// on the batch nor on the thread count.

#include <memory>

#include "aten.h"
#include "cpu/cam_map_reduce.h"
#include "cpu/lfi_attend_backward_leaves.h"
#include "cpu/lfi_images.h"

namespace fastcam::cpu {
namespace {

using at::Tensor;

struct Maps {
  Tensor grad_attention, grad_raw, attention, raw;  // the first two may be none
  bool keeps_constant;
};

template <typename S>
void compute(const Tensor& grad, const Tensor& features, const Tensor& importance, const Maps& maps, const LfiResult& out,
             const Tensor& grad_importance, bool channels_last) {
  using A = Accumulate<S>;
  const int64_t channels = features.size(1), positions = features.size(2) * features.size(3);
  const Images images = as_images(features, channels_last), grads = as_images(grad, channels_last);
  const auto map_of = [&](const Tensor& map, int64_t b) {
    return map.defined() ? map.const_data_ptr<A>() + b * positions : nullptr;
  };
  at::parallel_for(0, features.size(0), grain(2 * channels * positions), [&](int64_t begin, int64_t end) {
    const std::unique_ptr<A[]> scratch(new A[2 * positions]);
    for (int64_t b = begin; b < end; ++b) {
      ReduceArgs<S> reduce = {};
      reduce.features = images.at<S>(b), reduce.feature_row = images.row;
      reduce.weights = grads.at<S>(b), reduce.weight_row = grads.row;
      reduce.channels = channels, reduce.positions = positions;
      reduce.t1 = 1, reduce.k1 = channels, reduce.p1 = positions;
      reduce.out = scratch.get();
      channels_last ? run<PositionDots<S, false, true>>(reduce) : run<ChannelStream<S, false, true>>(reduce);
      const LfiMapGradientArgs<A> map = {scratch.get(), map_of(maps.grad_attention, b), map_of(maps.grad_raw, b),
                                         map_of(maps.attention, b), map_of(maps.raw, b), scratch.get() + positions,
                                         positions, maps.keeps_constant};
      run<LfiMapGradient<A>>(map);
      LfiAttendBackwardArgs<S> args;
      args.grad = grads.at<S>(b), args.features = images.at<S>(b), args.out = out.at<S>(b);
      args.grad_row = grads.row, args.feature_row = images.row, args.out_row = out.images.row;
      args.importance = importance.const_data_ptr<A>() + b * channels;
      args.grad_importance = grad_importance.mutable_data_ptr<A>() + b * channels;
      args.attention = map.attention, args.map_gradient = map.out;
      args.channels = channels, args.positions = positions;
      channels_last ? run<LfiAttendBackwardPositions<S>>(args) : run<LfiAttendBackwardChannels<S>>(args);
    }
  });
}

}  // namespace

std::tuple<Tensor, Tensor> lfi_attend_backward(const Tensor& grad_attended, const std::optional<Tensor>& grad_attention,
                                               const std::optional<Tensor>& grad_raw, const Tensor& features,
                                               const Tensor& importance, const Tensor& attention, const Tensor& raw,
                                               std::string_view constant_map) {
  const char* op = "lfi_attend_backward";
  const Tensor given = grad_attention.value_or(Tensor()), extra = grad_raw.value_or(Tensor());
  check_no_grad(op, grad_attended, given, extra, features, importance, attention, raw);
  check_features(op, features);
  check_grad(op, "grad_attended", grad_attended, features);
  check_importance(op, importance, features);
  check_wide_map(op, "attention", attention, features);
  check_wide_map(op, "raw", raw, features);
  if (given.defined()) check_wide_map(op, "grad_attention", given, features);
  if (extra.defined()) check_wide_map(op, "grad_raw", extra, features);
  const bool keeps = keeps_constant(op, constant_map), channels_last = prefers_channels_last(features);
  const LfiResult out(features, channels_last);
  const Tensor s = widened(importance), grad_s = fastcam::empty(s.sizes(), s.options());
  if (out.tensor.numel() == 0) return {out.tensor, grad_s.to(importance.scalar_type())};
  const Maps maps = {widened(given), widened(extra), widened(attention), widened(raw), keeps};
  switch (features.scalar_type()) {
    case at::kDouble: compute<double>(grad_attended, features, s, maps, out, grad_s, channels_last); break;
    case at::kFloat: compute<float>(grad_attended, features, s, maps, out, grad_s, channels_last); break;
    case at::kHalf: compute<Half>(grad_attended, features, s, maps, out, grad_s, channels_last); break;
    case at::kBFloat16: compute<BFloat16>(grad_attended, features, s, maps, out, grad_s, channels_last); break;
    default: TORCH_CHECK_TYPE(false, op, ": features are ", features.scalar_type());
  }
  return {out.finished(), grad_s.to(importance.scalar_type())};
}

}  // namespace fastcam::cpu
