// Arithmetic of the ops, one element at a time: plain functions for host and device, so that what the GPU kernels compute
// is tested on any machine (tests/cuda_host). No framework. Never build with fast math: NaN must come through.
#pragma once

#include <cmath>
#include <type_traits>

#ifdef __CUDACC__
#define FASTCAM_HD __host__ __device__ __forceinline__
#else
#define FASTCAM_HD inline __attribute__((always_inline))  // also into code built for a wider instruction set
#endif

namespace fastcam {

// a where a comparison of V holds, else b. For vectors by their bits: GCC 12 computes nested choices, and several by one
// comparison, lane by lane in 64-byte vectors.
template <typename C, typename V>
FASTCAM_HD V choice(C condition, V a, V b) {
  if constexpr (std::is_same_v<C, bool>) {
    return condition ? a : b;
  } else {
    return reinterpret_cast<V>((reinterpret_cast<C>(a) & condition) | (reinterpret_cast<C>(b) & ~condition));
  }
}

template <typename A>
FASTCAM_HD bool is_finite(A x) {
  return x - x == A(0);  // inf - inf and NaN - NaN are NaN
}

// max(x, 0) that hands NaN on, as torch.relu does.
template <typename A>
FASTCAM_HD A relu(A x) {
  return x <= A(0) ? A(0) : x;
}

// ---- bilinear resizing, align_corners=False, no antialiasing: aten's upsample_bilinear2d ----

template <typename A>
FASTCAM_HD A axis_scale(int in, int out) {
  return A(in) / A(out);
}

// Source coordinate of an output row or column.
template <typename A>
FASTCAM_HD A source(int output, A scale) {
  const A x = scale * (A(output) + A(0.5)) - A(0.5);
  return x > A(0) ? x : A(0);
}

// The two source rows (columns) that an output row (column) mixes, and the share of the second.
template <typename A>
struct Tap {
  int low, high;
  A share;
};

template <typename A>
FASTCAM_HD Tap<A> tap(int output, A scale, int in) {
  const A x = source(output, scale);
  const int low = int(x) < in - 1 ? int(x) : in - 1;
  return {low, low < in - 1 ? low + 1 : low, x - A(low)};
}

// In aten's order of operations.
template <typename A>
FASTCAM_HD A bilinear(A top_left, A top_right, A low_left, A low_right, A down, A right) {
  const A top = (A(1) - right) * top_left + right * top_right;
  const A low = (A(1) - right) * low_left + right * low_right;
  return (A(1) - down) * top + down * low;
}

// First output row (column) whose source lies in source row (column) `cell` or beyond; `out` if there is none.
//
// Between neighbouring source rows and columns the resized map is affine in each coordinate, so over the outputs that fall
// into one such cell it is extreme at the first or last of their rows and columns. The extremes of a map are thus found from
// four values a cell: 196 instead of 50176 for 7x7 shown at 224x224.
template <typename A>
FASTCAM_HD int first_output(int cell, A scale, int out) {
  int output = int((A(cell) + A(0.5)) / scale - A(0.5));  // the exact inverse, up to rounding
  output = output < 0 ? 0 : output > out ? out : output;
  while (output > 0 && int(source(output - 1, scale)) >= cell) --output;
  while (output < out && int(source(output, scale)) < cell) ++output;
  return output;
}

template <typename A>
struct Extremes {
  A low, high;
};

template <typename A>
FASTCAM_HD void widen_to(Extremes<A>& x, A value) {
  x.low = value < x.low ? value : x.low;
  x.high = value > x.high ? value : x.high;
}

// Of both; an empty range is (infinity, -infinity) and must not widen anything.
template <typename A>
FASTCAM_HD void merge(Extremes<A>& x, const Extremes<A>& y) {
  x.low = y.low < x.low ? y.low : x.low;
  x.high = y.high > x.high ? y.high : x.high;
}

// Extremes of the resized map over the outputs y0..y1-1, x0..x1-1, all in the cell (i, j) whose corners are given.
template <typename A>
FASTCAM_HD void widen_to_cell(Extremes<A>& range, A top_left, A top_right, A low_left, A low_right, int i, int j,
                              A scale_y, A scale_x, int y0, int y1, int x0, int x1) {
  if (y1 <= y0 || x1 <= x0) return;  // downscaling skips cells
  const A down[2] = {source(y0, scale_y) - A(i), source(y1 - 1, scale_y) - A(i)};
  const A right[2] = {source(x0, scale_x) - A(j), source(x1 - 1, scale_x) - A(j)};
  for (int a = 0; a < 2; ++a) {
    for (int b = 0; b < 2; ++b) {
      widen_to(range, bilinear(top_left, top_right, low_left, low_right, down[a], right[b]));
    }
  }
}

// ---- min-max scaling ----

template <typename A>
struct MinMax {
  A low, extent;  // extent 0: a constant map, which becomes zeros
  bool finite;    // of the map before ReLU; otherwise the result is NaN throughout
};

// A constant raw map is constant after exact resizing too; rounding makes noise of it, which scaling would blow up to
// the full range. Hence the question to `raw`.
template <typename A>
FASTCAM_HD MinMax<A> min_max(Extremes<A> resized, Extremes<A> raw, bool finite) {
  const bool flat = raw.low == raw.high || resized.low == resized.high;
  return {resized.low, flat ? A(0) : resized.high - resized.low, finite};
}

template <typename A>
FASTCAM_HD A scaled(A value, const MinMax<A>& x) {
  if (!x.finite) return A(NAN);
  if (x.extent == A(0)) return A(0);
  // Rounding may put a value between the corners of a cell an ulp beyond them.
  const A s = (value - x.low) / x.extent;
  return s < A(0) ? A(0) : s > A(1) ? A(1) : s;
}

// ---- channel coefficients ----

// A term of sum relu(G) / (2 + S G); 0 where the denominator is within 1e-6 of zero.
template <typename A>
FASTCAM_HD A grad_cam_pp_term(A shift, A g) {
  const A denominator = A(2) + shift * g;
  if (denominator < A(1e-6) && denominator > A(-1e-6)) return A(0) * relu(g);
  return A(1) / denominator * relu(g);
}

// sum G A / sum A; 0 where sum A is cancellation noise.
template <typename A>
FASTCAM_HD A xgrad_coefficient(A main, A shift, A magnitude) {
  const A size = shift < A(0) ? -shift : shift;
  return size <= A(1e-6) * magnitude ? A(0) : main / shift;
}

// ---- DeepLIFT's rescale rule ----

// Secant slope, from r to u, of f(x) = x for x > 0, else slope * x; f's own slope where both lie on one side of the kink. The
// secant is taken where u and r differ in sign, so high - low adds magnitudes. V may be a vector of floats too.
template <typename V>
FASTCAM_HD V rescale_factor(V u, V r, V slope) {
  const V high = u <= r ? r : u, low = u < r ? u : r;  // NaN in u reaches high, NaN in r low
  const V secant = (high - slope * low) / (high - low);
  // One comparison for each choice: GCC 12 computes choices by combined or shared ones lane by lane in 64-byte vectors.
  const V not_negative = low > 0 ? V{} + 1 : secant;
  const V factor = high <= 0 ? slope : not_negative;
  const V unless_u_nan = high <= high ? factor : high;
  return low <= low ? unless_u_nan : low;
}

// ---- relevance ----
// V may be a vector of floats too, here and below.

// r / (d moved away from zero by epsilon), 0 where even that is 0.
template <typename V>
FASTCAM_HD V relevance_quotient(V r, V d, V epsilon) {
  const V up = d + epsilon, down = d - epsilon;
  const V moved = d >= 0 ? up : down;
  const V found = r / moved;
  return moved == 0 ? V{} : found;
}

// r / d, 0 where d is 0.
template <typename V>
FASTCAM_HD V relevance_guarded(V r, V d) {
  const V found = r / d;
  return d == 0 ? V{} : found;
}

// The negative contributions z - p to an output z; 0 where rounding alone is left of the difference.
template <typename V>
FASTCAM_HD V relevance_negative(V z, V p, V noise) {
  const V n = z - p, least = -noise * p;
  return n >= least ? V{} : n;
}

// Messages u for positive weights and v for negative ones; `first`, `second` and `epsilon` as in the op.
template <typename V>
FASTCAM_HD void relevance_alpha_beta(V r, V z, V p, V first, V second, V epsilon, V noise, V& u, V& v) {
  const V n = relevance_negative(z, p, noise);
  u = first * relevance_quotient(r, p, epsilon);
  const V found = -second * (r / (n - epsilon));  // n < 0, else it is not used
  v = n >= 0 ? V{} : found;
}

template <typename V>
FASTCAM_HD void relevance_gamma(V r, V z, V p, V first, V second, V epsilon, V noise, V& u, V& v) {
  const V n = relevance_negative(z, p, noise);
  const V above = z <= 0 ? V{} : r;  // NaN stays. A choice of the quotient, which chooses itself, would not vectorise
  const V lowered = r / (z + first * n - epsilon);  // z < 0, else it is not used
  u = relevance_quotient(above, z + first * p, epsilon);
  v = z >= 0 ? V{} : lowered;
}

template <typename V>
FASTCAM_HD void relevance_rap(V r, V z, V p, V, V, V, V noise, V& u, V& v) {
  const V n = relevance_negative(z, p, noise);
  const V positive = r <= 0 ? V{} : r, negative = r >= 0 ? V{} : r;
  u = relevance_guarded(positive, p);
  v = relevance_guarded(negative, -n) + relevance_guarded(r, p - n);
}

// Messages of Attribution Equilibrium: relevance by its budgets p and q, then by each divisor.
template <typename V>
FASTCAM_HD void relevance_equilibrium(V r, V zc, V za, V zb, V ratio, V p, V q, V& sc, V& sa, V& sb) {
  const V above = r <= 0 ? V{} : r, below = r >= 0 ? V{} : r;
  // No reciprocals: that of a subnormal budget is infinite.
  const V positive = relevance_guarded(above, p), negative = relevance_guarded(below, q);
  sc = relevance_guarded(ratio * positive + negative, zc);
  sa = relevance_guarded(positive, za);
  sb = relevance_guarded(negative, zb);
}

// The shared part of Attribution Equilibrium's relevance at an input x, before the shift.
template <typename V>
FASTCAM_HD V relevance_shared(V x, V tc) {
  const V product = x * tc;
  return x <= 0 ? V{} : product;
}

// Relevance at an input: less `unit` where the shared part is not 0, and the message of its activity.
template <typename V>
FASTCAM_HD V relevance_combined(V x, V tc, V ta, V tb, V unit, V threshold) {
  const V shared = relevance_shared(x, tc);
  const V taken = shared == 0 ? V{} : unit;
  const V added = x > threshold ? ta : tb;
  return shared - taken + added;
}

// ---- similarity of two embeddings, channel by channel ----
// In double whatever the embeddings are stored in: products and squares of float32 neither overflow nor underflow there.

enum class SimilarityTerm : int { cosine, dot, neg_sq, cross, inverse };
enum class SimilarityWeighting : int { minmax, ratio, raw };

// What is formed of u and v; a term is that times a factor of its row.
enum class SimilarityPart : int { product, square, inverse };

FASTCAM_HD constexpr SimilarityPart similarity_part_of(SimilarityTerm term) {
  if (term == SimilarityTerm::neg_sq) return SimilarityPart::square;
  return term == SimilarityTerm::inverse ? SimilarityPart::inverse : SimilarityPart::product;
}

// Rounded by itself: fused into a later difference, the least part of a row would differ from the row's minimum.
template <typename V>
FASTCAM_HD V rounded_product(V a, V b) {
#ifdef __CUDA_ARCH__
  return __dmul_rn(a, b);
#else
  return a * b;
#endif
}

// V is double or a vector of them, here and below.
template <typename V>
FASTCAM_HD V distance_of(V u, V v) {
  const V difference = u - v;
  return difference < 0 ? -difference : difference;
}

template <SimilarityPart PART, typename V>
FASTCAM_HD V similarity_part(V u, V v) {
  if constexpr (PART == SimilarityPart::product) return rounded_product(u, v);
  if constexpr (PART == SimilarityPart::square) return rounded_product(u - v, u - v);
  return 1 / (1 + distance_of(u, v));
}

// Of the parts of a row: their sum, what else the row's factor and flaws are found from, their range.
template <typename V>
struct SimilaritySums {
  V total, first, second;  // product: squares of u and of v; inverse: distances, which an infinity shows in, and nothing
  V low, high;             // NaN does not show here
};

template <typename V>
FASTCAM_HD SimilaritySums<V> no_similarity_sums() {
  return {V{}, V{}, V{}, V{} + double(INFINITY), V{} - double(INFINITY)};
}

template <SimilarityPart PART, typename V>
FASTCAM_HD void add_to(SimilaritySums<V>& sums, V u, V v) {
  const V part = similarity_part<PART>(u, v);
  sums.total += part;
  if constexpr (PART == SimilarityPart::product) sums.first += u * u, sums.second += v * v;
  if constexpr (PART == SimilarityPart::inverse) sums.first += distance_of(u, v);
  sums.low = part < sums.low ? part : sums.low;
  sums.high = part > sums.high ? part : sums.high;
}

template <typename V>
FASTCAM_HD void merge(SimilaritySums<V>& x, const SimilaritySums<V>& y) {
  x.total += y.total, x.first += y.first, x.second += y.second;
  x.low = y.low < x.low ? y.low : x.low;
  x.high = y.high > x.high ? y.high : x.high;
}

// How the parts p of a row become contributions, factor p, and weights, gain (p - base) / divisor + shift.
struct SimilarityScale {
  double factor, total, base, gain, divisor, shift;
};

template <typename A>
FASTCAM_HD SimilarityScale similarity_scale(const SimilaritySums<double>& sums, SimilarityTerm term,
                                            SimilarityWeighting weighting, bool dissimilarity) {
  double factor = term == SimilarityTerm::neg_sq ? -1 : term == SimilarityTerm::cross ? 2 : 1;
  if (term == SimilarityTerm::cosine) {
    const double u = std::sqrt(sums.first), v = std::sqrt(sums.second);
    factor = 1 / ((u < 1e-12 ? 1e-12 : u) * (v < 1e-12 ? 1e-12 : v));  // NaN stays
  }
  if (dissimilarity) factor = -factor;
  const double total = sums.total * factor;
  SimilarityScale x = {factor, total, 0, factor, 1, 0};
  if (weighting == SimilarityWeighting::ratio && total != 0) x.divisor = total < 0 ? -total : total;
  if (weighting == SimilarityWeighting::minmax) {
    const double extent = sums.high - sums.low;
    const bool finite = is_finite(total) && (term != SimilarityTerm::inverse || is_finite(sums.first));
    x.base = factor < 0 ? sums.high : sums.low, x.gain = factor < 0 ? -1 : 1;
    x.divisor = extent == 0 ? 1 : extent;
    x.shift = !finite ? double(NAN) : extent == 0 ? 1 : 0;
  }
  // For float results a product is as good as a quotient, and finite: no range of products of float32 is below 2^-351.
  if constexpr (!std::is_same_v<A, double>) x.gain /= x.divisor;
  return x;
}

template <typename A, typename V>
FASTCAM_HD V similarity_weight(V part, V base, V gain, V divisor, V shift) {
  const V scaled = gain * (part - base);
  if constexpr (std::is_same_v<A, double>) return scaled / divisor + shift;
  return scaled + shift;
}

// ---- LFI-CAM ----

// The lower of two, NaN if one is.
template <typename V>
FASTCAM_HD V lfi_lower(V x, V low) {
  const V lower = x < low ? x : low;  // a NaN in `low` stays
  return choice(x == x, lower, x);
}

// Where f lies between its channel's extremes: 1 in a constant channel, 0 where f is 0. A NaN `low` gives NaN.
template <typename V>
FASTCAM_HD V lfi_normalized(V f, V low, V high) {
  const V unless_constant = choice(low == high, V{} + 1, (f - low) / (high - low));
  return choice(f == 0, choice(low == low, V{}, low), unless_constant);
}

// The gradient of a channel's normalised values, before it is divided by the channel's extent.
template <typename V>
FASTCAM_HD V lfi_passed(V grad, V grey, V f) {
  return choice(f == 0, V{}, grad * grey);
}

// The gradient d / extent of (x - low) / (high - low) and what its lowest and highest values get in addition.
template <typename V>
FASTCAM_HD V lfi_through_min_max(V d, V x, V low, V high, V at_low, V at_high) {
  const V lowest = choice(x == low, at_low, V{});
  const V highest = choice(x == high, at_high, V{});
  return d / (high - low) + lowest - highest;
}

// What each of the lowest and of the highest values gets, from sums over d and d * scaled and the number of those values.
template <typename A>
struct LfiShares {
  A at_low, at_high;
};

template <typename A>
FASTCAM_HD LfiShares<A> lfi_shares(A total, A weighted, A lowest, A highest, A extent) {
  return {(weighted - total) / extent / lowest, weighted / extent / highest};
}

}  // namespace fastcam
