// The CUDA kernels behind C functions, built with the emulator of fake/ by an ordinary C++ compiler.
#include "cuda/cam_map.cuh"
#include "cuda/channel_weights.cuh"
#include "cuda/impute_linear.cuh"
#include "cuda/lfi_attend.cuh"
#include "cuda/lfi_attend_backward.cuh"
#include "cuda/lfi_mask.cuh"
#include "cuda/lfi_mask_backward.cuh"
#include "cuda/mask_by_features.cuh"
#include "cuda/overlay.cuh"
#include "cuda/perturb_by_rank.cuh"
#include "cuda/relevance_add.cuh"
#include "cuda/relevance_budgets.cuh"
#include "cuda/relevance_combine.cuh"
#include "cuda/relevance_divide.cuh"
#include "cuda/relevance_equilibrium.cuh"
#include "cuda/relevance_split.cuh"
#include "cuda/rescale_multipliers.cuh"
#include "cuda/similarity_weights.cuh"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

using namespace fastcam;
using namespace fastcam::cuda;

template <typename A>
std::vector<A> poisoned(int64_t count) {
  return std::vector<A>(size_t(std::max<int64_t>(count, 1)), A(NAN));
}

template <typename T>
int cam_map(const void* features, const void* reference, const void* weights, void* maps, void* raw, bool* finite,
            const int64_t* sizes, const int* flags) {
  using A = Accumulate<T>;
  CamMapArgs<T> x = {};
  x.features = static_cast<const T*>(features), x.reference = static_cast<const T*>(reference), x.weights = weights;
  x.maps = static_cast<A*>(maps), x.raw = static_cast<A*>(raw), x.finite = finite;
  x.batch = sizes[0], x.targets = sizes[1], x.channels = sizes[2];
  x.height = int(sizes[3]), x.width = int(sizes[4]), x.out_height = int(sizes[5]), x.out_width = int(sizes[6]);
  x.shared_reference = flags[0], x.positional = flags[1], x.channels_last = flags[2], x.relu = flags[3];
  x.normalize = flags[4];
  const auto plan = plan_cam_map(x);
  auto partials = poisoned<A>(plan.partials), stats = poisoned<A>(plan.stats);
  return run_cam_map(plan, partials.data(), stats.data(), x, nullptr);
}

template <typename T>
int channel_weights(const void* features, const void* reference, const void* multipliers, void* out, const int64_t* sizes,
                    const int* flags) {
  using A = Accumulate<T>;
  WeightArgs<T> x = {};
  x.features = static_cast<const T*>(features), x.reference = static_cast<const T*>(reference);
  x.multipliers = static_cast<const T*>(multipliers), x.out = static_cast<A*>(out);
  x.maps = sizes[0] * sizes[1], x.targets = sizes[1], x.channels = sizes[2], x.positions = sizes[3];
  x.reference_batch = flags[0] ? 0 : x.channels * x.positions;
  x.mode = Mode(flags[2]);
  const auto plan = plan_channel_weights(x, flags[1]);
  auto scratch = poisoned<A>(plan.scratch);
  return run_channel_weights(plan, scratch.data(), nullptr);
}

template <typename T>
int impute_linear(const void* images, const bool* missing, void* out, const int64_t* sizes) {
  using A = Accumulate<T>;
  ImputeArgs<T> x = {};
  x.images = static_cast<const T*>(images), x.missing = missing, x.out = static_cast<T*>(out);
  x.systems = sizes[0] * sizes[1], x.channels = sizes[1], x.height = int(sizes[2]), x.width = int(sizes[3]);
  x.iterations = int(sizes[4]);
  auto plan = plan_impute_linear(x.systems, x.height, x.width);
  plan.blocks = std::min<int64_t>(plan.blocks, 2);  // which so solve several systems each
  auto scratch = poisoned<A>(plan.values);
  std::vector<uint8_t> weights(plan.weights, 255);
  x.scratch = scratch.data(), x.weights = weights.data();
  return run_impute_linear(plan, x, nullptr);
}

template <typename T, typename F>
int mask_by_features(const void* images, const void* features, const void* noise, void* out, const int64_t* sizes,
                     const int64_t* strides, double scale, const int* flags) {
  using A = Accumulate<T>;
  MapArgs<F> maps = {};
  maps.features = static_cast<const F*>(features);
  maps.image = strides[0], maps.channel = strides[1], maps.row = strides[2], maps.column = strides[3];
  maps.pairs = {sizes[0], unsigned(sizes[1]), unsigned(sizes[2])};
  maps.height = int(sizes[3]), maps.width = int(sizes[4]), maps.out_height = int(sizes[5]), maps.out_width = int(sizes[6]);
  maps.minmax_first = flags[0];
  MaskArgs<T> masks = {};
  masks.images = static_cast<const T*>(images), masks.out = static_cast<T*>(out);
  masks.noise = static_cast<const A*>(noise), masks.channels = unsigned(sizes[7]);
  masks.scale = A(scale), masks.channels_last = flags[1];
  auto scratch = poisoned<A>(sizes[0] * scratch_a_row(maps.height, maps.width));
  return run_mask_by_features(maps, masks, scratch.data(), nullptr);
}

template <typename T>
int mask_by(bool wide_features, const void* images, const void* features, const void* noise, void* out,
            const int64_t* sizes, const int64_t* strides, double scale, const int* flags) {
  const auto run = wide_features ? mask_by_features<T, Accumulate<T>> : mask_by_features<T, T>;
  return run(images, features, noise, out, sizes, strides, scale, flags);
}

template <typename T, typename M>
int overlay(const void* const* in, void* out, const int64_t* sizes, const double* numbers, bool interleaved) {
  using A = Accumulate<T>;
  OverlayArgs<T, M> x = {};
  x.images = static_cast<const T*>(in[0]), x.maps = static_cast<const M*>(in[1]), x.table = static_cast<const A*>(in[2]);
  x.out = static_cast<uint8_t*>(out), x.batch = sizes[0], x.targets = sizes[1];
  x.channels = unsigned(sizes[2]), x.pixels = unsigned(sizes[3]), x.interleaved = interleaved;
  const auto at = [&](int i) { return A(numbers[i]); };
  x.numbers = {{at(3), at(4), at(5)}, {at(6), at(7), at(8)}, at(0), at(1), at(2) / (A(1) - at(1))};
  return run_overlay(x, nullptr);
}

template <typename T>
int overlay_by(bool wide_maps, const void* const* in, void* out, const int64_t* sizes, const double* numbers,
               bool interleaved) {
  const auto run = wide_maps ? overlay<T, Accumulate<T>> : overlay<T, T>;
  return run(in, out, sizes, numbers, interleaved);
}

template <typename E, typename R>
int perturb_by_rank(const void* const* in, const int64_t* counts, void* out, const int64_t* sizes, const int* flags) {
  PerturbArgs<E, R> x = {};
  x.images = static_cast<const E*>(in[0]), x.baseline = static_cast<const E*>(in[1]);
  x.ranks = static_cast<const R*>(in[2]), x.counts = counts, x.out = static_cast<E*>(out);
  x.batch = sizes[0], x.steps = sizes[1], x.baseline_image = sizes[4];
  x.channels = unsigned(sizes[2]), x.pixels = unsigned(sizes[3]);
  x.plain = flags[0], x.channels_last = flags[1], x.keep = flags[2];
  return run_perturb_by_rank(x, nullptr);
}

template <typename E>
int perturb_by(bool wide_ranks, const void* const* in, const int64_t* counts, void* out, const int64_t* sizes,
               const int* flags) {
  return wide_ranks ? perturb_by_rank<E, int64_t>(in, counts, out, sizes, flags)
                    : perturb_by_rank<E, int32_t>(in, counts, out, sizes, flags);
}

template <typename T, typename G>
int rescale_multipliers(const void* multipliers, const void* inputs, const void* reference, void* out, int64_t runs,
                        int64_t length, double negative_slope) {
  RescaleArgs<T, G> x = {};
  x.multipliers = static_cast<const G*>(multipliers), x.inputs = static_cast<const T*>(inputs);
  x.reference = static_cast<const T*>(reference), x.out = static_cast<G*>(out);
  x.runs = runs, x.length = length, x.negative_slope = Accumulate<T>(negative_slope);
  return run_rescale_multipliers(x, nullptr);
}

template <typename T>
int rescale_multipliers(bool wide, const void* multipliers, const void* inputs, const void* reference, void* out,
                        int64_t runs, int64_t length, double negative_slope) {
  return wide ? rescale_multipliers<T, Accumulate<T>>(multipliers, inputs, reference, out, runs, length, negative_slope)
              : rescale_multipliers<T, T>(multipliers, inputs, reference, out, runs, length, negative_slope);
}

template <typename T>
int relevance_divide(const void* const* in, void* out, int64_t count, double epsilon) {
  const auto* x = reinterpret_cast<const T* const*>(in);
  return run_relevance_divide(x[0], x[1], x[2], static_cast<T*>(out), count, epsilon, nullptr);
}

template <typename T>
int relevance_add(const void* const* in, void* out, void* other, int64_t count, double epsilon) {
  const auto* x = reinterpret_cast<const T* const*>(in);
  return run_relevance_add(x[0], x[1], x[2], x[3], static_cast<T*>(out), static_cast<T*>(other), count, epsilon, nullptr);
}

template <typename T>
int relevance_split(const void* const* in, void* out, const int64_t* sizes, int rule, const double* numbers) {
  const auto* given = reinterpret_cast<const T* const*>(in);
  SplitArgs<T> x = {};
  x.relevance = given[0], x.output = given[1], x.positive = given[2], x.factor = given[3];
  x.out = static_cast<T*>(out), x.runs = sizes[0], x.length = sizes[1];
  x.first = numbers[0], x.second = numbers[1], x.epsilon = numbers[2];
  return run_relevance_split(x, Rule(rule), nullptr);
}

template <typename T>
int relevance_budgets(const void* relevance, void* out, const int64_t* sizes) {
  using A = Accumulate<T>;
  auto scratch = poisoned<A>(scratch_of_budgets(sizes[0], sizes[1]));
  return run_relevance_budgets(static_cast<const T*>(relevance), static_cast<A*>(out), scratch.data(), sizes[0], sizes[1],
                               nullptr);
}

template <typename T>
int relevance_equilibrium(const void* relevance, const void* budgets, const void* divisors, void* out,
                          const int64_t* sizes, double ratio) {
  return run_relevance_equilibrium(static_cast<const T*>(relevance), static_cast<const Accumulate<T>*>(budgets),
                                   static_cast<const T*>(divisors), static_cast<T*>(out), sizes[0], sizes[1], ratio, nullptr);
}

template <typename T>
int relevance_combine(const void* inputs, const void* parts, const void* budgets, void* out, const int64_t* sizes,
                      bool shift, double threshold) {
  using A = Accumulate<T>;
  CombineArgs<T> x = {};
  x.inputs = static_cast<const T*>(inputs), x.parts = static_cast<const T*>(parts);
  x.budgets = static_cast<const A*>(budgets), x.out = static_cast<T*>(out);
  x.batch = sizes[0], x.length = sizes[1], x.threshold = threshold;
  std::vector<int> counts(size_t(x.batch * sum_chunks_of(x.length)), 1 << 20);
  auto units = poisoned<A>(x.batch);
  if (shift) x.counts = counts.data(), x.units = units.data();
  return run_relevance_combine(x, nullptr);
}

template <typename T>
int similarity_weights(const void* first, const void* second, void* contributions, void* weights, void* total,
                       const int64_t* sizes, const int* switches) {
  using A = Accumulate<T>;
  SimilarityArgs<T> x = {};
  x.first = static_cast<const T*>(first), x.second = static_cast<const T*>(second);
  x.contributions = static_cast<A*>(contributions), x.weights = static_cast<A*>(weights), x.total = static_cast<A*>(total);
  x.rows = sizes[0], x.channels = sizes[1], x.first_step = sizes[2], x.second_step = sizes[3];
  x.term = SimilarityTerm(switches[0]), x.weighting = SimilarityWeighting(switches[1]), x.dissimilarity = switches[2];
  return run_similarity_weights(x, nullptr);
}

LfiShape lfi_shape(const int64_t* sizes, bool channels_last) { return {sizes[0], sizes[1], sizes[2], channels_last}; }

template <typename T>
int lfi_mask(const void* const* in, void* const* out, const int64_t* sizes, bool channels_last) {
  const LfiMaskArgs<T> x = {static_cast<const T*>(in[0]), static_cast<const Accumulate<T>*>(in[1]), static_cast<T*>(out[0]),
                            lfi_shape(sizes, channels_last)};
  return run_lfi_mask(x, nullptr);
}

template <typename T>
int lfi_mask_backward(const void* const* in, void* const* out, const int64_t* sizes, bool channels_last) {
  const LfiMaskBackwardArgs<T> x = {static_cast<const T*>(in[0]), static_cast<const T*>(in[1]),
                                    static_cast<const Accumulate<T>*>(in[2]), static_cast<T*>(out[0]),
                                    lfi_shape(sizes, channels_last)};
  return run_lfi_mask_backward(x, nullptr);
}

template <typename T>
int lfi_attend(const void* const* in, void* const* out, const int64_t* sizes, bool channels_last, bool keeps_constant) {
  using A = Accumulate<T>;
  LfiAttendArgs<T> x = {};
  x.features = static_cast<const T*>(in[0]), x.importance = static_cast<const A*>(in[1]);
  x.out = static_cast<T*>(out[0]), x.attention = static_cast<A*>(out[1]), x.raw = static_cast<A*>(out[2]);
  x.shape = lfi_shape(sizes, channels_last), x.keeps_constant = keeps_constant;
  const auto plan = plan_lfi_attend(x);
  auto partials = poisoned<A>(plan.partials);
  return run_lfi_attend(plan, x, partials.data(), nullptr);
}

template <typename T>
int lfi_attend_backward(const void* const* in, void* const* out, const int64_t* sizes, bool channels_last,
                        bool keeps_constant) {
  using A = Accumulate<T>;
  LfiAttendBackwardArgs<T> x = {};
  x.grad = static_cast<const T*>(in[0]), x.features = static_cast<const T*>(in[3]);
  x.grad_attention = static_cast<const A*>(in[1]), x.grad_raw = static_cast<const A*>(in[2]);
  x.importance = static_cast<const A*>(in[4]), x.attention = static_cast<const A*>(in[5]);
  x.raw = static_cast<const A*>(in[6]);
  x.out = static_cast<T*>(out[0]), x.grad_importance = static_cast<A*>(out[1]);
  x.shape = lfi_shape(sizes, channels_last), x.keeps_constant = keeps_constant;
  const auto plan = plan_lfi_attend_backward(x);
  auto partials = poisoned<A>(plan.partials), map_gradient = poisoned<A>(x.shape.images * x.shape.positions);
  x.map_gradient = map_gradient.data();
  return run_lfi_attend_backward(plan, x, partials.data(), nullptr);
}

}  // namespace

// dtype: 0 float64, 1 float32, 2 float16, 3 bfloat16.
#define BY_DTYPE(call, ...)                               \
  switch (dtype) {                                        \
    case 0: return call<double>(__VA_ARGS__);             \
    case 1: return call<float>(__VA_ARGS__);              \
    case 2: return call<__half>(__VA_ARGS__);             \
    default: return call<__nv_bfloat16>(__VA_ARGS__);     \
  }

EXPORT int emulate_cam_map(int dtype, const void* features, const void* reference, const void* weights, void* maps,
                           void* raw, bool* finite, const int64_t* sizes, const int* flags) {
  BY_DTYPE(cam_map, features, reference, weights, maps, raw, finite, sizes, flags)
}

EXPORT int emulate_channel_weights(int dtype, const void* features, const void* reference, const void* multipliers,
                                   void* out, const int64_t* sizes, const int* flags) {
  BY_DTYPE(channel_weights, features, reference, multipliers, out, sizes, flags)
}

EXPORT int emulate_impute_linear(int dtype, const void* images, const bool* missing, void* out, const int64_t* sizes) {
  BY_DTYPE(impute_linear, images, missing, out, sizes)
}

EXPORT int emulate_mask_by_features(int dtype, bool wide_features, const void* images, const void* features,
                                    const void* noise, void* out, const int64_t* sizes, const int64_t* strides,
                                    double scale, const int* flags) {
  BY_DTYPE(mask_by, wide_features, images, features, noise, out, sizes, strides, scale, flags)
}

// `in`: images, maps, table. `sizes`: images, maps an image, channels, pixels. `numbers`: alpha, lowest value, last entry,
// scales, shifts.
EXPORT int emulate_overlay(int dtype, bool wide_maps, const void* const* in, void* out, const int64_t* sizes,
                           const double* numbers, bool interleaved) {
  BY_DTYPE(overlay_by, wide_maps, in, out, sizes, numbers, interleaved)
}

// `in`: images, baseline, ranks. `sizes`: images, steps, channels, pixels, elements from one baseline to the next.
EXPORT int emulate_perturb_by_rank(int width, bool wide_ranks, const void* const* in, const int64_t* counts, void* out,
                                   const int64_t* sizes, const int* flags) {
  switch (width) {
    case 8: return perturb_by<uint64_t>(wide_ranks, in, counts, out, sizes, flags);
    case 4: return perturb_by<uint32_t>(wide_ranks, in, counts, out, sizes, flags);
    default: return perturb_by<uint16_t>(wide_ranks, in, counts, out, sizes, flags);
  }
}

EXPORT int emulate_rescale_multipliers(int dtype, bool wide, const void* multipliers, const void* inputs,
                                       const void* reference, void* out, int64_t runs, int64_t length,
                                       double negative_slope) {
  BY_DTYPE(rescale_multipliers, wide, multipliers, inputs, reference, out, runs, length, negative_slope)
}

// `in`: tensors in the order of the op's arguments, null for no factor. `sizes`: runs (or images) and their length.
EXPORT int emulate_relevance_divide(int dtype, const void* const* in, void* out, int64_t count, double epsilon) {
  BY_DTYPE(relevance_divide, in, out, count, epsilon)
}

EXPORT int emulate_relevance_add(int dtype, const void* const* in, void* out, void* other, int64_t count, double epsilon) {
  BY_DTYPE(relevance_add, in, out, other, count, epsilon)
}

EXPORT int emulate_relevance_split(int dtype, const void* const* in, void* out, const int64_t* sizes, int rule,
                                   const double* numbers) {
  BY_DTYPE(relevance_split, in, out, sizes, rule, numbers)
}

EXPORT int emulate_relevance_budgets(int dtype, const void* relevance, void* out, const int64_t* sizes) {
  BY_DTYPE(relevance_budgets, relevance, out, sizes)
}

EXPORT int emulate_relevance_equilibrium(int dtype, const void* relevance, const void* budgets, const void* divisors,
                                         void* out, const int64_t* sizes, double ratio) {
  BY_DTYPE(relevance_equilibrium, relevance, budgets, divisors, out, sizes, ratio)
}

EXPORT int emulate_relevance_combine(int dtype, const void* inputs, const void* parts, const void* budgets, void* out,
                                     const int64_t* sizes, bool shift, double threshold) {
  BY_DTYPE(relevance_combine, inputs, parts, budgets, out, sizes, shift, threshold)
}

// `sizes`: rows, channels, and the steps from one row of each embedding to the next.
EXPORT int emulate_similarity_weights(int dtype, const void* first, const void* second, void* contributions, void* weights,
                                      void* total, const int64_t* sizes, const int* switches) {
  BY_DTYPE(similarity_weights, first, second, contributions, weights, total, sizes, switches)
}

// `in`: tensors in the order of the op's arguments, null for none; `out`: the results. `sizes`: images, channels, positions.
EXPORT int emulate_lfi_mask(int dtype, const void* const* in, void* const* out, const int64_t* sizes, bool channels_last) {
  BY_DTYPE(lfi_mask, in, out, sizes, channels_last)
}

EXPORT int emulate_lfi_mask_backward(int dtype, const void* const* in, void* const* out, const int64_t* sizes,
                                     bool channels_last) {
  BY_DTYPE(lfi_mask_backward, in, out, sizes, channels_last)
}

EXPORT int emulate_lfi_attend(int dtype, const void* const* in, void* const* out, const int64_t* sizes, bool channels_last,
                              bool keeps_constant) {
  BY_DTYPE(lfi_attend, in, out, sizes, channels_last, keeps_constant)
}

EXPORT int emulate_lfi_attend_backward(int dtype, const void* const* in, void* const* out, const int64_t* sizes,
                                       bool channels_last, bool keeps_constant) {
  BY_DTYPE(lfi_attend_backward, in, out, sizes, channels_last, keeps_constant)
}

// The shared arithmetic by itself.
EXPORT int first_output_f32(int cell, int in, int out) { return first_output(cell, axis_scale<float>(in, out), out); }
EXPORT int source_row_f32(int output, int in, int out) { return tap(output, axis_scale<float>(in, out), in).low; }
EXPORT double grad_cam_pp_term_f64(double shift, double g) { return grad_cam_pp_term(shift, g); }
EXPORT double xgrad_f64(double main, double shift, double magnitude) { return xgrad_coefficient(main, shift, magnitude); }
EXPORT double relu_f64(double x) { return relu(x); }
