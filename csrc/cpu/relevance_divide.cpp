// relevance_divide on CPUs: flat ranges of the result.
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
struct Divide {
  static constexpr int kInputs = FACTOR ? 3 : 2, kOutputs = 1, kNumbers = 1;
  template <typename V>
  static FASTCAM_INLINE void apply(const V* in, const V* numbers, V* out) {
    if constexpr (FACTOR) {
      out[0] = relevance_quotient(in[0] * in[2], in[1], numbers[0]);
    } else {
      out[0] = relevance_quotient(in[0], in[1], numbers[0]);
    }
  }
};

template <typename S>
void compute(const Tensor& relevance, const Tensor& divisor, const Tensor& factor, const Tensor& out, double epsilon) {
  FlatArgs<S> all = {};
  all.in[0] = static_cast<const S*>(relevance.const_data_ptr());
  all.in[1] = static_cast<const S*>(divisor.const_data_ptr());
  all.in[2] = factor.defined() ? static_cast<const S*>(factor.const_data_ptr()) : nullptr;
  all.out[0] = static_cast<S*>(out.mutable_data_ptr());
  all.numbers[0] = static_cast<Accumulate<S>>(epsilon);
  at::parallel_for(0, out.numel(), kGrain, [&](int64_t begin, int64_t end) {
    FlatArgs<S> args = all;
    for (auto& p : args.in) p = p == nullptr ? p : p + begin;
    args.out[0] += begin, args.count = end - begin;
    args.in[2] != nullptr ? run<Flat<Divide<true>, S>>(args) : run<Flat<Divide<false>, S>>(args);
  });
}

}  // namespace

Tensor relevance_divide(const Tensor& relevance, const Tensor& divisor, const std::optional<Tensor>& given,
                        double epsilon) {
  const char* op = "relevance_divide";
  check_relevance(op, "relevance", relevance);
  check_alike(op, "divisor", divisor, relevance);
  if (given) check_alike(op, "factor", *given, relevance);
  const Tensor out = empty_result_like(relevance);
  if (out.numel() == 0) return out;
  const Tensor r = in_order_of(out, relevance), d = in_order_of(out, divisor);
  const Tensor factor = given ? in_order_of(out, *given) : Tensor();
  switch (out.scalar_type()) {
    case at::kDouble: compute<double>(r, d, factor, out, epsilon); break;
    case at::kFloat: compute<float>(r, d, factor, out, epsilon); break;
    case at::kHalf: compute<Half>(r, d, factor, out, epsilon); break;
    case at::kBFloat16: compute<BFloat16>(r, d, factor, out, epsilon); break;
    default: TORCH_CHECK_TYPE(false, op, ": relevance is ", out.scalar_type());
  }
  return out;
}

}  // namespace fastcam::cpu
