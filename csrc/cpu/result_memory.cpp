#include "cpu/result_memory.h"

#include <ATen/EmptyTensor.h>
#include <ATen/ExpandUtils.h>
#include <ATen/native/TensorFactories.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/alloc_cpu.h>
#include <c10/util/strides.h>

#include <cstdlib>
#include <list>
#include <mutex>
#include <stdexcept>

#include "cpu/layout.h"

namespace fastcam::cpu {
namespace {

struct Block {
  void* data;
  size_t size;
};

void free_block(const Block& block) { c10::free_cpu(block.data); }

// Results are made and dropped with locks that are only tried: one held by a thread that a fork left behind never opens
// again. Without it, memory comes from and goes to the system, as it does without a pool.
class Pool {
 public:
  explicit Pool(size_t limit) : limit_(limit) {}

  Block take(size_t size) {
    {
      const std::unique_lock lock(mutex_, std::try_to_lock);
      if (lock.owns_lock()) {
        auto best = idle_.end();
        for (auto block = idle_.begin(); block != idle_.end(); ++block) {
          const bool fits = block->size >= size && block->size / 2 <= size;
          if (fits && (best == idle_.end() || block->size <= best->size)) best = block;  // of equals the latest idle
        }
        if (best != idle_.end()) {
          const Block found = *best;
          idle_.erase(best);
          kept_ -= found.size;
          return found;
        }
      }
    }
    const Block made = {fresh(size), size};
    advise_huge_pages(made.data, made.size);
    return made;
  }

  void give_back(const Block& block) {
    std::list<Block> freed = {block};
    {
      const std::unique_lock lock(mutex_, std::try_to_lock);
      if (lock.owns_lock() && block.size <= limit_) {
        idle_.splice(idle_.end(), freed);
        kept_ += block.size;
        while (kept_ > limit_) {
          kept_ -= idle_.front().size;
          freed.splice(freed.end(), idle_, idle_.begin());
        }
      }
    }
    for (const Block& one : freed) free_block(one);
  }

  size_t limit() const { return limit_; }

  ResultPool report() {
    const std::lock_guard lock(mutex_);
    return {limit_, kept_, idle_.size()};
  }

 private:
  // Idle blocks must not be why memory runs out.
  void* fresh(size_t size) {
    try {
      return c10::alloc_cpu(size);
    } catch (const c10::Error&) {
      std::list<Block> freed;
      {
        const std::unique_lock lock(mutex_, std::try_to_lock);
        if (!lock.owns_lock()) throw;
        freed.swap(idle_);
        kept_ = 0;
      }
      if (freed.empty()) throw;
      for (const Block& one : freed) free_block(one);
    }
    return c10::alloc_cpu(size);
  }

  const size_t limit_;
  std::mutex mutex_;
  std::list<Block> idle_;  // the longest idle first
  size_t kept_ = 0;
};

// Never destroyed: results may die after static objects do.
Pool& pool() {
  static Pool* const made = [] {
    const char* setting = std::getenv("FASTCAM_RESULT_POOL");
    return new Pool(result_pool_limit(setting == nullptr ? "" : setting));
  }();
  return *made;
}

void give_back(void* context) {
  const auto* block = static_cast<Block*>(context);
  c10::profiledCPUMemoryReporter().Delete(block->data);
  pool().give_back(*block);
  delete block;
}

// An allocator rather than a finished storage, so that the tensors can be resized and moved to shared memory.
class ResultAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t size) override {
    if (size < kPooledResult) return c10::GetCPUAllocator()->allocate(size);
    const Block block = pool().take(size);
    c10::profiledCPUMemoryReporter().New(block.data, size);  // a profiler sees results come and go, as torch's own do
    return {block.data, new Block(block), &give_back, c10::Device(c10::DeviceType::CPU)};
  }
  void copy_data(void* to, const void* from, size_t size) const override { default_copy_data(to, from, size); }
};

bool poisoned() {
  return at::globalContext().deterministicAlgorithms() && at::globalContext().deterministicFillUninitializedMemory();
}

}  // namespace

at::Tensor empty_result(at::IntArrayRef shape, at::ScalarType dtype) {
  return empty_result(shape, c10::contiguous_strides(shape), dtype);
}

at::Tensor empty_result(at::IntArrayRef shape, at::IntArrayRef strides, at::ScalarType dtype) {
  const size_t size = at::detail::computeStorageNbytes(shape, strides, c10::elementSize(dtype));
  if (size < kPooledResult || pool().limit() == 0) {
    const at::Tensor result = fastcam::empty_strided(shape, strides, dtype);
    advise_huge_pages(result.const_data_ptr(), result.nbytes());
    return result;
  }
  static auto* const allocator = new ResultAllocator;
  const c10::DispatchKeySet keys(c10::DispatchKey::CPU);
  at::Tensor result = at::detail::empty_strided_generic(shape, strides, allocator, keys, dtype);
  if (poisoned()) at::native::fill_empty_deterministic_(result);  // as at::empty does
  return result;
}

at::Tensor empty_result_like(const at::Tensor& x) {
  if (x.is_non_overlapping_and_dense()) return empty_result(x.sizes(), x.strides(), x.scalar_type());
  return empty_result(x.sizes(), at::infer_dense_strides(x.sizes(), x.strides()), x.scalar_type());
}

ResultPool result_pool() { return pool().report(); }

size_t result_pool_limit(const std::string& setting) {
  constexpr size_t kDefault = 512, kMost = size_t{1} << 30;  // MiB
  if (setting.empty()) return kDefault << 20;
  const bool number = setting.size() <= 10 && setting.find_first_not_of("0123456789") == std::string::npos;
  const size_t mib = number ? std::stoull(setting) : kMost + 1;
  if (mib > kMost) throw std::invalid_argument("FASTCAM_RESULT_POOL must be a whole number of MiB, got '" + setting + "'");
  return mib << 20;
}

}  // namespace fastcam::cpu
