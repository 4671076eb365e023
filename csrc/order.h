// Elementwise ops read all tensors in the memory order of their result, as flat runs, on every device.
#pragma once

#include "aten.h"

namespace fastcam {

inline bool lies_as(const at::Tensor& x, at::IntArrayRef strides) {
  for (int64_t d = 0; d < x.dim(); ++d) {
    if (x.size(d) > 1 && x.stride(d) != strides[d]) return false;
  }
  return true;
}

// x with the given strides, which are dense for its sizes; a copy only if it lies otherwise.
inline at::Tensor with_strides(at::IntArrayRef strides, const at::Tensor& x) {
  return lies_as(x, strides) ? x : fastcam::empty_strided(x.sizes(), strides, x.options()).copy_(x);
}

// x in the order of `out`, which is dense and at least as large in every dimension.
inline at::Tensor in_order_of(const at::Tensor& out, const at::Tensor& x) { return with_strides(out.strides(), x); }

// Element e of run i of `out` belongs to element e of run i of every tensor, and of the one run of a shared reference.
struct Runs {
  at::Tensor multipliers, inputs, reference;
  int64_t runs, length;
};

constexpr int64_t kShortRun = 256;  // elements; an expanded reference costs less than starting over so often

// Of a non-empty dense `out`. A reference of batch 1 is read again for every image, a run; it is expanded where images are
// short or not the outermost dimension.
inline Runs as_runs(const at::Tensor& out, const at::Tensor& multipliers, const at::Tensor& inputs, at::Tensor reference) {
  const int64_t batch = out.size(0), length = out.numel() / batch;
  const bool broadcast = reference.size(0) < batch;
  const bool shared = broadcast && out.stride(0) == length && length >= kShortRun;
  if (broadcast && !shared) reference = reference.expand(out.sizes());
  return {in_order_of(out, multipliers), in_order_of(out, inputs), in_order_of(out, reference), shared ? batch : 1,
          shared ? length : out.numel()};
}

}  // namespace fastcam
