// relevance_combine on CPUs: the elements that count, block by block, then ranges of images.

#include <vector>

#include "aten.h"
#include "cpu/flat.h"
#include "cpu/layout.h"
#include "cpu/relevance_sums.h"
#include "cpu/result_memory.h"
#include "relevance.h"

namespace fastcam::cpu {
namespace {

using at::Tensor;

struct Combine {
  static constexpr int kInputs = 4, kOutputs = 1, kNumbers = 2;
  template <typename V>
  static FASTCAM_INLINE void apply(const V* in, const V* n, V* out) {
    out[0] = relevance_combined(in[0], in[1], in[2], in[3], n[0], n[1]);
  }
};

// One over the number of elements of an image's shared part that are not 0; 0 where nothing is to be taken away.
template <typename S>
std::vector<Accumulate<S>> units(const S* inputs, const S* shared, const Accumulate<S>* budgets, int64_t batch,
                                 int64_t length) {
  using A = Accumulate<S>;
  const int64_t blocks = (length + kSumBlock - 1) / kSumBlock;
  std::vector<int64_t> counts(batch * blocks);
  at::parallel_for(0, batch * blocks, grain(kSumBlock), [&](int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end; ++at) {
      const int64_t start = at % blocks * kSumBlock, first = at / blocks * length + start;
      CountArgs<S> args;
      args.inputs = inputs + first, args.shared = shared + first;
      args.count = std::min(kSumBlock, length - start), args.found = &counts[at];
      run<CountShared<S>>(args);
    }
  });
  std::vector<A> found(batch);
  for (int64_t b = 0; b < batch; ++b) {
    int64_t count = 0;
    for (int64_t i = 0; i < blocks; ++i) count += counts[b * blocks + i];
    found[b] = count > 0 && budgets[2 * b] > A(0) ? A(1) / static_cast<A>(count) : A(0);
  }
  return found;
}

// All with images in sequence and in one order.
template <typename S>
void compute(const Tensor& inputs, const Tensor& parts, const Tensor& budgets, const Tensor& out, bool shift,
             double threshold) {
  using A = Accumulate<S>;
  const int64_t count = inputs.numel(), batch = inputs.size(0), length = count / batch;
  const auto* x = static_cast<const S*>(inputs.const_data_ptr());
  const auto* t = static_cast<const S*>(parts.const_data_ptr());
  const auto* totals = static_cast<const A*>(budgets.const_data_ptr());
  const std::vector<A> unit = shift ? units<S>(x, t, totals, batch, length) : std::vector<A>(batch, A(0));
  auto* result = static_cast<S*>(out.mutable_data_ptr());
  at::parallel_for(0, count, kGrain, [&](int64_t begin, int64_t end) {
    while (begin < end) {  // to the end of an image, at most
      const int64_t image = begin / length;
      FlatArgs<S> args = {};
      args.in[0] = x + begin;
      for (int j = 0; j < 3; ++j) args.in[1 + j] = t + j * count + begin;
      args.out[0] = result + begin;
      args.numbers[0] = unit[image], args.numbers[1] = static_cast<A>(threshold);
      args.count = std::min((image + 1) * length, end) - begin;
      run<Flat<Combine, S>>(args);
      begin += args.count;
    }
  });
}

}  // namespace

Tensor relevance_combine(const Tensor& inputs, const Tensor& parts, const Tensor& budgets, bool shift,
                         double threshold) {
  const char* op = "relevance_combine";
  check_relevance(op, "inputs", inputs);
  check_alike(op, "parts", parts, inputs, 3);
  check_budgets(op, budgets, inputs);
  const Tensor result = empty_result_like(inputs);
  if (result.numel() == 0) return result;
  const bool direct = images_in_sequence(result);
  const Tensor out = direct ? result : fastcam::empty(inputs.sizes(), inputs.options());
  const Tensor x = in_order_of(out, inputs), t = in_image_order_of(out, parts), b = budgets.contiguous();
  switch (x.scalar_type()) {
    case at::kDouble: compute<double>(x, t, b, out, shift, threshold); break;
    case at::kFloat: compute<float>(x, t, b, out, shift, threshold); break;
    case at::kHalf: compute<Half>(x, t, b, out, shift, threshold); break;
    case at::kBFloat16: compute<BFloat16>(x, t, b, out, shift, threshold); break;
    default: TORCH_CHECK_TYPE(false, op, ": inputs are ", x.scalar_type());
  }
  if (!direct) result.copy_(out);
  return result;
}

}  // namespace fastcam::cpu
