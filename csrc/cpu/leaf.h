// What the CPU leaf loops share: vectors of a chosen width, loads that widen to the accumulation type and stores that
// narrow from it, and one build of every leaf per instruction set.
//
// A leaf is a struct with `template <int BYTES> static void body(const Args&)`, always inlined, where BYTES is the vector
// width. run<Leaf>(args) calls it inside a function compiled for the chosen instruction set: any CPU (16 bytes), AVX2
// (32) or AVX-512 (64). The choice is made once per process from CPUID and capped by FASTCAM_CPU_ISA. Lambdas do not
// inherit a target attribute, so leaves use none; leaves include no ATen, so nothing compiled for a wide target is
// merged with baseline code by the linker.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string_view>
#include <type_traits>
#include <utility>

#define FASTCAM_INLINE inline __attribute__((always_inline))

#if defined(__x86_64__)
#define FASTCAM_AVX2 __attribute__((target("avx2,fma")))
#define FASTCAM_AVX512 __attribute__((target("avx512f,avx512dq,avx512vl,avx512bw,fma,prefer-vector-width=512")))
#endif

namespace fastcam::cpu {

enum class Isa { kDefault, kAvx2, kAvx512 };

inline Isa widest_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512bw")) {
    return Isa::kAvx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::kAvx2;
#endif
  return Isa::kDefault;
}

inline Isa capped_isa() {
  const char* cap = std::getenv("FASTCAM_CPU_ISA");
  const std::string_view name = cap == nullptr ? "" : cap;
  const Isa limit = name == "default" ? Isa::kDefault : name == "avx2" ? Isa::kAvx2 : Isa::kAvx512;
  const Isa widest = widest_isa();
  return limit < widest ? limit : widest;
}

inline Isa isa() {
  static const Isa chosen = capped_isa();
  return chosen;
}

template <typename Leaf, typename Args>
void run_default(const Args& args) {
  Leaf::template body<16>(args);
}

#if defined(__x86_64__)
template <typename Leaf, typename Args>
FASTCAM_AVX2 void run_avx2(const Args& args) {
  Leaf::template body<32>(args);
}

template <typename Leaf, typename Args>
FASTCAM_AVX512 void run_avx512(const Args& args) {
  Leaf::template body<64>(args);
}
#endif

template <typename Leaf, typename Args>
void run(const Args& args) {
#if defined(__x86_64__)
  if (isa() == Isa::kAvx512) return run_avx512<Leaf>(args);
  if (isa() == Isa::kAvx2) return run_avx2<Leaf>(args);
#endif
  run_default<Leaf>(args);
}

// Storage of the two half types, by their bits.
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

template <typename S>
using Accumulate = std::conditional_t<std::is_same_v<S, double>, double, float>;

template <typename T, int N>
struct VectorOf {
  typedef T type __attribute__((vector_size(N * sizeof(T))));
  typedef T unaligned __attribute__((vector_size(N * sizeof(T)), aligned(alignof(T)), may_alias));
};
template <typename T, int N>
using Vector = typename VectorOf<T, N>::type;

template <int BYTES, typename S>
constexpr int kLanes = BYTES / static_cast<int>(sizeof(Accumulate<S>));

template <typename T, int N>
FASTCAM_INLINE Vector<T, N> load_raw(const void* p) {
  return *reinterpret_cast<const typename VectorOf<T, N>::unaligned*>(p);
}

template <typename T, int N>
FASTCAM_INLINE void store_raw(void* p, Vector<T, N> v) {
  *reinterpret_cast<typename VectorOf<T, N>::unaligned*>(p) = v;
}

template <int N, typename T>
FASTCAM_INLINE Vector<T, N> splat(T value) {
  return Vector<T, N>{} + value;
}

// Values of float16, 16 bits each in 32, as floats. Exponent and mantissa move into place and 2^112 rebiases the exponent, exactly
// for subnormals too; infinities and NaNs get the full exponent. Plain integer code, so that no instruction set needs its own.
template <int N>
FASTCAM_INLINE Vector<float, N> widen_half(Vector<uint32_t, N> bits) {
  const auto magnitude = (bits & 0x7fffu) << 13;
  const auto rebiased = reinterpret_cast<Vector<uint32_t, N>>(reinterpret_cast<Vector<float, N>>(magnitude) * 0x1p112f);
  const auto special = reinterpret_cast<Vector<uint32_t, N>>(magnitude >= 0x0f800000u) & 0x7f800000u;
  return reinterpret_cast<Vector<float, N>>(rebiased | special | ((bits & 0x8000u) << 16));
}

// Floats as bfloat16 stores them, in the upper 16 bits of each 32; the lower ones mean nothing.
template <int N>
FASTCAM_INLINE Vector<uint32_t, N> round_upper(Vector<float, N> v) {
  const auto bits = reinterpret_cast<Vector<uint32_t, N>>(v), rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  return v == v ? rounded : Vector<uint32_t, N>{} + 0x7fc00000u;
}

// Floats as a half type stores them, 16 bits each in 32: rounded to nearest, ties to even; NaN stays NaN.
template <typename S, int N>
FASTCAM_INLINE Vector<uint32_t, N> round_to(Vector<float, N> v) {
  using U = Vector<uint32_t, N>;
  using F = Vector<float, N>;
  if constexpr (std::is_same_v<S, BFloat16>) {
    return round_upper<N>(v) >> 16;
  } else {
    // 4 |v|, infinite from |v| = 2^16 on, is rounded by adding it to the power of two whose last bit is worth the last one of
    // |v| as a half, times 4; for all subnormal halves that is the least normal one's. Integer code again.
    const U bits = reinterpret_cast<U>(v), magnitude = bits & 0x7fffffffu;
    const F scaled = reinterpret_cast<F>(magnitude) * 0x1p112f * 0x1p-110f;
    const U doubled = magnitude + magnitude, exponent = doubled & 0xff000000u;
    const U floored = exponent < 0x71000000u ? U{} + 0x71000000u : exponent;
    const U sum = reinterpret_cast<U>(reinterpret_cast<F>((floored >> 1) + 0x07800000u) + scaled);
    const U rounded = ((sum >> 13) & 0x7c00u) + (sum & 0x0fffu);
    return ((bits >> 16) & 0x8000u) | (v == v ? rounded : U{} + 0x7e00u);
  }
}

// N values of 16 bits in the lower or upper halves of 32, zeros in the other halves: a shuffle is one instruction or two where
// GCC 12 converts a vector in four.
template <int N, bool UPPER, int... J>
FASTCAM_INLINE Vector<uint32_t, N> spread(Vector<uint16_t, N> v, std::integer_sequence<int, J...>) {
  if constexpr (N < 8) {
    return __builtin_convertvector(v, Vector<uint32_t, N>) << (UPPER ? 16 : 0);
  } else {
    return reinterpret_cast<Vector<uint32_t, N>>(
        __builtin_shufflevector(v, Vector<uint16_t, N>{}, (J % 2 == UPPER ? J / 2 : N)...));
  }
}

// N values from p in the accumulation type.
template <int N, typename S>
FASTCAM_INLINE Vector<Accumulate<S>, N> load(const S* p) {
  if constexpr (std::is_same_v<S, float> || std::is_same_v<S, double>) {
    return load_raw<S, N>(p);
  } else {
    constexpr bool upper = std::is_same_v<S, BFloat16>;
    const auto bits = spread<N, upper>(load_raw<uint16_t, N>(p), std::make_integer_sequence<int, 2 * N>{});
    if constexpr (upper) return reinterpret_cast<Vector<float, N>>(bits);
    else return widen_half<N>(bits);
  }
}

// N values as S stores them. Vectors of bits for the two half types.
template <typename S, int N>
FASTCAM_INLINE auto narrow(Vector<Accumulate<S>, N> v) {
  if constexpr (std::is_same_v<S, float> || std::is_same_v<S, double>) {
    return v;
  } else {
    return __builtin_convertvector(round_to<S, N>(v), Vector<uint16_t, N>);
  }
}

// 2 N values of a half type, every other one in a vector: where order does not matter, this needs no shuffles.
template <int N, typename S>
FASTCAM_INLINE void load_pairs(const S* p, Vector<float, N>& even, Vector<float, N>& odd) {
  const auto both = reinterpret_cast<Vector<uint32_t, N>>(load_raw<uint16_t, 2 * N>(p));
  if constexpr (std::is_same_v<S, BFloat16>) {
    even = reinterpret_cast<Vector<float, N>>(both << 16);
    odd = reinterpret_cast<Vector<float, N>>(both & 0xffff0000u);
  } else {
    even = widen_half<N>(both & 0xffffu), odd = widen_half<N>(both >> 16);
  }
}

template <int N, typename S>
FASTCAM_INLINE void store_pairs(S* p, Vector<float, N> even, Vector<float, N> odd) {
  Vector<uint32_t, N> both;
  if constexpr (std::is_same_v<S, BFloat16>) {
    both = (round_upper<N>(even) >> 16) | (round_upper<N>(odd) & 0xffff0000u);
  } else {
    both = round_to<S, N>(even) | (round_to<S, N>(odd) << 16);
  }
  store_raw<uint16_t, 2 * N>(p, reinterpret_cast<Vector<uint16_t, 2 * N>>(both));
}

// The first n of N values from p, zeros after them; reads nothing beyond.
template <int N, typename S>
FASTCAM_INLINE Vector<Accumulate<S>, N> load_first(const S* p, int64_t n) {
  S padded[N] = {};
  std::memcpy(padded, p, n * sizeof(S));
  return load<N>(padded);
}

template <int N, typename S>
FASTCAM_INLINE void store(S* p, Vector<Accumulate<S>, N> v) {
  using Raw = std::conditional_t<sizeof(S) == 2, uint16_t, S>;
  *reinterpret_cast<typename VectorOf<Raw, N>::unaligned*>(p) = narrow<S, N>(v);
}

template <int N, typename S>
FASTCAM_INLINE void store_first(S* p, Vector<Accumulate<S>, N> v, int64_t n) {
  if (n >= N) return store<N>(p, v);
  const auto raw = narrow<S, N>(v);
  std::memcpy(p, &raw, n * sizeof(S));
}

// The lower or upper half of N lanes.
template <int N, bool UPPER, typename V>
FASTCAM_INLINE auto half_of(V v) {
  if constexpr (N == 16) {
    if constexpr (UPPER) return __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
    return __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7);
  } else if constexpr (N == 8) {
    if constexpr (UPPER) return __builtin_shufflevector(v, v, 4, 5, 6, 7);
    return __builtin_shufflevector(v, v, 0, 1, 2, 3);
  } else {
    static_assert(N == 4);
    if constexpr (UPPER) return __builtin_shufflevector(v, v, 2, 3);
    return __builtin_shufflevector(v, v, 0, 1);
  }
}

template <int N, typename V>
FASTCAM_INLINE auto horizontal_sum(V v) {
  if constexpr (N == 2) {
    return v[0] + v[1];
  } else if constexpr (N == 4) {  // without vectors of two floats, which go through memory
    const V pairs = v + __builtin_shufflevector(v, v, 2, 3, 0, 1);
    return pairs[0] + pairs[1];
  } else {
    return horizontal_sum<N / 2>(half_of<N, false>(v) + half_of<N, true>(v));
  }
}

// One addition of horizontal_sum for two vectors: the halves of every 2 HALF lanes of a, added, then those of b.
template <int HALF, int N, typename V, int... J>
FASTCAM_INLINE V folded(V a, V b, std::integer_sequence<int, J...>) {
  return __builtin_shufflevector(a, b, (J / HALF % 2 * N + J / (2 * HALF) * (2 * HALF) + J % HALF)...) +
         __builtin_shufflevector(a, b, (J / HALF % 2 * N + J / (2 * HALF) * (2 * HALF) + J % HALF + HALF)...);
}

// horizontal_sum of N vectors, of the j-th in lane j.
template <int N, int HALF = N / 2, typename V>
FASTCAM_INLINE V horizontal_sums(V (&v)[N]) {
#pragma GCC unroll 8
  for (int i = 0; i < HALF; ++i) v[i] = folded<HALF, N>(v[i], v[i + HALF], std::make_integer_sequence<int, N>{});
  if constexpr (HALF == 1) return v[0];
  else return horizontal_sums<N, HALF / 2>(v);
}

constexpr int64_t kChain = 16;  // additions of floats in a row that keep all their digits but one

// What a short chain of additions comes to, for sums in double: a long chain of floats loses a digit or two, most of all one
// of nearly equal terms, which round the same way at every addition.
template <int N, typename V>
FASTCAM_INLINE Vector<double, N> to_double(V v) {
  return __builtin_convertvector(v, Vector<double, N>);
}

template <int N, typename V>
FASTCAM_INLINE void add_wide(double* sums, V v) {
  if constexpr (std::is_same_v<V, Vector<double, N>>) {
    store_raw<double, N>(sums, load_raw<double, N>(sums) + v);
  } else {  // by halves, which fit registers
    const auto wide = to_double<N>(v);
    store_raw<double, N / 2>(sums, load_raw<double, N / 2>(sums) + half_of<N, false>(wide));
    store_raw<double, N / 2>(sums + N / 2, load_raw<double, N / 2>(sums + N / 2) + half_of<N, true>(wide));
  }
}

// How many of `rows` rows can be read `overrun` elements beyond their end without leaving the block of rows, which is
// valid memory up to the end of its last row. Reading a little too far saves masks where rows are no multiple of a
// vector; the lanes read in excess are dropped.
FASTCAM_INLINE int64_t safe_rows(int64_t rows, int64_t stride, int64_t overrun) {
  if (overrun <= 0) return rows;
  if (stride <= 0) return 0;
  const int64_t unsafe = (overrun + stride - 1) / stride;
  return unsafe < rows ? rows - unsafe : 0;
}

FASTCAM_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

}  // namespace fastcam::cpu
