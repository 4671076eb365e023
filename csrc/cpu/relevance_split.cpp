// relevance_split on CPUs: runs of the inputs, each of which ends up in two places of the result.
//
// A run is an image where the result is contiguous, a pixel where it is channels_last.
#include <ATen/Parallel.h>

#include <limits>
#include <string_view>

#include "aten.h"
#include "cpu/flat.h"
#include "cpu/result_memory.h"
#include "formulas.h"
#include "relevance.h"

namespace fastcam::cpu {
namespace {

using at::Tensor;

struct AlphaBeta {
  template <typename V>
  static FASTCAM_INLINE void apply(V r, const V* in, const V* n, V* out) {
    relevance_alpha_beta(r, in[1], in[2], n[0], n[1], n[2], n[3], out[0], out[1]);
  }
};

struct Gamma {
  template <typename V>
  static FASTCAM_INLINE void apply(V r, const V* in, const V* n, V* out) {
    relevance_gamma(r, in[1], in[2], n[0], n[1], n[2], n[3], out[0], out[1]);
  }
};

struct Rap {
  template <typename V>
  static FASTCAM_INLINE void apply(V r, const V* in, const V* n, V* out) {
    relevance_rap(r, in[1], in[2], n[0], n[1], n[2], n[3], out[0], out[1]);
  }
};

template <typename RULE, bool FACTOR>
struct Split {
  static constexpr int kInputs = FACTOR ? 4 : 3, kOutputs = 2, kNumbers = 4;
  template <typename V>
  static FASTCAM_INLINE void apply(const V* in, const V* numbers, V* out) {
    V r = in[0];
    if constexpr (FACTOR) r *= in[3];
    RULE::apply(r, in, numbers, out);
  }
};

template <typename S, typename RULE>
void compute(const FlatArgs<S>& all, S* out, int64_t count, int64_t length) {
  at::parallel_for(0, count, kGrain, [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t run_number = begin / length, offset = begin % length;
      const int64_t whole = offset == 0 ? (end - begin) / length : 0;
      FlatArgs<S> args = all;
      for (auto& p : args.in) p = p == nullptr ? p : p + begin;
      args.out[0] = out + run_number * 2 * length + offset, args.out[1] = args.out[0] + length;
      args.count = std::min(length - offset, end - begin);
      if (whole > 1) args.runs = whole, args.out_step = 2 * length;
      args.in[3] != nullptr ? run<Flat<Split<RULE, true>, S>>(args) : run<Flat<Split<RULE, false>, S>>(args);
      begin += args.runs * args.count;
    }
  });
}

// Of the type stored: what sums of it are known to.
template <typename S>
double unit() {
  if (std::is_same_v<S, double>) return std::numeric_limits<double>::epsilon();
  if (std::is_same_v<S, float>) return std::numeric_limits<float>::epsilon();
  return std::is_same_v<S, Half> ? 0x1p-10 : 0x1p-7;
}

template <typename S>
void choose(const Tensor (&in)[4], const Tensor& out, std::string_view rule, double first, double second,
            double epsilon) {
  FlatArgs<S> all = {};
  for (int j = 0; j < 4; ++j) all.in[j] = in[j].defined() ? static_cast<const S*>(in[j].const_data_ptr()) : nullptr;
  const double numbers[4] = {first, second, epsilon, 8 * unit<S>()};
  for (int j = 0; j < 4; ++j) all.numbers[j] = static_cast<Accumulate<S>>(numbers[j]);
  auto* result = static_cast<S*>(out.mutable_data_ptr());
  const int64_t count = in[0].numel(), channels = in[0].size(1);
  const int64_t length = out.is_contiguous() ? count / in[0].size(0) : channels;
  if (rule == "alpha_beta") return compute<S, AlphaBeta>(all, result, count, length);
  if (rule == "gamma") return compute<S, Gamma>(all, result, count, length);
  compute<S, Rap>(all, result, count, length);
}

}  // namespace

Tensor relevance_split(const Tensor& relevance, const Tensor& output, const Tensor& positive,
                       const std::optional<Tensor>& factor, std::string_view rule, double first, double second,
                       double epsilon) {
  const char* op = "relevance_split";
  check_relevance(op, "relevance", relevance);
  check_alike(op, "output", output, relevance);
  check_alike(op, "positive", positive, relevance);
  if (factor) check_alike(op, "factor", *factor, relevance);
  TORCH_CHECK_VALUE(rule == "alpha_beta" || rule == "gamma" || rule == "rap", op, ": unknown rule ", rule);
  const auto format = split_format(relevance);
  auto sizes = relevance.sizes().vec();
  sizes[1] *= 2;
  const Tensor out = empty_result(sizes, split_strides(sizes, format), relevance.scalar_type());
  if (out.numel() == 0) return out;
  const Tensor in[4] = {relevance.contiguous(format), output.contiguous(format), positive.contiguous(format),
                        factor ? factor->contiguous(format) : Tensor()};
  switch (relevance.scalar_type()) {
    case at::kDouble: choose<double>(in, out, rule, first, second, epsilon); break;
    case at::kFloat: choose<float>(in, out, rule, first, second, epsilon); break;
    case at::kHalf: choose<Half>(in, out, rule, first, second, epsilon); break;
    case at::kBFloat16: choose<BFloat16>(in, out, rule, first, second, epsilon); break;
    default: TORCH_CHECK_TYPE(false, op, ": relevance is ", relevance.scalar_type());
  }
  return out;
}

}  // namespace fastcam::cpu
