// relevance_add on CPUs: flat ranges of the results.
#include <ATen/Parallel.h>

#include "aten.h"
#include "cpu/flat.h"
#include "cpu/result_memory.h"
#include "formulas.h"
#include "relevance.h"

namespace fastcam::cpu {
namespace {

using at::Tensor;

template <bool FACTOR>
struct Add {
  static constexpr int kInputs = FACTOR ? 4 : 3, kOutputs = 2, kNumbers = 1;
  template <typename V>
  static FASTCAM_INLINE void apply(const V* in, const V* numbers, V* out) {
    V r = in[0];
    if constexpr (FACTOR) r *= in[3];
    const V share = relevance_quotient(r, in[1] + in[2], numbers[0]);
    out[0] = in[1] * share, out[1] = in[2] * share;
  }
};

template <typename S>
void compute(const Tensor (&in)[4], const Tensor (&out)[2], double epsilon) {
  FlatArgs<S> all = {};
  for (int j = 0; j < 4; ++j) all.in[j] = in[j].defined() ? static_cast<const S*>(in[j].const_data_ptr()) : nullptr;
  for (int j = 0; j < 2; ++j) all.out[j] = static_cast<S*>(out[j].mutable_data_ptr());
  all.numbers[0] = static_cast<Accumulate<S>>(epsilon);
  at::parallel_for(0, out[0].numel(), kGrain, [&](int64_t begin, int64_t end) {
    FlatArgs<S> args = all;
    for (auto& p : args.in) p = p == nullptr ? p : p + begin;
    args.out[0] += begin, args.out[1] += begin, args.count = end - begin;
    args.in[3] != nullptr ? run<Flat<Add<true>, S>>(args) : run<Flat<Add<false>, S>>(args);
  });
}

}  // namespace

std::tuple<Tensor, Tensor> relevance_add(const Tensor& relevance, const Tensor& first, const Tensor& second,
                                         const std::optional<Tensor>& factor, double epsilon) {
  const char* op = "relevance_add";
  check_relevance(op, "relevance", relevance);
  check_alike(op, "first", first, relevance);
  check_alike(op, "second", second, relevance);
  if (factor) check_alike(op, "factor", *factor, relevance);
  const Tensor out[2] = {empty_result_like(relevance), empty_result_like(relevance)};
  if (out[0].numel() == 0) return {out[0], out[1]};
  const Tensor in[4] = {in_order_of(out[0], relevance), in_order_of(out[0], first), in_order_of(out[0], second),
                        factor ? in_order_of(out[0], *factor) : Tensor()};
  switch (relevance.scalar_type()) {
    case at::kDouble: compute<double>(in, out, epsilon); break;
    case at::kFloat: compute<float>(in, out, epsilon); break;
    case at::kHalf: compute<Half>(in, out, epsilon); break;
    case at::kBFloat16: compute<BFloat16>(in, out, epsilon); break;
    default: TORCH_CHECK_TYPE(false, op, ": relevance is ", relevance.scalar_type());
  }
  return {out[0], out[1]};
}

}  // namespace fastcam::cpu
