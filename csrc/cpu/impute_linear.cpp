// impute_linear on CPUs: one task an image, the leaf of impute_linear_solver.h.
//
// An image's channels share its pyramid of holes. Images are independent, so results depend neither on the batch nor on
// the number of threads.
#include <ATen/Parallel.h>

#include <algorithm>
#include <memory>
#include <vector>

#include "aten.h"
#include "cpu/impute_linear_solver.h"
#include "impute_linear.h"

namespace fastcam::cpu {
namespace {

using at::Tensor;

template <typename A>
void compute(const Tensor& values, const Tensor& missing, int64_t iterations) {
  const int64_t channels = values.size(1), height = values.size(2), width = values.size(3);
  const ImputeShape shape = impute_shape(height, width);
  auto* pixels = static_cast<A*>(values.mutable_data_ptr());
  const auto* holes = static_cast<const bool*>(missing.const_data_ptr());
  at::parallel_for(0, values.size(0), 1, [&](int64_t begin, int64_t end) {
    std::vector<A> planes(impute_scratch<A>(shape));
    std::vector<int64_t> spans(2 * shape.rows[shape.levels]);
    const std::unique_ptr<bool[]> flags(new bool[shape.offset[shape.levels]]);
    for (int64_t n = begin; n < end; ++n) {
      std::fill(planes.begin(), planes.end(), A(0));
      ImputeArgs<A> args;
      args.values = pixels + n * channels * height * width, args.missing = holes + n * height * width;
      args.channels = channels, args.height = height, args.width = width;
      args.iterations = static_cast<int>(iterations);
      args.shape = shape, args.planes = planes.data(), args.spans = spans.data(), args.flags = flags.get();
      run<ImputeLinear<A>>(args);
    }
  });
}

}  // namespace

Tensor impute_linear(const Tensor& images, const Tensor& missing, int64_t iterations) {
  check_impute_linear(images, missing, iterations);
  const auto dtype = images.scalar_type();
  const Tensor values = fastcam::empty(images.sizes(), images.options().dtype(accumulation_dtype(dtype)),
                                       at::MemoryFormat::Contiguous);
  values.copy_(images);
  const Tensor holes = missing.contiguous();
  if (values.numel() == 0) return values.to(dtype);
  dtype == at::kDouble ? compute<double>(values, holes, iterations) : compute<float>(values, holes, iterations);
  return values.to(dtype);  // what was known comes back as it was
}

}  // namespace fastcam::cpu
