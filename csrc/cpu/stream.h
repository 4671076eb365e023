// Stores past the caches, for results that no cache keeps until they are read: a plain store would fetch each line before
// it overwrites it.
#pragma once

#include "cpu/leaf.h"

#if defined(__x86_64__)
#include <emmintrin.h>
#endif

namespace fastcam::cpu {

constexpr size_t kStreamed = size_t{16} << 20;  // bytes of a result from which on it is stored so

// A vector to memory, in pieces that every x86-64 can store so; p is a multiple of 16.
template <typename V>
FASTCAM_INLINE void stream(void* p, V v) {
#if defined(__x86_64__)
  __m128i pieces[sizeof(V) / 16];
  std::memcpy(pieces, &v, sizeof(V));
  for (size_t i = 0; i < sizeof(V) / 16; ++i) _mm_stream_si128(static_cast<__m128i*>(p) + i, pieces[i]);
#else
  std::memcpy(p, &v, sizeof(V));
#endif
}

// Elements of `size` bytes from p up to the next line of the caches.
FASTCAM_INLINE int64_t elements_ahead(const void* p, int64_t size) {
  return (64 - static_cast<int64_t>(reinterpret_cast<uintptr_t>(p) % 64)) % 64 / size;
}

// After a thread's last streamed store.
FASTCAM_INLINE void end_streaming() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

}  // namespace fastcam::cpu
