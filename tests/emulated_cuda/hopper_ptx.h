// The machine of csrc/hopper_ptx.h on a CPU: shared memory is a buffer, a barrier counts, a copy is done at once, and
// each thread of a warpgroup computes its own part of a matrix product from the bytes that the descriptors point at.
#pragma once

#include <cuda_runtime.h>

#include <cmath>
#include <cstring>
#include <map>

#include "numbers.h"

#define __grid_constant__
#define SCOAT_DYNAMIC_SHARED(name) uint8_t* const name = emulated::shared

struct float2 {
  float x, y;
};
struct float4 {
  float x, y, z, w;
};
struct uint4 {
  uint32_t x, y, z, w;
};
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

namespace emulated {

constexpr int SHARED_BYTES = 227 << 10;
alignas(1024) inline uint8_t shared[SHARED_BYTES];

// Where a 16-byte piece of a swizzled row of `span` bytes lies: by its address, whatever the matrix begins at.
inline uint32_t swizzled(uint32_t address, int span) {
  return address ^ ((address >> 7 & uint32_t(span / 16 - 1)) << 4);
}

}  // namespace emulated

// A tensor [n, h, w, c] of 16-bit numbers, and the boxes that are read from it.
struct CUtensorMap {
  const uint8_t* data;
  int64_t steps[4], sizes[4];  // c, w, h, n; in bytes
  int box[3], span;
};

namespace scoat {
namespace hopper {

struct Barrier {
  int count, pending, bytes, phase;
};
static_assert(sizeof(Barrier) == 16, "of which the kernel has twice the room that it needs");

inline uint32_t shared_address(const void* pointer) {
  const auto offset = static_cast<const uint8_t*>(pointer) - emulated::shared;
  if (offset < 0 || offset >= emulated::SHARED_BYTES) emulated::fail("an address outside of shared memory");
  return uint32_t(offset);
}

inline void step(Barrier* barrier) {
  if (barrier->pending < 0) emulated::fail("more arrivals at a barrier than it waits for");
  if (barrier->pending == 0 && barrier->bytes == 0) {
    barrier->pending = barrier->count;
    barrier->phase ^= 1;
    emulated::progress();
  }
}

inline void init(Barrier* barrier, int count) { *barrier = {count, count, 0, 0}; }
inline void fence_init() {}

inline void arrive(Barrier* barrier) {
  --barrier->pending;
  step(barrier);
}

inline void arrive_expect(Barrier* barrier, int bytes) {
  barrier->bytes += bytes;
  arrive(barrier);
}

inline void wait(Barrier* barrier, int parity) {
  while (barrier->phase == parity) emulated::give_way();
}

inline void copy_bytes(void* to, const void* from, int bytes, Barrier* barrier) {
  if (bytes % 16 || shared_address(to) % 16 || reinterpret_cast<uintptr_t>(from) % 16)
    emulated::fail("a copy that is not of whole 16 bytes");
  std::memcpy(to, from, size_t(bytes));
  barrier->bytes -= bytes;
  step(barrier);
}

inline void copy_box(void* to, const CUtensorMap* map, Barrier* barrier, int c, int x, int y, int n) {
  const uint32_t start = shared_address(to);
  if (start % 128 || start % uint32_t(8 * map->span)) emulated::fail("a box that does not begin a swizzle pattern");
  uint32_t offset = start;
  for (int j = 0; j < map->box[2]; ++j)
    for (int i = 0; i < map->box[1]; ++i)
      for (int k = 0; k < map->box[0]; ++k, offset += 2) {
        const int64_t at[] = {c + k, x + i, y + j, n};
        const uint8_t* from = map->data;
        bool inside = true;
        for (int axis = 0; axis < 4; ++axis) {
          inside = inside && at[axis] >= 0 && at[axis] < map->sizes[axis];
          from += at[axis] * map->steps[axis];
        }
        uint8_t* const value = emulated::shared + emulated::swizzled(offset, map->span);
        if (inside)
          std::memcpy(value, from, 2);
        else
          std::memset(value, 0, 2);
      }
  barrier->bytes -= int(offset - start);
  step(barrier);
}

inline void fence_async() {}
inline void synchronise(int name, int threads) { emulated::meet(-1 - name, unsigned(threads)); }
inline void announce(int name, int threads) { emulated::meet(-1 - name, unsigned(threads), false); }
template <int>
void take_registers() {}
template <int>
void give_registers() {}
inline void products_begin() {}
inline void products_commit() {}
template <int>
void products_wait() {}

template <typename T>
uint32_t pair(float first, float second) {
  return from_float<T>(first).bits | uint32_t(from_float<T>(second).bits) << 16;
}

inline float maximum(float a, float b) { return std::isnan(a) ? a : std::isnan(b) ? b : std::max(a, b); }

// A row of 16 numbers of the matrix of a descriptor.
template <typename T>
void read(uint64_t descriptor, int row, float (&to)[16]) {
  const auto field = [&](int bit) { return uint32_t(descriptor >> bit & 0x3fff) << 4; };
  const uint32_t start = field(0), channels_step = field(16), group_step = field(32);
  const int mode = int(descriptor >> 62), span = mode == 0 ? 16 : mode == 3 ? 32 : mode == 2 ? 64 : 128;
  if (descriptor >> 49 & 7) emulated::fail("a matrix with a base offset");
  for (int k = 0; k < 16; ++k) {
    const uint32_t within = span == 16 ? uint32_t(k / 8) * channels_step + uint32_t(k % 8) * 2 : uint32_t(k) * 2;
    uint32_t address = start + uint32_t(row / 8) * group_step + uint32_t(row % 8 * span) + within;
    if (address >= emulated::SHARED_BYTES) emulated::fail("a matrix outside of shared memory");
    if (span > 16) address = emulated::swizzled(address, span);
    T value;
    std::memcpy(&value, emulated::shared + address, sizeof value);
    to[k] = to_float(value);
  }
}

template <typename T, int N>
void multiply(float* d, uint64_t a, uint64_t b) {
  const int lane = int(threadIdx.x % 32), first = 16 * int(threadIdx.x / 32 % 4) + lane / 4;
  float rows[2][16], column[16];
  read<T>(a, first, rows[0]);
  read<T>(a, first + 8, rows[1]);
  for (int j = 0; j < N / 8; ++j)
    for (int i = 0; i < 2; ++i) {
      read<T>(b, 8 * j + lane % 4 * 2 + i, column);
      for (int half = 0; half < 2; ++half) {
        float total = 0.0f;
        for (int k = 0; k < 16; ++k) total += rows[half][k] * column[k];
        d[4 * j + 2 * half + i] += total;
      }
    }
}

template <typename T>
int encode(CUtensorMap* map, const void* data, const int64_t (&steps)[3], int64_t n, int64_t h, int64_t w,
           int64_t channels, const int (&box)[3], int span) {
  *map = {static_cast<const uint8_t*>(data),
          {2, 2 * steps[2], 2 * steps[1], 2 * steps[0]},
          {channels, w, h, n},
          {box[0], box[1], box[2]},
          span};
  bool allowed = reinterpret_cast<uintptr_t>(data) % 16 == 0 && (span == 16 || box[0] * 2 <= span);
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
  emulated::run(gridDim.x, dim3(unsigned(threads)), [&] { kernel(parameters); });
  return cudaSuccess;
}

}  // namespace hopper
}  // namespace scoat
