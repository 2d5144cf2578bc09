// What hopper.cu uses of the machine, an instruction a function: barriers in shared memory that count bytes, copies of
// boxes by the tensor memory accelerator, and matrix products of a warpgroup. Named as in PTX's manual.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "hopper.h"

#define SCOAT_DYNAMIC_SHARED(name) extern __shared__ __align__(1024) uint8_t name[]

namespace scoat {
namespace hopper {

using Barrier = uint64_t;  // an mbarrier object

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ void init(Barrier* barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count) : "memory");
}

__device__ __forceinline__ void fence_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

__device__ __forceinline__ void arrive(Barrier* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

__device__ __forceinline__ void arrive_expect(Barrier* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}

// Until the phase of this parity is over.
__device__ __forceinline__ void wait(Barrier* barrier, int parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "AGAIN:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra AGAIN;\n"
      "}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// A box that begins at these coordinates into shared memory; zeros for what lies outside of the tensor.
__device__ __forceinline__ void copy_box(void* to, const CUtensorMap* map, Barrier* barrier, int c, int x, int y,
                                         int n) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], "
      "[%2];" ::"r"(shared_address(to)),
      "l"(map), "r"(shared_address(barrier)), "r"(c), "r"(x), "r"(y), "r"(n)
      : "memory");
}

__device__ __forceinline__ void copy_bytes(void* to, const void* from, int bytes, Barrier* barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(to)),
               "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(shared_address(barrier))
               : "memory");
}

// Lets matrix products see what this thread stored into shared memory.
__device__ __forceinline__ void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Some warps of a block; 0 is that of __syncthreads.
__device__ __forceinline__ void synchronise(int name, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(name), "r"(threads) : "memory");
}

// Tells them of it, without waiting.
__device__ __forceinline__ void announce(int name, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(name), "r"(threads) : "memory");
}

template <int REGISTERS>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

template <int REGISTERS>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

__device__ __forceinline__ void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Until all but the last LEFT groups are done.
template <int LEFT>
__device__ __forceinline__ void products_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory");
}

// Two numbers side by side, the first in the lower bits; of E4M3 in 16 bits, and 448 for what is larger.
template <typename T>
__device__ __forceinline__ uint32_t pair(float first, float second);

template <>
__device__ __forceinline__ uint32_t pair<BFloat>(float first, float second) {
  uint32_t result;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(second), "f"(first));
  return result;
}

template <>
__device__ __forceinline__ uint32_t pair<Half>(float first, float second) {
  uint32_t result;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(second), "f"(first));
  return result;
}

template <>
__device__ __forceinline__ uint32_t pair<E4M3>(float first, float second) {
  uint16_t result;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(result) : "f"(second), "f"(first));
  return result;
}

// The numbers of a pair.
template <typename T>
__device__ __forceinline__ float2 numbers_of(uint32_t pair) {
  return {to_float(T{uint16_t(pair)}), to_float(T{uint16_t(pair >> 16)})};
}

// A pair of E4M3 as halves, and back.
__device__ __forceinline__ uint32_t halves_of(uint32_t pair) {
  uint32_t halves;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"(uint16_t(pair)));
  return halves;
}

__device__ __forceinline__ uint32_t pair_of_halves(uint32_t halves) {
  uint16_t pair;
  asm("cvt.rn.satfinite.e4m3x2.f16x2 %0, %1;" : "=h"(pair) : "r"(halves));
  return pair;
}

template <>
__device__ __forceinline__ float2 numbers_of<E4M3>(uint32_t pair) {
  return numbers_of<Half>(halves_of(pair));
}

// a * b, and sum + a * b, for pairs of halves.
__device__ __forceinline__ uint32_t multiply_halves(uint32_t a, uint32_t b) {
  uint32_t result;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
  return result;
}

__device__ __forceinline__ uint32_t add_product(uint32_t sum, uint32_t a, uint32_t b) {
  uint32_t result;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(sum));
  return result;
}

// The larger; NaN where one is NaN.
__device__ __forceinline__ float maximum(float a, float b) {
  float result;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
}

// d [64, N] += a [64, K] b [N, K]^T by a warpgroup, asynchronously, K being 32 bytes; d as PTX's manual spreads it over
// the threads.
template <typename T, int N>
__device__ __forceinline__ void multiply(float* d, uint64_t a, uint64_t b);

#define SCOAT_F8(i)                                                                                           \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
      "+f"(d[i + 7])
#define SCOAT_R8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define SCOAT_R16 SCOAT_R8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define SCOAT_R32 SCOAT_R16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define SCOAT_R64                                                                                \
  SCOAT_R32                                                                                      \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, " \
  "%50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define SCOAT_MULTIPLY(T, k, type, rest, n, registers, a_at, b_at, ...)                                               \
  template <>                                                                                                         \
  __device__ __forceinline__ void multiply<T, n>(float* d, uint64_t a, uint64_t b) {                                  \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" #n k ".f32." type "." type " {" registers "}, %" a_at ", %" b_at \
                 ", 1, 1, 1" rest ";"                                                                                 \
                 : __VA_ARGS__                                                                                        \
                 : "l"(a), "l"(b));                                                                                   \
  }
#define SCOAT_MULTIPLIES(T, ...)                                                                                   \
  SCOAT_MULTIPLY(T, __VA_ARGS__, 16, SCOAT_R8, "8", "9", SCOAT_F8(0))                                              \
  SCOAT_MULTIPLY(T, __VA_ARGS__, 32, SCOAT_R16, "16", "17", SCOAT_F8(0), SCOAT_F8(8))                              \
  SCOAT_MULTIPLY(T, __VA_ARGS__, 64, SCOAT_R32, "32", "33", SCOAT_F8(0), SCOAT_F8(8), SCOAT_F8(16), SCOAT_F8(24))  \
  SCOAT_MULTIPLY(T, __VA_ARGS__, 128, SCOAT_R64, "64", "65", SCOAT_F8(0), SCOAT_F8(8), SCOAT_F8(16), SCOAT_F8(24), \
                 SCOAT_F8(32), SCOAT_F8(40), SCOAT_F8(48), SCOAT_F8(56))
SCOAT_MULTIPLIES(BFloat, "k16", "bf16", ", 0, 0")  // neither matrix lies across
SCOAT_MULTIPLIES(Half, "k16", "f16", ", 0, 0")
SCOAT_MULTIPLIES(E4M3, "k32", "e4m3", "")
#undef SCOAT_MULTIPLIES
#undef SCOAT_MULTIPLY
#undef SCOAT_R64
#undef SCOAT_R32
#undef SCOAT_R16
#undef SCOAT_R8
#undef SCOAT_F8

// d [16, 8] += a [16, 16] b [8, 16]^T by a warp; all as PTX's manual spreads them over the threads.
template <typename T>
__device__ __forceinline__ void multiply_warp(float (&d)[4], const uint32_t (&a)[4], const uint2& b) {
  static_assert(std::is_same_v<T, Half> || std::is_same_v<T, BFloat>);
  if constexpr (std::is_same_v<T, Half>)
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b.x), "r"(b.y));
  else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b.x), "r"(b.y));
}

// What the host does.

// A map for boxes of `box` [channels, pixels, rows] of features [n, h, w, channels] with a channel step of 1, whose
// rows of pixels get swizzled over `span` bytes. Returns a CUresult.
template <typename T>
int encode(CUtensorMap* map, const void* data, const int64_t (&steps)[3], int64_t n, int64_t h, int64_t w,
           int64_t channels, const int (&box)[3], int span) {
  void* found = nullptr;  // of the driver, so that the library also loads where there is none
  cudaDriverEntryPointQueryResult result;
  const cudaError_t error =
#if CUDART_VERSION >= 12050
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
#else
      cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &result);
#endif
  if (error != cudaSuccess) return error;
  if (result != cudaDriverEntryPointSuccess) return cudaErrorSymbolNotFound;
  const cuuint64_t sizes[] = {cuuint64_t(channels), cuuint64_t(w), cuuint64_t(h), cuuint64_t(n)};
  constexpr int64_t SIZE = sizeof(T);
  const cuuint64_t bytes[] = {cuuint64_t(SIZE * steps[2]), cuuint64_t(SIZE * steps[1]), cuuint64_t(SIZE * steps[0])};
  const cuuint32_t extents[] = {cuuint32_t(box[0]), cuuint32_t(box[1]), cuuint32_t(box[2]), 1};
  const cuuint32_t ones[] = {1, 1, 1, 1};
  return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found)(
      map,
      SIZE == 1                 ? CU_TENSOR_MAP_DATA_TYPE_UINT8
      : std::is_same_v<T, Half> ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
      4, const_cast<void*>(data), sizes, bytes, extents, ones, CU_TENSOR_MAP_INTERLEAVE_NONE,
      span == 16   ? CU_TENSOR_MAP_SWIZZLE_NONE
      : span == 32 ? CU_TENSOR_MAP_SWIZZLE_32B
                   : CU_TENSOR_MAP_SWIZZLE_64B,
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
}

// Of the current device.
inline int64_t processors() {
  int device = 0, count = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return count;
}

// Returns a cudaError_t.
template <typename Parameters>
int launch(void (*kernel)(Parameters), int64_t blocks, int threads, int shared_bytes, void* stream,
           const Parameters& parameters) {
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (error != cudaSuccess) return error;
  // clang-format off: it takes these for shifts
  kernel<<<unsigned(blocks), threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(parameters);
  // clang-format on
  return cudaGetLastError();
}

}  // namespace hopper
}  // namespace scoat
