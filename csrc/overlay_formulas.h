// Arithmetic of overlay, one element at a time, for host and device. No framework.
#pragma once

#include "formulas.h"

namespace fastcam {

template <typename A>
struct OverlayNumbers {
  A scale[3], shift[3];  // of a pixel's channels
  A alpha, lowest;          // of maps: their range begins at `lowest`
  A entries;                // of the table beyond the first, for an extent of 1 of a map's range
};

// V may be a vector of `A`, here and below.

// To the nearest integer, halves to even; for magnitudes below 2^22 (A = float) or 2^51.
template <typename A, typename V>
FASTCAM_HD V rounded(V x) {
  const A ulp_is_one = sizeof(A) == 8 ? A(0x1.8p52) : A(0x1.8p23);
  return (x + ulp_is_one) - ulp_is_one;
}

template <typename A, typename V>
FASTCAM_HD V within(V x, A low, A high) {
  const V raised = x < low ? V{} + low : x;
  return raised > high ? V{} + high : raised;
}

// 0 for NaN.
template <typename V>
FASTCAM_HD V known(V x) {
  return x == x ? x : V{};
}

// A channel of a pixel in 0..255.
template <typename A, typename V>
FASTCAM_HD V overlay_pixel(V x, V scale, V shift) {
  return rounded<A>(within<A>(known(x * scale + shift), A(0), A(1)) * A(255));
}

// A map's value in its range.
template <typename A, typename V>
FASTCAM_HD V overlay_value(V m, A lowest) {
  return within<A>(known(m), lowest, A(1));
}

// The table's entry for such a value, as a number.
template <typename A, typename V>
FASTCAM_HD V overlay_entry(V value, A lowest, A entries) {
  return rounded<A>((value - lowest) * entries);
}

// In 0..255, not rounded.
template <typename A, typename V>
FASTCAM_HD V overlay_blend(V pixel, V colour, V opacity) {
  return within<A>(pixel + opacity * (colour - pixel), A(0), A(255));
}

}  // namespace fastcam
