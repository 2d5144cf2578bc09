// The machine of csrc/hopper_ptx.h on a CPU: shared memory is a buffer, a barrier counts, a copy is done at once, and
// each thread of a warpgroup computes its own part of a matrix product from the bytes that the descriptors point at.
// What is asynchronous there is so for the clocks of races.h, too.
#pragma once

#include <cuda_runtime.h>

#include <cmath>

#include "hopper.h"
#include "races.h"

#define __grid_constant__
#define SCOAT_DYNAMIC_SHARED(name) uint8_t* const name = emulated::shared

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

// A tensor [n, h, w, c] of numbers of some bytes, and the boxes that are read from it.
struct CUtensorMap {
  const uint8_t* data;
  int64_t steps[4], sizes[4];  // c, w, h, n; in bytes
  int box[3], span, size;
};

namespace scoat {
namespace hopper {

struct Barrier {
  int count, pending, bytes, phase;
};
static_assert(sizeof(Barrier) == 16, "of which the kernel has twice the room that it needs");

uint32_t shared_address(const void* pointer);
void init(Barrier* barrier, int count);
void fence_init();
void arrive_expect(Barrier* barrier, int bytes);
inline void arrive(Barrier* barrier) { arrive_expect(barrier, 0); }
void wait(Barrier* barrier, int parity);
void copy_bytes(void* to, const void* from, int bytes, Barrier* barrier);
void copy_box(void* to, const CUtensorMap* map, Barrier* barrier, int c, int x, int y, int n);
void fence_async();

inline void synchronise(int name, int threads) { emulated::meet(-1 - name, unsigned(threads)); }
inline void announce(int name, int threads) {
  emulated::meet(-1 - name, unsigned(threads), emulated::Meets::announces);
}

template <int>
void take_registers() {}
template <int>
void give_registers() {}

void products_begin();
void products_commit();
void products_wait(int left);
template <int LEFT>
void products_wait() {
  products_wait(LEFT);
}

uint8_t e4m3_of(float value);
float to_float(E4M3 value);

template <typename T>
uint32_t pair(float first, float second) {
  return from_float<T>(first).bits | uint32_t(from_float<T>(second).bits) << 16;
}

template <>
inline uint32_t pair<E4M3>(float first, float second) {
  return e4m3_of(first) | uint32_t(e4m3_of(second)) << 8;
}

template <typename T>
float2 numbers_of(uint32_t pair) {
  return {to_float(T{uint16_t(pair)}), to_float(T{uint16_t(pair >> 16)})};
}

template <>
inline float2 numbers_of<E4M3>(uint32_t pair) {
  return {to_float(E4M3{uint8_t(pair)}), to_float(E4M3{uint8_t(pair >> 8)})};
}

inline uint32_t halves_of(uint32_t pair) {
  const float2 both = numbers_of<E4M3>(pair);
  return scoat::hopper::pair<Half>(both.x, both.y);
}
inline uint32_t pair_of_halves(uint32_t halves) {
  const float2 both = numbers_of<Half>(halves);
  return pair<E4M3>(both.x, both.y);
}
// A product of two halves is a float, and of a sum with one the second rounding is as good as never seen.
inline uint32_t multiply_halves(uint32_t a, uint32_t b) {
  const float2 left = numbers_of<Half>(a), right = numbers_of<Half>(b);
  return pair<Half>(left.x * right.x, left.y * right.y);
}
inline uint32_t add_product(uint32_t sum, uint32_t a, uint32_t b) {
  const float2 left = numbers_of<Half>(a), right = numbers_of<Half>(b), more = numbers_of<Half>(sum);
  return pair<Half>(left.x * right.x + more.x, left.y * right.y + more.y);
}

inline float maximum(float a, float b) { return std::isnan(a) ? a : std::isnan(b) ? b : std::max(a, b); }

template <typename T>
void multiply(int n, float* d, uint64_t a, uint64_t b);

template <typename T, int N>
void multiply(float* d, uint64_t a, uint64_t b) {
  multiply<T>(N, d, a, b);
}

template <typename T>
void multiply_warp(float (&d)[4], const uint32_t (&a)[4], const uint2& b) {
  const int lane = int(threadIdx.x % 32);
  float rows[2][16], columns[2][16];  // of a and of b, of which this thread has products
  const auto take = [](float (&to)[16], int at, uint32_t words) {
    const float2 both = numbers_of<T>(words);
    to[at] = both.x, to[at + 1] = both.y;
  };
  for (int i = 0; i < 2; ++i)
    for (int half = 0; half < 2; ++half)
      for (int q = 0; q < 4; ++q) {
        take(rows[i], 8 * half + 2 * q, __shfl_sync(0xffffffffu, a[2 * half + i], lane / 4 * 4 + q));
        const int column = 2 * (lane % 4) + i;
        take(columns[i], 8 * half + 2 * q, __shfl_sync(0xffffffffu, half ? b.y : b.x, 4 * column + q));
      }
  for (int i = 0; i < 4; ++i)
    for (int k = 0; k < 16; ++k) d[i] += rows[i / 2][k] * columns[i % 2][k];
}

template <typename T>
int encode(CUtensorMap* map, const void* data, const int64_t (&steps)[3], int64_t n, int64_t h, int64_t w,
           int64_t channels, const int (&box)[3], int span) {
  constexpr int64_t SIZE = sizeof(T);
  *map = {static_cast<const uint8_t*>(data),
          {SIZE, SIZE * steps[2], SIZE * steps[1], SIZE * steps[0]},
          {channels, w, h, n},
          {box[0], box[1], box[2]},
          span,
          int(SIZE)};
  bool allowed = reinterpret_cast<uintptr_t>(data) % 16 == 0 && (span == 16 || box[0] * SIZE <= span);
  for (int64_t bytes : {map->steps[1], map->steps[2], map->steps[3]}) allowed = allowed && bytes % 16 == 0;
  for (int size : map->box) allowed = allowed && size <= 256;
  return allowed ? cudaSuccess : cudaErrorInvalidValue;
}

inline int64_t processors() { return 2; }  // so that a block gets more than one tile

template <typename Parameters>
int launch(void (*kernel)(Parameters), int64_t blocks, int threads, int shared_bytes, void*,
           const Parameters& parameters) {
  if (shared_bytes > emulated::SHARED_BYTES) return cudaErrorInvalidConfiguration;
  gridDim = dim3(unsigned(blocks));
  emulated::run(gridDim.x, dim3(unsigned(threads)), [&] { kernel(parameters); }, size_t(shared_bytes));
  return cudaSuccess;
}

}  // namespace hopper
}  // namespace scoat
