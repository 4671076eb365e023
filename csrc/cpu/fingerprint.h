// A 64-bit hash of a tensor's bytes at memory speed, to tell whether weights have changed since the last call.
//
// The bytes are cut into blocks of fixed size, padded with zeros. A block runs through kLanes lanes of 64 bits, word i of
// each stretch of 256 bytes into lane i: h ^= word, either half of h times an odd constant, h rotated. For a given word the
// step is a bijection of h and the other way round, so inputs that differ in one word leave different lanes. Lanes, then
// blocks, then the length are joined one after the other by bijections too: their order counts, and a difference in one
// of them cannot be lost. Everything is defined on bytes and integers, so neither the instruction set nor the thread
// count shows in the result.
#pragma once

#include <cstddef>
#include <utility>
#include <vector>

#include "cpu/leaf.h"

namespace fastcam::cpu {

constexpr int kFingerprintBytes = 256;  // one stretch: a word for each lane
constexpr int kFingerprintLanes = kFingerprintBytes / 8;
constexpr size_t kFingerprintBlock = size_t{1} << 16;

struct FingerprintArgs {
  const char* data;
  size_t stretches;
  uint32_t* state;  // kFingerprintBytes, read and written
};

struct FingerprintLanes {
  // Registers for half of the state and the temporaries are all that the narrowest instruction set has, so there the
  // block is read in two sweeps, each over its half of every stretch.
  template <int BYTES>
  FASTCAM_INLINE static void body(const FingerprintArgs& args) {
    constexpr int kVectors = kFingerprintBytes / BYTES, kHeld = kVectors < 8 ? kVectors : 8;
    constexpr int N = BYTES / 4;
    for (int first = 0; first < kVectors; first += kHeld) {
      Vector<uint32_t, N> held[kHeld];
      for (int i = 0; i < kHeld; ++i) held[i] = load_raw<uint32_t, N>(args.state + (first + i) * N);
      const char* p = args.data + first * BYTES;
      for (size_t s = 0; s < args.stretches; ++s, p += kFingerprintBytes) {
#pragma GCC unroll 16
        for (int i = 0; i < kHeld; ++i) {
          // The multiplication carries a difference up to its half's end, the rotation brings that end to the lower
          // bits of the other half, so a sign bit is spread over all 64 within a few steps.
          // Loaded as bytes, which need no alignment: half floats may begin at any even address.
          const auto read = reinterpret_cast<Vector<uint32_t, N>>(load_raw<uint8_t, BYTES>(p + i * BYTES));
          const auto mixed = (held[i] ^ read) * 0x9e3779b1u;
          const auto words = reinterpret_cast<Vector<uint64_t, N / 2>>(mixed);
          held[i] = reinterpret_cast<Vector<uint32_t, N>>((words << 15) | (words >> 49));
        }
      }
      for (int i = 0; i < kHeld; ++i) store_raw<uint32_t, N>(args.state + (first + i) * N, held[i]);
    }
  }
};

// One hash for each run of bytes (address, length).
std::vector<uint64_t> fingerprints(const std::vector<std::pair<uintptr_t, size_t>>& runs);

}  // namespace fastcam::cpu
