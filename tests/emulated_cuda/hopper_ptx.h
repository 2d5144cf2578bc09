// The machine of csrc/hopper_ptx.h on a CPU: shared memory is a buffer, a barrier counts, a copy is done at once, and
// each thread of a warpgroup computes its own part of a matrix product from the bytes that the descriptors point at.
#pragma once

#include <cuda_runtime.h>

#include <array>
#include <cmath>
#include <cstring>
#include <map>

#include "hopper.h"

#define __grid_constant__
#define SCOAT_DYNAMIC_SHARED(name) uint8_t* const name = emulated::shared

struct float2 {
  float x, y;
};
struct float4 {
  float x, y, z, w;
};
struct uint2 {
  uint32_t x, y;
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
      for (int k = 0; k < map->box[0]; ++k, offset += uint32_t(map->size)) {
        const int64_t at[] = {c + k, x + i, y + j, n};
        const uint8_t* from = map->data;
        bool inside = true;
        for (int axis = 0; axis < 4; ++axis) {
          inside = inside && at[axis] >= 0 && at[axis] < map->sizes[axis];
          from += at[axis] * map->steps[axis];
        }
        uint8_t* const value = emulated::shared + emulated::swizzled(offset, map->span);
        if (inside)
          std::memcpy(value, from, size_t(map->size));
        else
          std::memset(value, 0, size_t(map->size));
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

// To the nearest, ties to even, and 448 for what is larger.
inline uint8_t e4m3_of(float value) {
  const uint8_t sign = std::signbit(value) ? 0x80 : 0;
  if (std::isnan(value)) return sign | 0x7f;
  const float size = std::min(std::fabs(value), 448.0f);
  const int exponent = size < 0x1p-6f ? -6 : std::ilogb(size);
  const int eighths = int(std::nearbyint(std::ldexp(size, 3 - exponent)));  // of 2^exponent; fewer than 8 if subnormal
  return sign | uint8_t((exponent + 6) * 8 + eighths);
}

inline float to_float(E4M3 value) {
  static const auto all = [] {
    std::array<float, 256> found{};
    for (int bits = 0; bits < 256; ++bits) {
      const int exponent = bits >> 3 & 15, eighths = bits & 7;
      const float size = std::ldexp(float(exponent ? 8 + eighths : eighths), (exponent ? exponent : 1) - 10);
      found[size_t(bits)] = std::copysign((bits & 0x7f) == 0x7f ? NAN : size, bits & 0x80 ? -1.0f : 1.0f);
    }
    return found;
  }();
  return all[value.bits];
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

// A row of 32 bytes of the matrix of a descriptor.
template <typename T>
void read(uint64_t descriptor, int row, float (&to)[32 / sizeof(T)]) {
  const auto field = [&](int bit) { return uint32_t(descriptor >> bit & 0x3fff) << 4; };
  const uint32_t start = field(0), channels_step = field(16), group_step = field(32);
  const int mode = int(descriptor >> 62), span = mode == 0 ? 16 : mode == 3 ? 32 : mode == 2 ? 64 : 128;
  if (descriptor >> 49 & 7) emulated::fail("a matrix with a base offset");
  for (uint32_t k = 0; k < 32 / sizeof(T); ++k) {
    const uint32_t byte = k * sizeof(T), within = span == 16 ? byte / 16 * channels_step + byte % 16 : byte;
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
  constexpr int K = 32 / sizeof(T);
  float rows[2][K], column[K];
  read<T>(a, first, rows[0]);
  read<T>(a, first + 8, rows[1]);
  for (int j = 0; j < N / 8; ++j)
    for (int i = 0; i < 2; ++i) {
      read<T>(b, 8 * j + lane % 4 * 2 + i, column);
      for (int half = 0; half < 2; ++half) {
        float total = 0.0f;
        for (int k = 0; k < K; ++k) total += rows[half][k] * column[k];
        d[4 * j + 2 * half + i] += total;
      }
    }
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
  emulated::run(gridDim.x, dim3(unsigned(threads)), [&] { kernel(parameters); });
  return cudaSuccess;
}

}  // namespace hopper
}  // namespace scoat
