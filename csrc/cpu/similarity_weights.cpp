// similarity_weights on CPUs: rows in parallel, each by one leaf.
#include <ATen/Parallel.h>

#include "aten.h"
#include "cpu/layout.h"
#include "cpu/result_memory.h"
#include "cpu/similarity_weights_row.h"
#include "similarity_weights.h"

namespace fastcam::cpu {
namespace {

using at::Tensor;

struct Problem {
  Tensor first, second;  // rows are dense, each anywhere
  Tensor contributions, weights, total;
  SimilarityTerm term;
  SimilarityWeighting weighting;
  bool dissimilarity;
};

template <typename S, SimilarityPart PART>
void compute_rows(const Problem& x) {
  using A = Accumulate<S>;
  SimilarityArgs<S> all = {};
  all.first = static_cast<const S*>(x.first.const_data_ptr());
  all.second = static_cast<const S*>(x.second.const_data_ptr());
  all.channels = x.contributions.size(1);
  all.term = x.term, all.weighting = x.weighting, all.dissimilarity = x.dissimilarity;
  all.contributions = x.contributions.mutable_data_ptr<A>();
  all.weights = x.weights.mutable_data_ptr<A>(), all.total = x.total.mutable_data_ptr<A>();
  const int64_t first_step = row_step(x.first), second_step = row_step(x.second);
  at::parallel_for(0, x.contributions.size(0), grain(2 * all.channels), [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      SimilarityArgs<S> args = all;
      args.first += b * first_step, args.second += b * second_step;
      args.contributions += b * args.channels, args.weights += b * args.channels, args.total += b;
      run<SimilarityRow<S, PART>>(args);
    }
  });
}

template <typename S>
void compute(const Problem& x) {
  switch (similarity_part_of(x.term)) {
    case SimilarityPart::product: return compute_rows<S, SimilarityPart::product>(x);
    case SimilarityPart::square: return compute_rows<S, SimilarityPart::square>(x);
    case SimilarityPart::inverse: return compute_rows<S, SimilarityPart::inverse>(x);
  }
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> similarity_weights(const Tensor& first, const Tensor& second, std::string_view term,
                                                      std::string_view weighting, bool dissimilarity) {
  const int64_t batch = check_similarity(first, second), channels = first.size(1);
  Problem x;
  x.term = parse_similarity_term(term), x.weighting = parse_similarity_weighting(weighting);
  x.dissimilarity = dissimilarity;
  const auto acc = accumulation_dtype(first.scalar_type());
  x.contributions = empty_result({batch, channels}, acc), x.weights = empty_result({batch, channels}, acc);
  x.total = fastcam::empty(batch, first.options().dtype(acc));
  if (batch > 0) {
    x.first = dense_rows(first), x.second = dense_rows(second);
    switch (first.scalar_type()) {
      case at::kDouble: compute<double>(x); break;
      case at::kFloat: compute<float>(x); break;
      case at::kHalf: compute<Half>(x); break;
      case at::kBFloat16: compute<BFloat16>(x); break;
      default:
        TORCH_CHECK_TYPE(false, "similarity_weights: first must be float64, float32, float16 or bfloat16, got ",
                         first.scalar_type());
    }
  }
  return {x.contributions, x.weights, x.total};
}

}  // namespace fastcam::cpu
