// IEEE half precision for the emulator.
#pragma once

struct __half {
  _Float16 value;
};

inline __half __float2half_rn(float x) { return {_Float16(x)}; }
inline float __half2float(__half x) { return float(x.value); }
