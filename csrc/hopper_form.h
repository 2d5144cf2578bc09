// The shape of hopper.cu's kernels: what lies where in shared memory, and which tile is whose.
#pragma once

#include <hopper_ptx.h>  // the tests have one of their own

#include <algorithm>
#include <type_traits>
#include <utility>

#include "hopper.h"

namespace scoat {
namespace hopper {

constexpr int WARPS = 4 * GROUPS;                    // that multiply
constexpr int THREADS = 32 * WARPS + 128;            // and a warpgroup: a thread that fetches, and warps that upsample
constexpr int REGISTERS = 208, LEFT_REGISTERS = 88;  // of their threads
constexpr int UPSAMPLERS = 3;                        // of those warps
constexpr int PITCH = 72;                // pixels of a row in shared memory, so that each begins a swizzle pattern
constexpr int SHARED_BYTES = 227 << 10;  // a block may have
constexpr int BOX_BYTES = 32 << 10;      // of one copy
enum Name { BLOCK, GATES, LATER, SUMS };  // of barriers of threads; SUMS is of the first group, the next of the second
constexpr unsigned ALL = 0xffffffffu;

// A block has as many registers as all of its threads get at first, 8 at a time: who takes more than others gave waits
// for ever.
static_assert(GROUPS * REGISTERS + LEFT_REGISTERS <= (GROUPS + 1) * (65536 / THREADS / 8 * 8));

// A kernel for CHANNELS outputs, or blocks of as many, from sources of T. A stage holds DEPTH channels of a tile and
// its border, and their weights, 16 bytes of channels beside each other:
//
// pixels    [planes][HEIGHT][PITCH][SPAN bytes]; with PLANES a plane has 16 bytes, else there is one, swizzled
// weights   [3 horizontal taps][STEPS][2][slots][CHANNELS][16 bytes], a slot being a vertical tap, the last first
// shortcut  [STEPS][2][CHANNELS][16 bytes]
//
// A matrix product multiplies 32 bytes of channels: those of 64 pixels of a row, with those of JOINED slots, for as
// many rows of output: row i of the tile's rows and border meets slot JOINED + 1 - i and those after it. Slots of zeros
// stand for vertical taps that there are not.
template <typename T_, int CHANNELS_, bool SHORTCUT_, bool PLANES, bool WIDE, bool TAPPED_ = false>
struct Form {
  using T = T_;
  using Wide = typename Wider<T>::Type;
  using Out = std::conditional_t<WIDE && !SHORTCUT_, Wide, T>;
  using ShortcutOut = std::conditional_t<WIDE, Wide, T>;
  static constexpr int CHANNELS = CHANNELS_, SIZE = sizeof(T);
  static constexpr bool SHORTCUT = SHORTCUT_, TAPPED = TAPPED_, BLOCKED = CHANNELS >= 64 && !TAPPED;
  static constexpr Cut CUT = cut_of(CHANNELS, SHORTCUT);
  static constexpr int ROWS = CUT.rows(), JOINED = CUT.joined(), DEPTH = CUT.depth;
  static constexpr int HEIGHT = CUT.height + 2, STEPS = DEPTH * SIZE / 32, SPAN = PLANES ? 16 : DEPTH * SIZE;
  static constexpr int PLANE_BYTES = HEIGHT * PITCH * SPAN, PIXEL_BYTES = HEIGHT * PITCH * DEPTH * SIZE;
  static constexpr int SLOTS_BYTES = CUT.slots * CHANNELS * 16;
  static constexpr int WEIGHT_BYTES = 3 * STEPS * 2 * SLOTS_BYTES;
  static constexpr int SHORTCUT_BYTES = SHORTCUT ? STEPS * 2 * CHANNELS * 16 : 0;
  static constexpr int BYTES = PIXEL_BYTES + WEIGHT_BYTES + SHORTCUT_BYTES, STRIDE = (BYTES + 1023) / 1024 * 1024;
  // what gets upsampled, [LOW_HEIGHT][LOW_WIDTH][DEPTH]: every other pixel, from the one before the border's on
  static constexpr int LOW_HEIGHT = HEIGHT / 2 + 1, LOW_WIDTH = WIDTH / 2 + 2, LOWS = SHORTCUT ? 2 : 0;
  static constexpr int LOW_BYTES = LOW_HEIGHT * LOW_WIDTH * DEPTH * SIZE, LOW_STRIDE = (LOW_BYTES + 127) / 128 * 128;
  static constexpr int SUM_BYTES = WARPS * CHANNELS * 4, BARRIER_BYTES = 256;
  static constexpr int GATE_BYTES = LOWS ? HEIGHT * (WIDTH + 2) * 4 : 0;  // [HEIGHT][WIDTH + 2], 1 + attention
  static constexpr int REST = LOWS * LOW_STRIDE + SUM_BYTES + GATE_BYTES + BARRIER_BYTES;
  static constexpr int STAGES = std::min(4, (SHARED_BYTES - REST) / STRIDE);
  static constexpr int BOXES = (PLANE_BYTES + BOX_BYTES - 1) / BOX_BYTES;  // of a plane
  static constexpr int SHARED = STAGES * STRIDE + REST;
  static constexpr int VALUES = CHANNELS / 2;  // of a row of output, in a thread

  static_assert(CHANNELS == CUT.outputs);
  static_assert(STAGES >= 2 && 2 * (STAGES + LOWS) * 16 <= BARRIER_BYTES);
  static_assert(HEIGHT % BOXES == 0 && PIXEL_BYTES % 128 == 0 && ROWS % JOINED == 0);
};

struct Parameters {
  CUtensorMap maps[SOURCES + 1];  // the last one of what gets upsampled
  int chunks[SOURCES + 1];        // of DEPTH channels, the last one perhaps of fewer
  int h, w, across, down, blocks;
  int64_t tiles;  // of all blocks
  Weights weights, shortcut;
  Features out, pooled, shortcut_out, residual, taps;
  const void* tap_weights;
  const void* attention;
  float* sums;
  int64_t sum_channels;
  bool relu, residual_before, residual_after, shortcut_relu;
};

// Where a tile lies, and the block of its output channels: those of the same pixels follow each other.
template <typename F>
struct Tile {
  int64_t n;
  int y, x, number, block = 0;

  __device__ __forceinline__ Tile(const Parameters& p, int64_t tile) {
    if constexpr (F::BLOCKED) block = int(tile % p.blocks), tile /= p.blocks;
    const int64_t all = int64_t(p.across) * p.down;
    n = tile / all;
    number = int(tile % all);
    y = number / p.across * F::CUT.height;
    x = number % p.across * WIDTH;
  }
  // The first output channel.
  __device__ __forceinline__ int first() const { return block * F::CHANNELS; }
};

// Where a byte lies in rows swizzled over SPAN bytes, by its address from the start of a swizzle pattern on.
template <int SPAN>
__device__ __forceinline__ uint32_t swizzled(uint32_t address) {
  return address ^ ((address >> 7 & uint32_t(SPAN / 16 - 1)) << 4);
}

template <int VALUE>
struct Constant {
  SCOAT_BOTH constexpr operator int() const { return VALUE; }
};

template <int... I, typename Apply>
__device__ __forceinline__ void unrolled(std::integer_sequence<int, I...>, const Apply& apply) {
  (apply(Constant<I>()), ...);
}

template <int COUNT, typename Apply>
__device__ __forceinline__ void unrolled(const Apply& apply) {
  unrolled(std::make_integer_sequence<int, COUNT>(), apply);
}

template <typename S>
__device__ __forceinline__ uint8_t* place(const Features& x, int64_t n, int64_t y, int64_t column, int channel) {
  return static_cast<uint8_t*>(x.data) + sizeof(S) * (n * x.n + y * x.h + column * x.w + channel);
}
template <typename S, typename F>
__device__ __forceinline__ uint8_t* place(const Features& x, const Tile<F>& tile, int64_t y, int64_t column,
                                          int channel) {
  return place<S>(x, tile.n, y, column, tile.first() + channel);
}

// The parts of shared memory, and their barriers: a stage or low tile is full, or everybody is done with it.
template <typename F>
struct Shared {
  uint8_t *stages, *lows;
  float *sums, *gates;
  Barrier *full, *empty, *low_full, *low_empty;

  explicit __device__ __forceinline__ Shared(uint8_t* memory) {
    stages = memory;
    lows = memory + F::STAGES * F::STRIDE;
    sums = reinterpret_cast<float*>(lows + F::LOWS * F::LOW_STRIDE);
    gates = sums + F::SUM_BYTES / 4;
    full = reinterpret_cast<Barrier*>(gates + F::GATE_BYTES / 4);
    empty = full + F::STAGES;
    low_full = empty + F::STAGES;
    low_empty = low_full + F::LOWS;
  }
};

// Which of COUNT buffers is next, and the parity of the phase in which it is.
template <int COUNT>
struct Ring {
  int index = 0, parity;

  explicit __device__ __forceinline__ Ring(int parity) : parity(parity) {}
  __device__ __forceinline__ void next() {
    if (++index == COUNT) index = 0, parity ^= 1;
  }
};

// 8 numbers.
template <typename T>
__device__ __forceinline__ void load(const uint8_t* from, float (&to)[8]) {
  constexpr int PAIRS = 2 / sizeof(T);  // of a word
  std::conditional_t<PAIRS == 1, uint4, uint2> vector;
  vector = *reinterpret_cast<const decltype(vector)*>(from);
  const auto* const words = reinterpret_cast<const uint32_t*>(&vector);
  unrolled<4>([&](auto i) {
    const float2 both = numbers_of<T>(words[i / PAIRS] >> i % PAIRS * 16);
    to[2 * i] = both.x, to[2 * i + 1] = both.y;
  });
}

template <typename T>
__device__ __forceinline__ void store(uint8_t* to, const float (&from)[8]) {
  constexpr int PAIRS = 2 / sizeof(T);
  std::conditional_t<PAIRS == 1, uint4, uint2> vector{};
  auto* const words = reinterpret_cast<uint32_t*>(&vector);
  unrolled<4>([&](auto i) { words[i / PAIRS] |= pair<T>(from[2 * i], from[2 * i + 1]) << i % PAIRS * 16; });
  *reinterpret_cast<decltype(vector)*>(to) = vector;
}

}  // namespace hopper
}  // namespace scoat
