// lfi_mask_backward on CPUs: partition into tasks, the leaves of lfi_mask_backward_leaves.h.
//
// A task is (image, range of channels); each channel is one task's, so results depend neither on the batch nor on the
// thread count.

#include "aten.h"
#include "cpu/lfi_images.h"
#include "cpu/lfi_mask_backward_leaves.h"

namespace fastcam::cpu {
namespace {

using at::Tensor;

template <typename S>
void compute(const Tensor& grad, const Tensor& features, const Tensor& grey, const LfiResult& out, bool channels_last) {
  const int64_t channels = features.size(1), positions = features.size(2) * features.size(3);
  const int64_t block = lfi_channels_of_task(positions), blocks = (channels + block - 1) / block;
  const Images images = as_images(features, channels_last), grads = as_images(grad, channels_last);
  const auto* shades = grey.const_data_ptr<Accumulate<S>>();
  at::parallel_for(0, features.size(0) * blocks, grain(positions * std::min(block, channels)), [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / blocks;
      LfiMaskBackwardArgs<S> args;
      args.grad = grads.at<S>(b), args.features = images.at<S>(b), args.grey = shades + b * positions;
      args.out = out.at<S>(b);
      args.grad_row = grads.row, args.feature_row = images.row, args.out_row = out.images.row;
      args.positions = positions;
      args.k0 = task % blocks * block, args.k1 = std::min(channels, args.k0 + block);
      channels_last ? run<LfiMaskBackwardPositions<S>>(args) : run<LfiMaskBackwardChannels<S>>(args);
    }
  });
}

}  // namespace

Tensor lfi_mask_backward(const Tensor& grad, const Tensor& features, const Tensor& grey) {
  const char* op = "lfi_mask_backward";
  check_no_grad(op, grad, features, grey);
  check_features(op, features);
  check_grad(op, "grad", grad, features);
  check_map(op, "grey", grey, features);
  const bool channels_last = prefers_channels_last(features);
  const LfiResult out(features, channels_last);
  if (out.tensor.numel() == 0) return out.tensor;
  const Tensor g = widened(grey);
  switch (features.scalar_type()) {
    case at::kDouble: compute<double>(grad, features, g, out, channels_last); break;
    case at::kFloat: compute<float>(grad, features, g, out, channels_last); break;
    case at::kHalf: compute<Half>(grad, features, g, out, channels_last); break;
    case at::kBFloat16: compute<BFloat16>(grad, features, g, out, channels_last); break;
    default: TORCH_CHECK_TYPE(false, op, ": features are ", features.scalar_type());
  }
  return out.finished();
}

}  // namespace fastcam::cpu
