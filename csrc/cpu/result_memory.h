// Memory for large results, given back to a pool instead of the system when the tensor dies.
//
// The allocator's large blocks are fresh mappings every time, and faulting one in can take several times as long as
// computing what goes into it. Here a dead result's block is kept, with its pages, for the next result that fits: one
// that needs at least half of it. Blocks in use count nothing; of the idle ones at most result_pool_limit() bytes are
// kept, the longest idle freed first.
#pragma once

#include "aten.h"

#include <string>

namespace fastcam::cpu {

// Below it, the allocator recycles blocks itself.
constexpr size_t kPooledResult = size_t{8} << 20;

// at::empty on the CPU for a result of an op; pooled from kPooledResult bytes on. The tensor is an ordinary one.
at::Tensor empty_result(at::IntArrayRef shape, at::ScalarType dtype);
at::Tensor empty_result(at::IntArrayRef shape, at::IntArrayRef strides, at::ScalarType dtype);

// The same for at::empty_like.
at::Tensor empty_result_like(const at::Tensor& x);

struct ResultPool {
  size_t limit = 0;  // bytes of idle blocks that may be kept: FASTCAM_RESULT_POOL, read once
  size_t idle = 0;
  size_t blocks = 0;
};
ResultPool result_pool();

// Bytes for a value of FASTCAM_RESULT_POOL (MiB, empty: the default); throws std::invalid_argument with the reason.
size_t result_pool_limit(const std::string& setting);

}  // namespace fastcam::cpu
