// relevance_budgets on CPUs: blocks of images in parallel, then the blocks of each image in order.

#include <vector>

#include "aten.h"
#include "cpu/layout.h"
#include "cpu/relevance_sums.h"
#include "relevance.h"

namespace fastcam::cpu {
namespace {

using at::Tensor;

// Images are dense, each anywhere.
template <typename S>
void compute(const Tensor& relevance, const Tensor& out) {
  using A = Accumulate<S>;
  const int64_t batch = relevance.size(0), length = relevance.numel() / batch;
  const int64_t blocks = (length + kSumBlock - 1) / kSumBlock;
  const auto* values = static_cast<const S*>(relevance.const_data_ptr());
  const int64_t stride = relevance.stride(0);
  std::vector<A> sums(2 * batch * blocks);
  at::parallel_for(0, batch * blocks, grain(kSumBlock), [&](int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end; ++at) {
      const int64_t start = at % blocks * kSumBlock;
      BudgetArgs<S> args;
      args.values = values + at / blocks * stride + start;
      args.count = std::min(kSumBlock, length - start);
      args.positive = &sums[2 * at], args.negative = &sums[2 * at + 1];
      run<Budget<S>>(args);
    }
  });
  auto* result = static_cast<A*>(out.mutable_data_ptr());
  for (int64_t b = 0; b < batch; ++b) {
    double totals[2] = {0, 0};
    for (int64_t i = 0; i < 2 * blocks; ++i) totals[i % 2] += sums[2 * b * blocks + i];
    result[2 * b] = static_cast<A>(totals[0]), result[2 * b + 1] = static_cast<A>(totals[1]);
  }
}

}  // namespace

Tensor relevance_budgets(const Tensor& relevance) {
  const char* op = "relevance_budgets";
  check_relevance(op, "relevance", relevance);
  const auto options = relevance.options().dtype(accumulation_dtype(relevance.scalar_type()));
  const Tensor out = fastcam::zeros({relevance.size(0), 2}, options);
  if (relevance.numel() == 0) return out;
  // What an image alone looks like decides, so that its sums are those of a batch.
  const Tensor r = relevance.select(0, 0).is_non_overlapping_and_dense() ? relevance : relevance.contiguous();
  switch (r.scalar_type()) {
    case at::kDouble: compute<double>(r, out); break;
    case at::kFloat: compute<float>(r, out); break;
    case at::kHalf: compute<Half>(r, out); break;
    case at::kBFloat16: compute<BFloat16>(r, out); break;
    default: TORCH_CHECK_TYPE(false, op, ": relevance is ", r.scalar_type());
  }
  return out;
}

}  // namespace fastcam::cpu
