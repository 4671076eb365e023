// Binding of similarity_weights.cuh to PyTorch.
#include "cuda/similarity_weights.cuh"

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "aten.h"
#include "cuda/tensors.h"
#include "similarity_weights.h"

namespace fastcam::cuda {

using at::Tensor;

std::tuple<Tensor, Tensor, Tensor> similarity_weights(const Tensor& first, const Tensor& second, std::string_view term,
                                                      std::string_view weighting, bool dissimilarity) {
  const int64_t batch = check_similarity(first, second), channels = first.size(1);
  const auto parsed_term = parse_similarity_term(term);
  const auto parsed_weighting = parse_similarity_weighting(weighting);
  const c10::cuda::CUDAGuard guard(first.device());
  const auto options = first.options().dtype(accumulation_dtype(first.scalar_type()));
  const Tensor contributions = fastcam::empty({batch, channels}, options), weights = fastcam::empty({batch, channels}, options);
  const Tensor total = fastcam::empty(batch, options);
  const Tensor u = dense_rows(first), v = dense_rows(second);
  by_element_type("similarity_weights", u, [&](auto zero) {
    using T = decltype(zero);
    using A = Accumulate<T>;
    SimilarityArgs<T> x = {};
    x.first = elements<T>(u), x.second = elements<T>(v);
    x.contributions = fresh_elements<A>(contributions), x.weights = fresh_elements<A>(weights);
    x.total = fresh_elements<A>(total);
    x.rows = batch, x.channels = channels, x.first_step = row_step(u), x.second_step = row_step(v);
    x.term = parsed_term, x.weighting = parsed_weighting, x.dissimilarity = dissimilarity;
    C10_CUDA_CHECK(run_similarity_weights(x, c10::cuda::getCurrentCUDAStream().stream()));
  });
  return {contributions, weights, total};
}

}  // namespace fastcam::cuda
