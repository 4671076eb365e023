// Hashes of many runs of bytes: partition into blocks, the leaf of fingerprint.h, and what joins their states.
#include "cpu/fingerprint.h"

#include <ATen/Parallel.h>

#include <algorithm>

namespace fastcam::cpu {
namespace {

// SplitMix64's finaliser: a bijection after which every bit depends on every bit.
uint64_t mix(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

// A bijection of either argument for a given other one; the constant keeps zeros from staying zeros.
uint64_t join(uint64_t hash, uint64_t word) { return mix(hash ^ word) + 0x9e3779b97f4a7c15u; }

uint64_t block_hash(const char* data, size_t size) {
  uint64_t lanes[kFingerprintLanes];
  for (int i = 0; i < kFingerprintLanes; ++i) lanes[i] = mix(i + 1);
  auto* state = reinterpret_cast<uint32_t*>(lanes);
  const size_t whole = size / kFingerprintBytes, rest = size % kFingerprintBytes;
  if (whole > 0) run<FingerprintLanes>(FingerprintArgs{data, whole, state});
  if (rest > 0) {
    char padded[kFingerprintBytes] = {};
    std::memcpy(padded, data + whole * kFingerprintBytes, rest);
    run<FingerprintLanes>(FingerprintArgs{padded, 1, state});
  }
  uint64_t hash = 0;
  for (int i = 0; i < kFingerprintLanes; ++i) {
    uint64_t lane;
    std::memcpy(&lane, lanes + i, sizeof lane);
    hash = join(hash, lane);
  }
  return hash;
}

struct Block {
  const char* data;
  size_t size;
  int64_t cost;  // of the blocks before it
};

}  // namespace

std::vector<uint64_t> fingerprints(const std::vector<std::pair<uintptr_t, size_t>>& runs) {
  constexpr int64_t kUnit = 4096;  // bytes; a smaller block costs as much
  std::vector<Block> blocks;
  int64_t cost = 0;
  for (const auto& [address, size] : runs) {
    for (size_t begin = 0; begin < size; begin += kFingerprintBlock) {
      const size_t part = std::min(kFingerprintBlock, size - begin);
      blocks.push_back({reinterpret_cast<const char*>(address) + begin, part, cost});
      cost += static_cast<int64_t>((part + kUnit - 1) / kUnit);
    }
  }
  // A network's small tensors come in groups: threads share bytes, not blocks.
  std::vector<uint64_t> hashes(blocks.size());
  const auto starts_before = [](const Block& block, int64_t at) { return block.cost < at; };
  at::parallel_for(0, cost, 64, [&](int64_t begin, int64_t end) {
    auto block = std::lower_bound(blocks.begin(), blocks.end(), begin, starts_before);
    for (; block != blocks.end() && block->cost < end; ++block) {
      hashes[block - blocks.begin()] = block_hash(block->data, block->size);
    }
  });
  std::vector<uint64_t> results;
  results.reserve(runs.size());
  auto next = hashes.begin();
  for (const auto& [address, size] : runs) {
    uint64_t hash = 0;
    for (size_t begin = 0; begin < size; begin += kFingerprintBlock) hash = join(hash, *next++);
    results.push_back(join(hash, size));
  }
  return results;
}

}  // namespace fastcam::cpu
