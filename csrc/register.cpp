// Hands the C++ and CUDA functions of every op to PyTorch.
#include <torch/library.h>

#include "op_list.h"

#define FASTCAM_DECLARE(NAME, FUNCTION, RESULT, ARGUMENTS) RESULT FUNCTION ARGUMENTS;
#define FASTCAM_IMPLEMENT(NAME, FUNCTION, RESULT, ARGUMENTS) m.impl(NAME, FUNCTION);

namespace fastcam::cpu {
FASTCAM_OPS(FASTCAM_DECLARE)
TORCH_LIBRARY_IMPL(fastcam, CPU, m) { FASTCAM_OPS(FASTCAM_IMPLEMENT) }
}  // namespace fastcam::cpu

#ifdef FASTCAM_WITH_CUDA
namespace fastcam::cuda {
FASTCAM_OPS(FASTCAM_DECLARE)
TORCH_LIBRARY_IMPL(fastcam, CUDA, m) { FASTCAM_OPS(FASTCAM_IMPLEMENT) }
}  // namespace fastcam::cuda
#endif
