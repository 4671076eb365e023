// Binding of relevance_split.cuh to PyTorch.
#include "cuda/relevance_split.cuh"

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "aten.h"
#include "cuda/tensors.h"
#include "relevance.h"

namespace fastcam::cuda {
namespace {

using at::Tensor;

Rule rule_of(const char* op, std::string_view name) {
  if (name == "alpha_beta") return Rule::alpha_beta;
  if (name == "gamma") return Rule::gamma;
  TORCH_CHECK_VALUE(name == "rap", op, ": rule must be alpha_beta, gamma or rap, got ", name);
  return Rule::rap;
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
  const Rule wanted = rule_of(op, rule);
  const c10::cuda::CUDAGuard guard(relevance.device());
  const auto format = split_format(relevance);
  auto sizes = relevance.sizes().vec();
  sizes[1] *= 2;
  const Tensor out = fastcam::empty(sizes, relevance.options(), format);
  if (out.numel() == 0) return out;
  const Tensor r = relevance.contiguous(format), z = output.contiguous(format), p = positive.contiguous(format);
  const Tensor f = factor ? factor->contiguous(format) : Tensor();
  by_element_type(op, out, [&](auto zero) {
    using T = decltype(zero);
    SplitArgs<T> x = {};
    x.relevance = elements<T>(r), x.output = elements<T>(z), x.positive = elements<T>(p), x.factor = elements<T>(f);
    x.out = fresh_elements<T>(out);
    x.length = format == at::MemoryFormat::Contiguous ? r.numel() / r.size(0) : r.size(1);
    x.runs = r.numel() / x.length;
    x.first = first, x.second = second, x.epsilon = epsilon;
    C10_CUDA_CHECK(run_relevance_split(x, wanted, c10::cuda::getCurrentCUDAStream().stream()));
  });
  return out;
}

}  // namespace fastcam::cuda
