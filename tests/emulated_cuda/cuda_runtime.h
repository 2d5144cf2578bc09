// Just enough of CUDA to run kernels on a CPU, so that their index arithmetic is tested where there is no GPU: one
// block after the other, its threads as coroutines that change over at barriers and shuffles. It shows no race between
// threads; it does show a shuffle or barrier that not all threads reach.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
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

inline dim3 threadIdx{0}, blockIdx{0}, blockDim{1}, gridDim{1};

namespace emulated {

constexpr size_t STACK = 64 << 10;

struct Thread {
  ucontext_t context;
  std::vector<char> stack;
  dim3 index{0};
  bool done = false;
};

// Some threads that wait for each other.
struct Meeting {
  unsigned arrived = 0, number = 0;
};

inline std::vector<Thread> threads;
inline ucontext_t scheduler;
inline unsigned current;
inline bool progressed;
inline std::map<int, Meeting> meetings;  // of warps by their number; of other groups by negative names, -1: the block
inline std::vector<uint32_t> slots[2];
inline std::function<void()> body;

inline void entry() {
  body();
  threads[current].done = true;
}

inline void fail(const char* what) {
  std::fprintf(stderr, "emulated CUDA: %s\n", what);
  std::abort();
}

// Something happened that another thread may wait for.
inline void progress() { progressed = true; }

// Lets the other threads run.
inline void give_way() { swapcontext(&threads[current].context, &scheduler); }

// Waits until so many threads have come here, or only says that one more has.
inline void meet(int name, unsigned size, bool waits = true) {
  Meeting& meeting = meetings[name];
  const unsigned number = meeting.number;
  if (++meeting.arrived == size) {
    meeting = {0, number + 1};
    progress();
  }
  while (waits && meeting.number == number) give_way();
}

inline void run(unsigned blocks, dim3 block, std::function<void()> kernel) {
  const unsigned size = block.x * block.y * block.z;
  body = std::move(kernel);
  blockDim = block;
  threads.resize(size);
  for (auto& slot : slots) slot.assign(size, 0);
  for (unsigned b = 0; b < blocks; ++b) {
    blockIdx = dim3(b);
    meetings.clear();
    for (unsigned i = 0; i < size; ++i) {
      Thread& thread = threads[i];
      thread.stack.resize(STACK);
      thread.index = dim3(i % block.x, i / block.x % block.y, i / block.x / block.y);
      thread.done = false;
      getcontext(&thread.context);
      thread.context.uc_stack.ss_sp = thread.stack.data();
      thread.context.uc_stack.ss_size = STACK;
      thread.context.uc_link = &scheduler;
      makecontext(&thread.context, entry, 0);
    }
    for (unsigned left = size; left > 0;) {
      progressed = false;
      for (current = 0; current < size; ++current) {
        if (threads[current].done) continue;
        threadIdx = threads[current].index;
        swapcontext(&scheduler, &threads[current].context);
        if (threads[current].done) --left, progress();
      }
      if (!progressed) fail("all threads wait: for a shuffle or barrier that not all of them reach");
    }
  }
}

}  // namespace emulated

inline void __syncthreads() { emulated::meet(-1, blockDim.x * blockDim.y * blockDim.z); }

inline void __syncwarp() { emulated::meet(int(emulated::current / 32), 32); }

template <typename T>
T shuffled(unsigned mask, T value, unsigned other) {
  static_assert(sizeof(T) == 4);
  if (mask != 0xffffffffu) emulated::fail("a shuffle of a part of a warp");
  const unsigned self = emulated::current;
  auto& slots = emulated::slots[emulated::meetings[int(self / 32)].number % 2];
  std::memcpy(&slots[self], &value, sizeof value);
  emulated::meet(int(self / 32), 32);
  std::memcpy(&value, &slots[self / 32 * 32 + other], sizeof value);
  return value;
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int step) {
  return shuffled(mask, value, emulated::current % 32 ^ unsigned(step));
}

template <typename T>
T __shfl_sync(unsigned mask, T value, int lane) {
  return shuffled(mask, value, unsigned(lane));
}
