// What the CPU and CUDA bindings of similarity_weights share: last-line checks, names of terms and weightings.
#pragma once

#include <string_view>

#include "formulas.h"
#include "ops.h"

namespace fastcam {

inline SimilarityTerm parse_similarity_term(std::string_view term) {
  if (term == "cosine") return SimilarityTerm::cosine;
  if (term == "dot") return SimilarityTerm::dot;
  if (term == "neg_sq") return SimilarityTerm::neg_sq;
  if (term == "cross") return SimilarityTerm::cross;
  TORCH_CHECK_VALUE(term == "inverse", "similarity_weights: unknown term '", term,
                    "', expected cosine, dot, neg_sq, cross or inverse");
  return SimilarityTerm::inverse;
}

inline SimilarityWeighting parse_similarity_weighting(std::string_view weighting) {
  if (weighting == "minmax") return SimilarityWeighting::minmax;
  if (weighting == "ratio") return SimilarityWeighting::ratio;
  TORCH_CHECK_VALUE(weighting == "raw", "similarity_weights: unknown weighting '", weighting,
                    "', expected minmax, ratio or raw");
  return SimilarityWeighting::raw;
}

// Returns the batch size.
inline int64_t check_similarity(const at::Tensor& first, const at::Tensor& second) {
  const char* op = "similarity_weights";
  check_no_grad(op, first, second);
  TORCH_CHECK_VALUE(first.dim() == 2 && first.size(1) > 0, op, ": first must be (B,D) with at least one channel, got ",
                    first.sizes());
  TORCH_CHECK_VALUE(second.device() == first.device(), op, ": second is on ", second.device(), ", first on ",
                    first.device());
  TORCH_CHECK_TYPE(second.scalar_type() == first.scalar_type(), op, ": second is ", second.scalar_type(), ", first is ",
                   first.scalar_type());
  const bool fits = second.dim() == 2 && second.size(1) == first.size(1) &&
                    (second.size(0) == first.size(0) || second.size(0) == 1 || first.size(0) == 1);
  TORCH_CHECK_VALUE(fits, op, ": second must be ", first.sizes(), " like the first, or one of the two have batch 1, got ",
                    second.sizes());
  return first.size(0) == 1 ? second.size(0) : first.size(0);
}

// x with dense rows, each anywhere; a copy only if they are not.
inline at::Tensor dense_rows(const at::Tensor& x) {
  return x.size(1) == 1 || x.stride(1) == 1 ? x : x.contiguous();
}

// From one row to the next, in elements; a batch of 1 goes with every row.
inline int64_t row_step(const at::Tensor& x) { return x.size(0) == 1 ? 0 : x.stride(0); }

}  // namespace fastcam
