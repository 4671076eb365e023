// CUDA as one operating-system thread runs it, for testing kernels where there is no GPU and no toolkit.
//
// Each CUDA thread is a fiber. A block's fibers run in turn until they return or wait: at a block barrier for all others that
// have not returned, at a shuffle for their warp. Blocks run one after the other. What a GPU leaves undefined ends the
// test: a shuffle of a warp that some lanes have left, a barrier that not all lanes can reach.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __forceinline__ inline
#define __launch_bounds__(...)

using std::max;
using std::min;

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
enum cudaError_t { cudaSuccess, cudaErrorInvalidConfiguration };
using cudaStream_t = void*;

namespace emulator {

inline cudaError_t last_error = cudaSuccess;
inline dim3 thread, block, blocks, threads;

enum class State { ready, warp_barrier, block_barrier, returned };

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  State state = State::ready;
  double slot = 0;  // what this lane offers in a shuffle; every type shuffled here fits a double exactly
  static constexpr size_t kStack = 65536;
};

inline std::vector<Fiber> fibers(1024);
inline ucontext_t scheduler;
inline std::function<void()> body;
inline std::vector<double> shared(65536 / sizeof(double));

inline void fail(const char* message) {
  std::fprintf(stderr, "emulated kernel: %s\n", message);
  std::abort();
}

inline void wait(State state) {
  Fiber& fiber = fibers[thread.x];
  fiber.state = state;
  swapcontext(&fiber.context, &scheduler);
}

inline void start() {
  body();
  fibers[thread.x].state = State::returned;
  swapcontext(&fibers[thread.x].context, &scheduler);
}

// Lets every fiber of [begin, end) go on if all that have not returned wait at `barrier`.
inline bool release(unsigned begin, unsigned end, State barrier) {
  bool any = false;
  for (unsigned i = begin; i < end; ++i) {
    if (fibers[i].state == State::returned) continue;
    if (fibers[i].state != barrier) return false;
    any = true;
  }
  if (!any) return false;
  for (unsigned i = begin; i < end; ++i) {
    if (fibers[i].state == State::returned) {
      if (barrier == State::warp_barrier) fail("shuffle in a warp that some of its lanes have left");
    } else {
      fibers[i].state = State::ready;
    }
  }
  return true;
}

inline void run_block() {
  const unsigned count = threads.x;
  for (unsigned i = 0; i < count; ++i) {
    Fiber& fiber = fibers[i];
    fiber.state = State::ready;
    getcontext(&fiber.context);
    fiber.context.uc_stack = {fiber.stack.get(), 0, Fiber::kStack};
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, start, 0);
  }
  for (unsigned left = count; left > 0;) {
    for (unsigned i = 0; i < count; ++i) {
      if (fibers[i].state != State::ready) continue;
      thread = dim3(i, 0, 0);
      swapcontext(&scheduler, &fibers[i].context);
      left -= fibers[i].state == State::returned;
    }
    bool released = false;
    for (unsigned i = 0; i < count; i += 32) released |= release(i, min(i + 32, count), State::warp_barrier);
    if (!released) released = release(0, count, State::block_barrier);
    if (!released && left > 0) fail("not all threads can reach the barrier");
  }
}

}  // namespace emulator

#define threadIdx ::emulator::thread
#define blockIdx ::emulator::block
#define gridDim ::emulator::blocks
#define blockDim ::emulator::threads

inline void __syncthreads() { ::emulator::wait(::emulator::State::block_barrier); }

template <typename T>
T __shfl_xor_sync(unsigned, T value, int step) {
  ::emulator::fibers[threadIdx.x].slot = double(value);
  ::emulator::wait(::emulator::State::warp_barrier);
  const T result = T(::emulator::fibers[threadIdx.x ^ unsigned(step)].slot);
  ::emulator::wait(::emulator::State::warp_barrier);
  return result;
}

inline cudaError_t cudaGetLastError() {
  const cudaError_t error = emulator::last_error;
  emulator::last_error = cudaSuccess;
  return error;
}

namespace fastcam::cuda {

template <typename Kernel, typename... Arguments>
void launch(Kernel kernel, dim3 grid, int threads, size_t shared, cudaStream_t, const Arguments&... arguments) {
  if (grid.x * grid.y * grid.z == 0 || threads % 32 != 0 || threads > 1024 || shared > 48 * 1024) {
    emulator::last_error = cudaErrorInvalidConfiguration;
    return;
  }
  emulator::body = [&] { kernel(arguments...); };
  emulator::blocks = grid, emulator::threads = dim3(unsigned(threads));
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        // Shared memory is not cleared between blocks, and NaN shows who relies on it.
        std::memset(emulator::shared.data(), 0xff, emulator::shared.size() * sizeof(double));
        emulator::block = dim3(x, y, z);
        emulator::run_block();
      }
    }
  }
}

template <typename A>
A* dynamic_shared() {
  return reinterpret_cast<A*>(emulator::shared.data());
}

}  // namespace fastcam::cuda
