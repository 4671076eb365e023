// What a model looks like from outside, read through Python's C API: every explanation looks at all modules, in Python
// at several microseconds each.
#pragma once

#include <pybind11/pybind11.h>

namespace fastcam {

// (fingerprint, whether any module is in train mode) as `fastcam.program.state` defines them, or None where a module
// keeps its parts in something else than dictionaries.
//
//   token        module -> a number no other module ever has
//   tokens       id of a module -> (weak reference to it, its token), filled by `token`
//   bookkeeping  attributes that every module has
//   scalars      types of plain values, and `plain`, the same as a tuple: values of these and derived types count
//   tensor       torch.Tensor
pybind11::object outline(pybind11::handle model, pybind11::handle token, pybind11::dict tokens,
                         pybind11::frozenset bookkeeping, pybind11::frozenset scalars, pybind11::tuple plain,
                         pybind11::handle tensor);

}  // namespace fastcam
