// Just enough of CUDA to run kernels on a CPU, so that they are tested where there is no GPU: one block after the
// other, its threads as coroutines that change over at barriers and shuffles, warps in an order that changes. Index
// arithmetic shows in the results; a shuffle or barrier that not all threads reach fails, and so do races and accesses
// to memory that a kernel was not given, see races.h.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <string>

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

inline unsigned current;  // thread of the block

// Runs a kernel, which lies on the host's stack as its arguments do, with so much shared memory. Raises what failed.
void run(unsigned blocks, dim3 block, size_t shared_bytes, const void* kernel, void (*call)(const void* kernel));

template <typename Kernel>
void run(unsigned blocks, dim3 block, const Kernel& kernel, size_t shared_bytes = 0) {
  run(blocks, block, shared_bytes, &kernel, [](const void* kernel) { (*static_cast<const Kernel*>(kernel))(); });
}

[[noreturn]] void fail(const std::string& what);

// Something happened that another thread may wait for.
void progress();

// Lets the other threads run.
void give_way();

enum class Meets { waits, announces, converges };  // the last one orders no memory

// Waits until so many threads have come here, or only says that one more has. Names of warps are their numbers, those
// of other groups negative, and -1 is the block's.
void meet(int name, unsigned size, Meets how = Meets::waits);

// The value of another thread of the warp.
uint32_t shuffled(unsigned mask, uint32_t value, unsigned other);

}  // namespace emulated

inline void __syncthreads() { emulated::meet(-1, blockDim.x * blockDim.y * blockDim.z); }

inline void __syncwarp() { emulated::meet(int(emulated::current / 32), 32); }

template <typename T>
T __shfl_sync(unsigned mask, T value, int lane) {
  static_assert(sizeof(T) == 4);
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  bits = emulated::shuffled(mask, bits, unsigned(lane));
  std::memcpy(&value, &bits, sizeof bits);
  return value;
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int step) {
  return __shfl_sync(mask, value, int(emulated::current % 32 ^ unsigned(step)));
}
