// Just enough of CUDA to run kernels on a CPU, so that their index arithmetic is tested where there is no GPU: one
// block after the other, its threads as coroutines that change over at barriers and shuffles. It shows no race between
// threads; it does show a shuffle or barrier that not all threads reach.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __forceinline__ inline
#define __launch_bounds__(...)
#define CUDART_VERSION 13000

using std::max;
using std::min;

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };
struct cudaFuncAttributes {};
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
template <typename Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, Kernel) {
  return cudaSuccess;
}
inline const char* cudaGetErrorName(cudaError_t) { return "emulated"; }
inline const char* cudaGetErrorString(cudaError_t) { return "emulated"; }

inline dim3 threadIdx{0}, blockIdx{0}, blockDim{1};

namespace emulated {

constexpr size_t STACK = 64 << 10;

struct Thread {
  ucontext_t context;
  std::vector<char> stack;
  dim3 index{0};
  int meetings = 0;  // barriers and shuffles so far
  bool done = false;
};

inline std::vector<Thread> threads;
inline ucontext_t scheduler;
inline unsigned current;
inline std::vector<float> slots[2];
inline std::function<void()> body;

inline void entry() {
  body();
  threads[current].done = true;
}

// Lets all other threads of the block come this far.
inline void meet() {
  const unsigned self = current;
  ++threads[self].meetings;
  swapcontext(&threads[self].context, &scheduler);
}

inline void fail(const char* what) {
  std::fprintf(stderr, "emulated CUDA: %s\n", what);
  std::abort();
}

inline void run(unsigned blocks, dim3 block, std::function<void()> kernel) {
  const unsigned size = block.x * block.y * block.z;
  body = std::move(kernel);
  blockDim = block;
  threads.resize(size);
  for (auto& slot : slots) slot.assign(size, 0.0f);
  for (unsigned b = 0; b < blocks; ++b) {
    blockIdx = dim3(b);
    for (unsigned i = 0; i < size; ++i) {
      Thread& thread = threads[i];
      thread.stack.resize(STACK);
      thread.index = dim3(i % block.x, i / block.x % block.y, i / block.x / block.y);
      thread.meetings = 0;
      thread.done = false;
      getcontext(&thread.context);
      thread.context.uc_stack.ss_sp = thread.stack.data();
      thread.context.uc_stack.ss_size = STACK;
      thread.context.uc_link = &scheduler;
      makecontext(&thread.context, entry, 0);
    }
    for (bool busy = true; busy;) {
      busy = false;
      for (current = 0; current < size; ++current) {
        if (threads[current].done) continue;
        threadIdx = threads[current].index;
        swapcontext(&scheduler, &threads[current].context);
        busy = true;
      }
      for (unsigned i = 0; i < size; ++i)  // a warp must stay together
        if (threads[i].meetings != threads[i / 32 * 32].meetings)
          fail("a shuffle or barrier that a warp did not reach");
    }
  }
}

}  // namespace emulated

inline void __syncthreads() { emulated::meet(); }

inline float __shfl_xor_sync(unsigned mask, float value, int step) {
  if (mask != 0xffffffffu) emulated::fail("a shuffle of a part of a warp");
  const unsigned self = emulated::current;
  auto& slots = emulated::slots[emulated::threads[self].meetings % 2];
  slots[self] = value;
  emulated::meet();
  return slots[self ^ unsigned(step)];
}
