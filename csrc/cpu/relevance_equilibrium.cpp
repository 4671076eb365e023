// relevance_equilibrium on CPUs: ranges of images.
#include <ATen/Parallel.h>

#include "aten.h"
#include "cpu/flat.h"
#include "cpu/result_memory.h"
#include "formulas.h"
#include "relevance.h"

namespace fastcam::cpu {
namespace {

using at::Tensor;

struct Equilibrium {
  static constexpr int kInputs = 4, kOutputs = 3, kNumbers = 3;
  template <typename V>
  static FASTCAM_INLINE void apply(const V* in, const V* n, V* out) {
    fastcam::relevance_equilibrium(in[0], in[1], in[2], in[3], n[0], n[1], n[2], out[0], out[1], out[2]);
  }
};

// All with images in sequence and in one order.
template <typename S>
void compute(const Tensor& relevance, const Tensor& budgets, const Tensor& divisors, const Tensor& out, double ratio) {
  using A = Accumulate<S>;
  const int64_t count = relevance.numel(), length = count / relevance.size(0);
  const auto* r = static_cast<const S*>(relevance.const_data_ptr());
  const auto* z = static_cast<const S*>(divisors.const_data_ptr());
  const auto* totals = static_cast<const A*>(budgets.const_data_ptr());
  auto* result = static_cast<S*>(out.mutable_data_ptr());
  at::parallel_for(0, count, kGrain, [&](int64_t begin, int64_t end) {
    while (begin < end) {  // to the end of an image, at most
      const int64_t image = begin / length;
      FlatArgs<S> args = {};
      args.in[0] = r + begin;
      for (int j = 0; j < 3; ++j) args.in[1 + j] = z + j * count + begin, args.out[j] = result + j * count + begin;
      args.numbers[0] = static_cast<A>(ratio);
      args.numbers[1] = totals[2 * image], args.numbers[2] = totals[2 * image + 1];
      args.count = std::min((image + 1) * length, end) - begin;
      run<Flat<Equilibrium, S>>(args);
      begin += args.count;
    }
  });
}

}  // namespace

Tensor relevance_equilibrium(const Tensor& relevance, const Tensor& budgets, const Tensor& divisors, double ratio) {
  const char* op = "relevance_equilibrium";
  check_relevance(op, "relevance", relevance);
  check_budgets(op, budgets, relevance);
  check_alike(op, "divisors", divisors, relevance, 3);
  const Tensor result = empty_result_like(divisors);
  if (result.numel() == 0) return result;
  const bool direct = images_in_sequence(result);
  const Tensor out = direct ? result : fastcam::empty(divisors.sizes(), divisors.options());
  const Tensor r = in_image_order_of(out, relevance), z = in_order_of(out, divisors), b = budgets.contiguous();
  switch (r.scalar_type()) {
    case at::kDouble: compute<double>(r, b, z, out, ratio); break;
    case at::kFloat: compute<float>(r, b, z, out, ratio); break;
    case at::kHalf: compute<Half>(r, b, z, out, ratio); break;
    case at::kBFloat16: compute<BFloat16>(r, b, z, out, ratio); break;
    default: TORCH_CHECK_TYPE(false, op, ": relevance is ", r.scalar_type());
  }
  if (!direct) result.copy_(out);
  return result;
}

}  // namespace fastcam::cpu
