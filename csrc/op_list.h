// Every op, with its one signature on all devices; what its arguments mean stands in fastcam/_library.py and at the public
// function.
#pragma once

#include <optional>
#include <string_view>
#include <tuple>

#include "aten.h"

namespace fastcam {

using at::Tensor;
using Maybe = std::optional<Tensor>;
using Pair = std::tuple<Tensor, Tensor>;
using Triple = std::tuple<Tensor, Tensor, Tensor>;
using Name = std::string_view;
using Numbers = std::optional<at::ArrayRef<double>>;

// (name of the overload, function, result, arguments)
#define FASTCAM_OPS(OP)                                                                                                 \
  OP("cam_map.with_raw", cam_map, Triple,                                                                               \
     (const Tensor&, const Tensor&, const Maybe&, bool, bool, at::OptionalSymIntArrayRef))                              \
  OP("channel_weights", channel_weights, Tensor, (const Tensor&, const Tensor&, const Maybe&, Name))                    \
  OP("impute_linear", impute_linear, Tensor, (const Tensor&, const Tensor&, int64_t))                                   \
  OP("lfi_attend", lfi_attend, Triple, (const Tensor&, const Tensor&, Name))                                            \
  OP("lfi_attend_backward", lfi_attend_backward, Pair,                                                                  \
     (const Tensor&, const Maybe&, const Maybe&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, Name))     \
  OP("lfi_mask", lfi_mask, Tensor, (const Tensor&, const Tensor&))                                                      \
  OP("lfi_mask_backward", lfi_mask_backward, Tensor, (const Tensor&, const Tensor&, const Tensor&))                     \
  OP("mask_by_features", mask_by_features, Tensor,                                                                      \
     (const Tensor&, const Tensor&, int64_t, std::optional<int64_t>, const Maybe&, double, Name))                       \
  OP("overlay", overlay, Tensor, (const Tensor&, const Tensor&, const Tensor&, double, bool, Numbers, Numbers))         \
  OP("perturb_by_rank", perturb_by_rank, Tensor, (const Tensor&, const Tensor&, const Tensor&, const Tensor&, bool))    \
  OP("relevance_add", relevance_add, Pair, (const Tensor&, const Tensor&, const Tensor&, const Maybe&, double))         \
  OP("relevance_budgets", relevance_budgets, Tensor, (const Tensor&))                                                   \
  OP("relevance_combine", relevance_combine, Tensor, (const Tensor&, const Tensor&, const Tensor&, bool, double))       \
  OP("relevance_divide", relevance_divide, Tensor, (const Tensor&, const Tensor&, const Maybe&, double))                \
  OP("relevance_equilibrium", relevance_equilibrium, Tensor, (const Tensor&, const Tensor&, const Tensor&, double))     \
  OP("relevance_split", relevance_split, Tensor,                                                                        \
     (const Tensor&, const Tensor&, const Tensor&, const Maybe&, Name, double, double, double))                         \
  OP("rescale_multipliers", rescale_multipliers, Tensor, (const Tensor&, const Tensor&, const Tensor&, double))         \
  OP("similarity_weights", similarity_weights, Triple, (const Tensor&, const Tensor&, Name, Name, bool))

}  // namespace fastcam
