// 3x3 convolutions on Hopper's tensor cores. A tile of pixels with its border lies in shared memory once for all nine
// taps, as each tap is the same matrix from another address on: see docs/hopper.md.
// SCOAT_TYPE is Half, BFloat or E4M3.
#include <hopper_ptx.h>  // the tests have one of their own

#include <algorithm>
#include <string>
#include <type_traits>
#include <utility>

#include "hopper.h"
#include "resample.h"

namespace scoat {
namespace hopper {
namespace {

constexpr int WARPS = 4 * GROUPS;                    // that multiply
constexpr int THREADS = 32 * WARPS + 128;            // and a warpgroup: a thread that fetches, and warps that upsample
constexpr int REGISTERS = 208, LEFT_REGISTERS = 88;  // of their threads
constexpr int UPSAMPLERS = 3;                        // of those warps
constexpr int PITCH = 72;                // pixels of a row in shared memory, so that each begins a swizzle pattern
constexpr int SHARED_BYTES = 227 << 10;  // a block may have
constexpr int BOX_BYTES = 32 << 10;      // of one copy
constexpr int SCALING_THREADS = 256, SUMMED_ROWS = 8;
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

// The descriptor of a matrix whose rows of 16 bytes, or of a span, follow each other in groups of 8, without a swizzle
// or with one over the span: where it begins, and the steps from 16 bytes of channels to the next (with a swizzle not
// used, and 16 by convention) and from group to group.
template <int SPAN>
__device__ __forceinline__ uint64_t matrix(uint32_t address, int channels_step, int group_step) {
  constexpr uint64_t SWIZZLE = SPAN == 16 ? 0 : SPAN == 32 ? 3 : 2;
  return uint64_t(address >> 4) | uint64_t(channels_step >> 4) << 16 | uint64_t(group_step >> 4) << 32 | SWIZZLE << 62;
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

// All products of a stage.
template <typename F>
__device__ __forceinline__ void multiply_stage(uint32_t stage, int group, float* values, float* shortcut) {
  const uint32_t first = stage + group * F::ROWS * PITCH * F::SPAN;
  const uint64_t pixels = matrix<F::SPAN>(first, F::SPAN == 16 ? F::PLANE_BYTES : 16, 8 * F::SPAN);
  const uint64_t weights = matrix<16>(stage + F::PIXEL_BYTES, F::SLOTS_BYTES, 128);
  const uint64_t last = matrix<16>(stage + F::PIXEL_BYTES + F::WEIGHT_BYTES, F::CHANNELS * 16, 128);
  constexpr int STEP = F::SPAN == 16 ? 2 * F::PLANE_BYTES : 32;  // to what the next product multiplies
  unrolled<3 * F::STEPS>([&](auto which) {
    constexpr int TAP = which / F::STEPS, K = which % F::STEPS;
    const uint64_t left = pixels + (TAP * F::SPAN + K * STEP) / 16;
    const uint64_t right = weights + which * 2 * F::SLOTS_BYTES / 16;
    unrolled<F::ROWS / F::JOINED>([&](auto joined) {
      unrolled<F::JOINED + 2>([&](auto i) {
        multiply<typename F::T, F::JOINED * F::CHANNELS>(values + joined * F::JOINED * F::VALUES,
                                                         left + (joined * F::JOINED + i) * PITCH * F::SPAN / 16,
                                                         right + (F::JOINED + 1 - i) * F::CHANNELS);
      });
    });
    if constexpr (F::SHORTCUT && TAP == 1) {
      unrolled<F::ROWS>([&](auto row) {
        multiply<typename F::T, F::CHANNELS>(shortcut + row * F::VALUES, left + (row + 1) * PITCH * F::SPAN / 16,
                                             last + K * 2 * F::CHANNELS);
      });
    }
  });
}

// Turns what lane q of four holds as word m into what lane m holds as word q.
__device__ __forceinline__ void transpose(uint32_t (&words)[4], int q) {
#pragma unroll
  for (int bit = 1; bit <= 2; bit *= 2)
#pragma unroll
    for (int m = 0; m < 4; ++m)
      if (!(m & bit)) {
        const uint32_t got = __shfl_xor_sync(ALL, q & bit ? words[m] : words[m | bit], bit);
        (q & bit ? words[m] : words[m | bit]) = got;
      }
}

// Where values of a row of output lie: a thread has two neighbouring channels of each block of 8, in two pixels of 16.
struct Lane {
  int warp, q, pixel;

  __device__ __forceinline__ Lane() {
    const int lane = threadIdx.x % 32;
    warp = threadIdx.x / 32 % 4;
    q = lane % 4;
    pixel = 16 * warp + lane / 4;
  }
};

// Words of such values as S: a pair of a block, or two of neighbouring blocks. A thread exchanges four, which are a
// quad, for 16 bytes of a pixel.
template <typename S, typename F>
struct Words {
  static constexpr int PAIRS = 2 / sizeof(S), BLOCKS = F::CHANNELS / 8 / PAIRS, QUADS = 2 * BLOCKS / 4;

  // The first value of a pair of a word, and the pixel and the first of the channels of the 16 bytes.
  static __device__ __forceinline__ constexpr int value(int word, int pair) {
    return (word % BLOCKS * PAIRS + pair) * 4 + word / BLOCKS * 2;
  }
  static __device__ __forceinline__ int pixel_of(const Lane& lane, int word) { return lane.pixel + word / BLOCKS * 8; }
  static __device__ __forceinline__ int channel_of(int word) { return word % BLOCKS * PAIRS * 8; }

  // Makes 16 bytes of four threads' words, and words of them.
  static __device__ __forceinline__ uint4 join(uint32_t (&words)[4], int q) {
    transpose(words, q);
    if constexpr (PAIRS == 1) return make_uint4(words[0], words[1], words[2], words[3]);
    return make_uint4(low(words[0], words[1]), low(words[2], words[3]), high(words[0], words[1]),
                      high(words[2], words[3]));
  }
  static __device__ __forceinline__ void part(const uint4& bytes, uint32_t (&words)[4], int q) {
    const uint32_t &a = bytes.x, &b = bytes.y, &c = bytes.z, &d = bytes.w;
    words[0] = PAIRS == 1 ? a : low(a, c), words[1] = PAIRS == 1 ? b : high(a, c);
    words[2] = PAIRS == 1 ? c : low(b, d), words[3] = PAIRS == 1 ? d : high(b, d);
    transpose(words, q);
  }

 private:
  static __device__ __forceinline__ uint32_t low(uint32_t a, uint32_t b) { return (a & 0xffffu) | b << 16; }
  static __device__ __forceinline__ uint32_t high(uint32_t a, uint32_t b) { return a >> 16 | (b & 0xffff0000u); }
};

template <typename S>
__device__ __forceinline__ uint8_t* place(const Features& x, int64_t n, int64_t y, int64_t column, int channel) {
  return static_cast<uint8_t*>(x.data) + sizeof(S) * (n * x.n + y * x.h + column * x.w + channel);
}
template <typename S, typename F>
__device__ __forceinline__ uint8_t* place(const Features& x, const Tile<F>& tile, int64_t y, int64_t column,
                                          int channel) {
  return place<S>(x, tile.n, y, column, tile.first() + channel);
}

// Sums begin with the bias.
template <typename F>
__device__ __forceinline__ void begin(float* values, const float* bias) {
  const Lane lane;
  unrolled<F::CHANNELS / 8>([&](auto block) {
    const float2 of_two = *reinterpret_cast<const float2*>(bias + 8 * block + 2 * lane.q);
    unrolled<2 * F::ROWS>([&](auto half) {  // of a row
      float* const value = values + half / 2 * F::VALUES + block * 4 + half % 2 * 2;
      value[0] = of_two.x, value[1] = of_two.y;
    });
  });
}

// The residual of the 16 bytes of a row of output that a thread will store; zeros outside.
template <typename S, typename F>
__device__ __forceinline__ uint4 held_at(const Features& residual, int quad, const Tile<F>& tile, int y, int h, int w) {
  using W = Words<S, F>;
  const Lane lane;
  const int mine = 4 * quad + lane.q, column = tile.x + W::pixel_of(lane, mine);
  if (y >= h || column >= w) return make_uint4(0, 0, 0, 0);
  return *reinterpret_cast<const uint4*>(place<S>(residual, tile, y, column, W::channel_of(mine)));
}

// Ends a quad of the values of one row of output: adds the residual, stores them where that is wanted, and leaves them
// as floats.
template <typename S, typename F, bool STORED>
__device__ __forceinline__ void finish(float* values, int quad, const uint4& residual, bool before, bool after,
                                       const Features& out, bool relu, const Tile<F>& tile, int y, int h, int w) {
  using W = Words<S, F>;
  const Lane lane;
  const int mine = 4 * quad + lane.q, column = tile.x + W::pixel_of(lane, mine);
  const float least = relu ? 0.0f : -INFINITY;
  uint32_t held[4] = {}, words[4] = {};
  if (before || after) W::part(residual, held, lane.q);
  unrolled<4>([&](auto m) {
    unrolled<W::PAIRS>([&](auto j) {
      float* const value = values + W::value(4 * quad + m, j);
      const float2 both = numbers_of<S>(held[m] >> 16 * j);
      unrolled<2>([&](auto i) {
        if (before) value[i] += i == 0 ? both.x : both.y;
        value[i] = maximum(value[i], least);
        if (after) value[i] += i == 0 ? both.x : both.y;
      });
      words[m] |= pair<S>(value[0], value[1]) << 16 * j;
    });
  });
  if constexpr (STORED) {
    const uint4 bytes = W::join(words, lane.q);
    if (y < h && column < w) *reinterpret_cast<uint4*>(place<S>(out, tile, y, column, W::channel_of(mine))) = bytes;
  }
}

// Stores the products of a row of output with the taps of a head: as its values lie, they are the left matrices.
template <typename F>
__device__ __forceinline__ void multiply_taps(const float* values, const Features& out, const void* weights,
                                              const Tile<F>& tile, int y, int h, int w) {
  using S = typename F::Wide;
  const Lane lane;
  const uint2* const mine = static_cast<const uint2*>(weights) + threadIdx.x % 32;
  float products[2][4] = {};
  unrolled<F::CHANNELS / 16>([&](auto step) {
    uint32_t left[4];
    unrolled<4>([&](auto i) { left[i] = pair<S>(values[8 * step + 2 * i], values[8 * step + 2 * i + 1]); });
    unrolled<2>([&](auto block) { multiply_warp<S>(products[block], left, mine[(2 * step + block) * 32]); });
  });
  uint8_t* const to = place<S>(out, tile, y, tile.x + lane.pixel, 2 * lane.q);
  unrolled<2>([&](auto half) {
    if (y >= h || tile.x + lane.pixel + 8 * half >= w) return;
    unrolled<2>([&](auto block) {
      if (8 * block + 2 * lane.q < TAPS)
        *reinterpret_cast<uint32_t*>(to + sizeof(S) * (half * 8 * out.w + 8 * block)) =
            pair<S>(products[block][2 * half], products[block][2 * half + 1]);
    });
  });
}

// Stores the maxima of 2x2 pixels of two rows of output.
template <typename F>
__device__ __forceinline__ void pool(const float* upper, const float* lower, const Features& out, const Tile<F>& tile,
                                     int y, int h, int w) {
  using T = typename F::T;
  using W = Words<T, F>;
  const Lane lane;
  unrolled<W::QUADS>([&](auto quad) {
    uint32_t words[4] = {};
    unrolled<4>([&](auto m) {
      unrolled<W::PAIRS>([&](auto j) {
        float most[2];
        unrolled<2>([&](auto i) {
          constexpr int VALUE = W::value(4 * quad + m, j) + i;
          const float left = maximum(upper[VALUE], lower[VALUE]);
          most[i] = maximum(left, __shfl_xor_sync(ALL, left, 4));  // the next pixel's
        });
        words[m] |= pair<T>(most[0], most[1]) << 16 * j;
      });
    });
    const uint4 bytes = W::join(words, lane.q);
    const int mine = 4 * quad + lane.q, column = tile.x + W::pixel_of(lane, mine);
    if (column % 2 == 0 && column < w && y < h)
      *reinterpret_cast<uint4*>(place<T>(out, tile, y / 2, column / 2, W::channel_of(mine))) = bytes;
  });
}

// Stores the sums of a warpgroup's rows of output, always added in the same order.
template <typename F>
__device__ __forceinline__ void sum(const float* values, float* shared, float* out, int group, int y, int x, int h,
                                    int w) {
  const Lane lane;
  unrolled<F::CHANNELS / 8>([&](auto block) {
    float total[2] = {};
    unrolled<F::ROWS>([&](auto row) {
      unrolled<2>([&](auto half) {
        const bool inside = y + row < h && x + lane.pixel + 8 * half < w;
        const float* const value = values + row * F::VALUES + block * 4 + half * 2;
        total[0] += inside ? value[0] : 0.0f;
        total[1] += inside ? value[1] : 0.0f;
      });
    });
    unrolled<2>([&](auto i) {
#pragma unroll
      for (int step = 4; step < 32; step *= 2) total[i] += __shfl_xor_sync(ALL, total[i], step);
      if (threadIdx.x % 32 < 4) shared[lane.warp * F::CHANNELS + block * 8 + 2 * lane.q + i] = total[i];
    });
  });
  const int thread = threadIdx.x % 128;
  __syncwarp();
  synchronise(SUMS + group, 128);
  if (thread < F::CHANNELS) {
    float total = 0.0f;
    for (int i = 0; i < 4; ++i) total += shared[i * F::CHANNELS + thread];
    out[thread] = total;
  }
  __syncwarp();
  synchronise(SUMS + group, 128);  // before somebody writes there again
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

// What the fetching thread does: keeps all stages full, those of the next tile too.
template <typename F>
__device__ __forceinline__ void fetch(const Parameters& p, const Shared<F>& shared) {
  Ring<F::STAGES> stage(1);
  Ring<F::SHORTCUT ? F::LOWS : 1> low(1);
  int64_t filled = 0;
  // whether each stage has the same weights in every tile
  const int chunks = p.chunks[0] + p.chunks[1] + p.chunks[SOURCES];
  const bool stays = !F::SHORTCUT && p.weights.step == 0 && p.blocks == 1 && F::STAGES % chunks == 0;
  for (int64_t number = blockIdx.x; number < p.tiles; number += gridDim.x) {
    const Tile<F> tile(p, number);
    const int64_t before = int64_t(tile.block) * chunks;
    const auto* weights = static_cast<const uint8_t*>(p.weights.weights) + tile.n * p.weights.step;
    const auto* shortcut = static_cast<const uint8_t*>(p.shortcut.weights) + tile.n * p.shortcut.step;
    weights += before * F::WEIGHT_BYTES, shortcut += before * F::SHORTCUT_BYTES;
    for (int source = 0; source <= SOURCES; ++source) {
      for (int chunk = 0; chunk < p.chunks[source]; ++chunk, stage.next()) {
        const bool whole = !F::SHORTCUT || source < SOURCES;
        if constexpr (F::SHORTCUT)
          if (!whole) {
            Barrier* const barrier = shared.low_full + low.index;
            wait(shared.low_empty + low.index, low.parity);
            arrive_expect(barrier, F::LOW_BYTES);
            copy_box(shared.lows + low.index * F::LOW_STRIDE, p.maps + source, barrier, chunk * F::DEPTH,
                     tile.x / 2 - 1, tile.y / 2 - 1, int(tile.n));
            low.next();
          }
        uint8_t* const to = shared.stages + stage.index * F::STRIDE;
        Barrier* const barrier = shared.full + stage.index;
        wait(shared.empty + stage.index, stage.parity);
        const bool kept = stays && filled >= F::STAGES;  // the weights of a stage
        ++filled;
        arrive_expect(barrier, F::BYTES - (whole ? 0 : F::PIXEL_BYTES) - (kept ? F::WEIGHT_BYTES : 0));
        constexpr int PLANES = F::PIXEL_BYTES / F::PLANE_BYTES, HEIGHT = F::HEIGHT / F::BOXES;
        for (int plane = 0; plane < PLANES && whole; ++plane)
          for (int box = 0; box < F::BOXES; ++box)
            copy_box(to + plane * F::PLANE_BYTES + box * HEIGHT * PITCH * F::SPAN, p.maps + source, barrier,
                     chunk * F::DEPTH + plane * F::SPAN / F::SIZE, tile.x - 1, tile.y - 1 + box * HEIGHT, int(tile.n));
        if (!kept) copy_bytes(to + F::PIXEL_BYTES, weights, F::WEIGHT_BYTES, barrier);
        weights += F::WEIGHT_BYTES;
        if constexpr (F::SHORTCUT) {
          copy_bytes(to + F::PIXEL_BYTES + F::WEIGHT_BYTES, shortcut, F::SHORTCUT_BYTES, barrier);
          shortcut += F::SHORTCUT_BYTES;
        }
      }
    }
  }
}

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

// 8 numbers to interpolate between: in float, but those of E4M3 in pairs of halves, which are precise enough for them
// and take half as many instructions.
template <typename T>
struct Eight {
  float values[8];

  __device__ __forceinline__ void load_from(const uint8_t* from) { load<T>(from, values); }
  __device__ __forceinline__ void store_to(uint8_t* to) const { store<T>(to, values); }
  __device__ __forceinline__ void between(float a, const Eight& first, float b, const Eight& second) {
    unrolled<8>([&](auto i) { values[i] = a * first.values[i] + b * second.values[i]; });
  }
  __device__ __forceinline__ void clear() {
    unrolled<8>([&](auto i) { values[i] = 0.0f; });
  }
};

template <>
struct Eight<E4M3> {
  uint32_t pairs[4];

  __device__ __forceinline__ void load_from(const uint8_t* from) {
    const uint2 words = *reinterpret_cast<const uint2*>(from);
    pairs[0] = halves_of(words.x), pairs[1] = halves_of(words.x >> 16);
    pairs[2] = halves_of(words.y), pairs[3] = halves_of(words.y >> 16);
  }
  __device__ __forceinline__ void store_to(uint8_t* to) const {
    *reinterpret_cast<uint2*>(to) = {pair_of_halves(pairs[0]) | pair_of_halves(pairs[1]) << 16,
                                     pair_of_halves(pairs[2]) | pair_of_halves(pairs[3]) << 16};
  }
  __device__ __forceinline__ void between(float a, const Eight& first, float b, const Eight& second) {
    const uint32_t both_a = pair<Half>(a, a), both_b = pair<Half>(b, b);
    unrolled<4>(
        [&](auto i) { pairs[i] = add_product(multiply_halves(both_b, second.pairs[i]), both_a, first.pairs[i]); });
  }
  __device__ __forceinline__ void clear() {
    unrolled<4>([&](auto i) { pairs[i] = 0; });
  }
};

// Upsamples 8 channels of a column of a tile: walks down two rows at a time, with a row of the input, already widened,
// in registers. `from` is the column's first pixel in the low tile, `gates` in that of the gates, `column` and `y` its
// place in the image.
template <typename F>
__device__ __forceinline__ void upsample_column(const uint8_t* from, const float* gates, uint8_t* stage, uint32_t at,
                                                int column, int y, int h, int w, float inverse_h, float inverse_w) {
  using T = typename F::T;
  const int l = (column + 1) / 2 - 1;  // the input before; of the low tile the first pixel
  const float across[2] = {column % 2 ? odd_first(l, w / 2, inverse_w) : even_first(l, w / 2, inverse_w),
                           column % 2 ? odd_second(l, w / 2, inverse_w) : even_second(l, w / 2, inverse_w)};
  const auto row_at = [&](int row, Eight<T>& to) {
    Eight<T> first, second;
    constexpr int PIXEL = F::DEPTH * F::SIZE;
    first.load_from(from + row * F::LOW_WIDTH * PIXEL);
    second.load_from(from + row * F::LOW_WIDTH * PIXEL + PIXEL);
    to.between(across[0], first, across[1], second);
  };
  Eight<T> above, below;
  row_at(0, above);
#pragma unroll 1
  for (int pair_ = 0; pair_ < F::HEIGHT / 2; ++pair_) {
    row_at(pair_ + 1, below);
    const int k = (y + 2 * pair_ + 1) / 2 - 1;  // the input before the two rows of output
    const float weights[2][2] = {{odd_first(k, h / 2, inverse_h), odd_second(k, h / 2, inverse_h)},
                                 {even_first(k, h / 2, inverse_h), even_second(k, h / 2, inverse_h)}};
    unrolled<2>([&](auto which) {
      const int row = 2 * pair_ + which;
      const bool inside = y + row >= 0 && y + row < h && column >= 0 && column < w;
      const float gate = gates[row * (WIDTH + 2)], first = gate * weights[which][0], second = gate * weights[which][1];
      Eight<T> values;
      values.between(first, above, second, below);
      if (!inside) values.clear();
      values.store_to(stage + swizzled<F::SPAN>(at + row * PITCH * F::SPAN));
    });
    above = below;
  }
}

// What the warps that upsample do: fill the pixels of the stages for which somebody must.
template <typename F>
__device__ __forceinline__ void upsample(const Parameters& p, const Shared<F>& shared, int thread) {
  Ring<F::STAGES> stage(1);
  Ring<F::LOWS> low(0);
  constexpr int VECTORS = F::DEPTH / 8;
  const float inverse_h = inverse_of(p.h / 2), inverse_w = inverse_of(p.w / 2);
  for (int64_t number = blockIdx.x; number < p.tiles; number += gridDim.x) {
    const Tile<F> tile(p, number);
    if (p.attention || number == blockIdx.x) {
      __syncwarp();
      synchronise(GATES, 32 * UPSAMPLERS);  // all are done with those of the tile before
      for (int item = thread; item < F::HEIGHT * (WIDTH + 2); item += 32 * UPSAMPLERS) {
        const int y = tile.y - 1 + item / (WIDTH + 2), x = tile.x - 1 + item % (WIDTH + 2);
        const bool inside = p.attention && y >= 0 && y < p.h && x >= 0 && x < p.w;
        const auto* const map = static_cast<const typename F::Wide*>(p.attention) + tile.n * p.h * p.w;
        shared.gates[item] = inside ? 1.0f + to_float(map[int64_t(y) * p.w + x]) : 1.0f;
      }
      __syncwarp();
      synchronise(GATES, 32 * UPSAMPLERS);
    }
    for (int chunk = 0; chunk < p.chunks[0] + p.chunks[1] + p.chunks[SOURCES]; ++chunk, stage.next()) {
      wait(shared.empty + stage.index, stage.parity);
      if (chunk >= p.chunks[0] + p.chunks[1]) {
        wait(shared.low_full + low.index, low.parity);
        const uint8_t* const from = shared.lows + low.index * F::LOW_STRIDE;
        uint8_t* const to = shared.stages + stage.index * F::STRIDE;
        for (int item = thread; item < (WIDTH + 2) * VECTORS; item += 32 * UPSAMPLERS) {
          const int pixel = item / VECTORS, vector = item % VECTORS;
          constexpr int BYTES = 8 * F::SIZE;
          const uint32_t at = pixel * F::SPAN + vector * (F::SPAN == 16 ? F::PLANE_BYTES : BYTES);
          upsample_column<F>(from + (pixel / 2 * VECTORS + vector) * BYTES, shared.gates + pixel, to, at,
                             tile.x - 1 + pixel, tile.y - 1, p.h, p.w, inverse_h, inverse_w);
        }
        fence_async();
        __syncwarp();
        if (thread % 32 == 0) arrive(shared.low_empty + low.index);
        low.next();
      }
      if (thread % 32 == 0) arrive(shared.full + stage.index);
    }
  }
}

template <typename F>
__global__ void __launch_bounds__(THREADS, 1) convolve_tiles(const __grid_constant__ Parameters p) {
  SCOAT_DYNAMIC_SHARED(memory);
  const Shared<F> shared(memory);
  const bool upsamples = F::SHORTCUT && p.chunks[SOURCES] > 0;
  const int warp = __shfl_sync(ALL, int(threadIdx.x) / 32, 0), group = warp / 4;  // known to be the same for a warp
  if (threadIdx.x == 0) {
    for (int i = 0; i < F::STAGES; ++i) init(shared.full + i, upsamples ? 1 + UPSAMPLERS : 1);
    for (int i = 0; i < F::STAGES; ++i) init(shared.empty + i, WARPS);
    for (int i = 0; i < F::LOWS; ++i) init(shared.low_full + i, 1), init(shared.low_empty + i, UPSAMPLERS);
    fence_init();
  }
  __syncthreads();
  if (group == GROUPS) {
    give_registers<LEFT_REGISTERS>();
    if (threadIdx.x == 32 * WARPS) fetch<F>(p, shared);
    if constexpr (F::SHORTCUT)
      if (upsamples && warp > WARPS) upsample<F>(p, shared, int(threadIdx.x) - 32 * (WARPS + 1));
    return;
  }
  take_registers<REGISTERS>();
  if (group == 1) synchronise(LATER, 32 * WARPS);  // so that one multiplies while the other stores
  Ring<F::STAGES> stage(0);
  using Out = typename F::Out;
  constexpr int QUADS = Words<Out, F>::QUADS;
  constexpr int AHEAD = F::TAPPED ? (QUADS < 4 ? 4 / QUADS : 1) : 8 / QUADS;  // rows of residual that are on their way
  const bool residual = p.residual_before || p.residual_after;
  for (int64_t number = blockIdx.x; number < p.tiles; number += gridDim.x) {
    const Tile<F> tile(p, number);
    const int y = tile.y + group * F::ROWS;
    float values[F::ROWS * F::VALUES], shortcut[F::SHORTCUT ? F::ROWS * F::VALUES : 1];
    begin<F>(values, p.weights.bias + tile.first());
    if constexpr (F::SHORTCUT) begin<F>(shortcut, p.shortcut.bias + tile.first());
    uint4 held[F::SHORTCUT ? 1 : AHEAD * QUADS] = {};
    if constexpr (!F::SHORTCUT)
      if (residual)
        unrolled<AHEAD * QUADS>(
            [&](auto i) { held[i] = held_at<Out, F>(p.residual, i % QUADS, tile, y + i / QUADS, p.h, p.w); });

    int before = -1;  // the stage whose products may still run
    for (int chunk = 0; chunk < p.chunks[0] + p.chunks[1] + p.chunks[SOURCES]; ++chunk, stage.next()) {
      wait(shared.full + stage.index, stage.parity);
      products_begin();
      multiply_stage<F>(shared_address(shared.stages + stage.index * F::STRIDE), group, values, shortcut);
      products_commit();
      if (group == 0 && chunk == 0 && number == blockIdx.x) announce(LATER, 32 * WARPS);
      products_wait<1>();
      if (before >= 0 && threadIdx.x % 32 == 0) arrive(shared.empty + before);
      before = stage.index;
    }
    products_wait<0>();
    if (threadIdx.x % 32 == 0) arrive(shared.empty + before);
    if constexpr (std::is_same_v<typename F::T, E4M3>) {
      for (float& value : values) value *= p.weights.unit;
      for (float& value : shortcut) value *= p.shortcut.unit;
    }

    unrolled<F::ROWS>([&](auto row) {
      unrolled<QUADS>([&](auto quad) {
        constexpr int SLOT = F::SHORTCUT ? 0 : row % AHEAD * QUADS + quad;
        const uint4 words = held[SLOT];
        if constexpr (!F::SHORTCUT && row + AHEAD < F::ROWS)
          if (residual) held[SLOT] = held_at<Out, F>(p.residual, quad, tile, y + row + AHEAD, p.h, p.w);
        finish<Out, F, !F::TAPPED>(values + row * F::VALUES, quad, words, p.residual_before, p.residual_after, p.out,
                                   p.relu, tile, y + row, p.h, p.w);
      });
      if constexpr (F::SHORTCUT)
        unrolled<Words<typename F::ShortcutOut, F>::QUADS>([&](auto quad) {
          finish<typename F::ShortcutOut, F, true>(shortcut + row * F::VALUES, quad, held[0], false, false,
                                                   p.shortcut_out, p.shortcut_relu, tile, y + row, p.h, p.w);
        });
      if constexpr (F::TAPPED)
        multiply_taps<F>(values + row * F::VALUES, p.taps, p.tap_weights, tile, y + row, p.h, p.w);
      else if constexpr (row % 2 == 1)
        if (p.pooled.data)
          pool<F>(values + (row - 1) * F::VALUES, values + row * F::VALUES, p.pooled, tile, y + row - 1, p.h, p.w);
    });
    if (!F::TAPPED && p.sums) {
      const int64_t part = (tile.n * p.across * p.down + tile.number) * GROUPS + group;
      sum<F>(values, shared.sums + group * 4 * F::CHANNELS, p.sums + part * p.sum_channels + tile.first(), group, y,
             tile.x, p.h, p.w);
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(SCALING_THREADS) scale_vectors(const __grid_constant__ Scaling s) {
  const int64_t index = int64_t(blockIdx.x) * SCALING_THREADS + threadIdx.x;
  if (index >= s.n * s.vectors) return;
  const int64_t n = index / s.vectors, vector = index % s.vectors, row = vector / s.inner;
  const int64_t piece = row / (s.taps * s.pieces) % s.chunks * s.pieces + row % s.pieces;
  constexpr int COUNT = 16 / sizeof(T);
  const auto* weights = reinterpret_cast<const float4*>(s.weights + vector * COUNT);
  const auto* scales = reinterpret_cast<const float4*>(s.scale + n * s.scale_step + piece * COUNT);
  auto* const out = static_cast<T*>(s.out) + n * s.out_step + vector * COUNT;
  unrolled<COUNT / 8>([&](auto i) {
    const float4 a = weights[2 * i], b = weights[2 * i + 1], c = scales[2 * i], d = scales[2 * i + 1];
    const float products[8] = {a.x * c.x, a.y * c.y, a.z * c.z, a.w * c.w, b.x * d.x, b.y * d.y, b.z * d.z, b.w * d.w};
    store<T>(reinterpret_cast<uint8_t*>(out + 8 * i), products);
  });
}

// What upsampling gives pixel (y, x) of h x w to, all together: one of the gates' own size for each of its targets.
template <typename S>
__device__ __forceinline__ float gates_of(const S* map, int y, int x, int h, int w) {
  const Targets rows = targets_of(y, h, inverse_of(h)), columns = targets_of(x, w, inverse_of(w));
  float total = 0.0f;
  unrolled<4>([&](auto i) {
    unrolled<4>([&](auto j) {
      const int row = 2 * y - 1 + i, column = 2 * x - 1 + j;
      if (row >= 0 && row < 2 * h && column >= 0 && column < 2 * w)
        total += rows.weight[i] * columns.weight[j] * (1.0f + to_float(map[int64_t(row) * 2 * w + column]));
    });
  });
  return total;
}

// A block sums SUMMED pixels: a thread first gathers the gates of one, then adds up 8 channels of some.
template <typename T>
__global__ void __launch_bounds__(SUMMED) sum_gated(const __grid_constant__ GateSums g) {
  SCOAT_DYNAMIC_SHARED(memory);
  float* const gates = reinterpret_cast<float*>(memory);  // [SUMMED]
  float* const totals = gates + SUMMED;                   // [threads of a vector][channels]
  const int channels = int(g.below.channels), vectors = channels / 8, each = SUMMED / vectors;
  const int64_t pixels = g.h * g.w, parts = (pixels + SUMMED - 1) / SUMMED, n = blockIdx.x / parts;
  const int64_t first = blockIdx.x % parts * SUMMED;
  const int count = int(first + SUMMED < pixels ? SUMMED : pixels - first), thread = int(threadIdx.x);
  if (thread < count) {
    const auto* const map = static_cast<const typename Wider<T>::Type*>(g.attention) + n * 4 * pixels;
    gates[thread] = gates_of(map, int((first + thread) / g.w), int((first + thread) % g.w), int(g.h), int(g.w));
  }
  __syncthreads();
  const int vector = thread % vectors, start = thread / vectors;
  float total[8] = {}, value[8];
  const int w = int(g.w), rows = each / w, columns = each % w;  // from pixel to pixel
  int y = int(first + start) / w, x = int(first + start) % w;
#pragma unroll 4
  for (int pixel = start; pixel < count && start < each; pixel += each) {
    load<T>(place<T>(g.below, n, y, x, 8 * vector), value);
    unrolled<8>([&](auto i) { total[i] += gates[pixel] * value[i]; });
    x += columns, y += rows;
    if (x >= w) x -= w, ++y;
  }
  if (start < each) unrolled<8>([&](auto i) { totals[start * channels + 8 * vector + i] = total[i]; });
  __syncthreads();
  for (int channel = thread; channel < channels; channel += SUMMED) {
    float all = 0.0f;
    for (int i = 0; i < each; ++i) all += totals[i * channels + channel];
    g.sums[blockIdx.x * g.sum_channels + channel] = all;
  }
}

// A thread adds up what the taps give one pixel; those of a block lie in SUMMED_ROWS rows, which share what they read.
template <typename T>
__global__ void __launch_bounds__(SUMMED) sum_taps(const __grid_constant__ TapSums s) {
  constexpr int ACROSS = SUMMED / SUMMED_ROWS;
  const int h = int(s.h), w = int(s.w), across = (w + ACROSS - 1) / ACROSS, down = (h + SUMMED_ROWS - 1) / SUMMED_ROWS;
  const int block = int(blockIdx.x), n = block / across / down;
  const int y = block / across % down * SUMMED_ROWS + int(threadIdx.x) / ACROSS;
  const int x = block % across * ACROSS + int(threadIdx.x) % ACROSS;
  if (y >= h || x >= w) return;
  const int64_t pixel = (int64_t(n) * h + y) * w + x;
  const auto* const taps = static_cast<const typename Wider<T>::Type*>(s.taps) + pixel * TAPS;
  float given[9];
  unrolled<9>([&](auto tap) {
    constexpr int DOWN = tap / 3 - 1, RIGHT = tap % 3 - 1;
    const bool inside = y + DOWN >= 0 && y + DOWN < h && x + RIGHT >= 0 && x + RIGHT < w;
    given[tap] = inside ? to_float(taps[(int64_t(DOWN) * w + RIGHT) * TAPS + tap]) : 0.0f;
  });
  float total = *s.bias;
  unrolled<9>([&](auto tap) { total += given[tap]; });
  if (s.mask)
    s.mask[pixel] = !(total <= *s.threshold);  // NaN: no clean zero
  else
    s.logits[pixel] = total;
}

template <typename F>
int launch_form(const Convolution& c, void* stream) {
  Parameters p{};
  const auto take = [&](int i, const Features& x, int64_t h, int64_t w, const int (&box)[3], int span) {
    p.chunks[i] = x.data ? int((x.channels + F::DEPTH - 1) / F::DEPTH) : 0;
    return x.data ? encode<typename F::T>(&p.maps[i], x.data, {x.n, x.h, x.w}, c.n, h, w, x.channels, box, span) : 0;
  };
  for (int i = 0; i < SOURCES; ++i)
    if (const int error = take(i, c.sources[i], c.h, c.w, {F::SPAN / F::SIZE, PITCH, F::HEIGHT / F::BOXES}, F::SPAN))
      return error;
  // for which there is no code
  if ((c.below.data && !F::SHORTCUT) || (c.residual.data && F::SHORTCUT) || (c.pooled.data && F::ROWS % 2) ||
      (F::TAPPED && (c.pooled.data || c.sums || c.taps.channels != TAPS)))
    return cudaErrorInvalidValue;
  if (const int error = take(SOURCES, c.below, c.h / 2, c.w / 2, {F::DEPTH, F::LOW_WIDTH, F::LOW_HEIGHT}, 16))
    return error;
  p.h = int(c.h), p.w = int(c.w);
  p.across = (p.w + WIDTH - 1) / WIDTH, p.down = (p.h + F::CUT.height - 1) / F::CUT.height;
  p.blocks = c.channels / F::CHANNELS, p.tiles = c.n * p.across * p.down * p.blocks;
  p.weights = c.weights, p.shortcut = c.shortcut, p.attention = c.attention;
  p.out = c.out, p.pooled = c.pooled, p.shortcut_out = c.shortcut_out;
  p.sums = c.sums, p.sum_channels = c.sum_channels;
  p.relu = c.relu, p.residual = c.residual;
  p.residual_before = c.residual.data && !c.after, p.residual_after = c.residual.data && c.after;
  p.taps = c.taps, p.tap_weights = c.tap_weights;
  p.shortcut_relu = c.shortcut_relu;
  return launch(convolve_tiles<F>, std::min(p.tiles, processors()), THREADS, F::SHARED, stream, p);
}

template <typename T, int CHANNELS, bool SHORTCUT>
int launch_shortcut(const Convolution& c, void* stream) {
  constexpr bool EIGHT = std::is_same_v<T, E4M3>;
  if constexpr (!SHORTCUT && has_taps(CHANNELS))
    if (c.taps.data && !c.planes && c.wide == EIGHT)
      return launch_form<Form<T, CHANNELS, false, false, EIGHT, true>>(c, stream);
  if (c.taps.data) return cudaErrorInvalidValue;
  if constexpr (std::is_same_v<T, BFloat>)
    if (c.planes && !c.wide) return launch_form<Form<T, CHANNELS, SHORTCUT, true, false>>(c, stream);
  if constexpr (EIGHT)
    if (c.wide && !c.planes) return launch_form<Form<T, CHANNELS, SHORTCUT, false, true>>(c, stream);
  if (c.planes || c.wide) return cudaErrorInvalidValue;
  return launch_form<Form<T, CHANNELS, SHORTCUT, false, false>>(c, stream);
}

template <typename T, int CHANNELS>
int launch_channels(const Convolution& c, void* stream) {
  if constexpr (has_kernel(CHANNELS, sizeof(T))) {
    if (!c.shortcut.weights) return launch_shortcut<T, CHANNELS, false>(c, stream);
    if constexpr (cut_of(CHANNELS, true).outputs == CHANNELS) return launch_shortcut<T, CHANNELS, true>(c, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace

template <>
int convolve<SCOAT_TYPE>(const Convolution& c, void* stream) {
  if (c.n == 0) return cudaSuccess;
  if (!has_kernel(c.channels, sizeof(SCOAT_TYPE)) || (c.taps.data && !has_taps(c.channels)))
    return cudaErrorInvalidValue;
  switch (cut_of(c.channels, c.shortcut.weights).outputs) {
    case 16:
      return launch_channels<SCOAT_TYPE, 16>(c, stream);
    case 32:
      return launch_channels<SCOAT_TYPE, 32>(c, stream);
    case 64:
      return launch_channels<SCOAT_TYPE, 64>(c, stream);
    case 128:
      return launch_channels<SCOAT_TYPE, 128>(c, stream);
  }
  return cudaErrorInvalidValue;
}

template <>
int scale<SCOAT_TYPE>(const Scaling& s, void* stream) {
  const int64_t blocks = (s.n * s.vectors + SCALING_THREADS - 1) / SCALING_THREADS;
  return blocks == 0 ? cudaSuccess : launch(scale_vectors<SCOAT_TYPE>, blocks, SCALING_THREADS, 0, stream, s);
}

template <>
int gate_sums<SCOAT_TYPE>(const GateSums& g, void* stream) {
  if (!has_gate_sums(g.below.channels)) return cudaErrorInvalidValue;
  const int64_t blocks = g.n * ((g.h * g.w + SUMMED - 1) / SUMMED);
  const int bytes = (SUMMED + SUMMED / int(g.below.channels / 8) * int(g.below.channels)) * 4;
  return blocks == 0 ? cudaSuccess : launch(sum_gated<SCOAT_TYPE>, blocks, SUMMED, bytes, stream, g);
}

template <>
int tap_sums<SCOAT_TYPE>(const TapSums& s, void* stream) {
  constexpr int ACROSS = SUMMED / SUMMED_ROWS;
  const int64_t blocks = s.n * ((s.h + SUMMED_ROWS - 1) / SUMMED_ROWS) * ((s.w + ACROSS - 1) / ACROSS);
  return blocks == 0 ? cudaSuccess : launch(sum_taps<SCOAT_TYPE>, blocks, SUMMED, 0, stream, s);
}

template <>
const char* why_not<SCOAT_TYPE>() {
  cudaFuncAttributes attributes;
  const cudaError_t error =
      cudaFuncGetAttributes(&attributes, convolve_tiles<Form<SCOAT_TYPE, 32, false, false, false>>);
  if (error == cudaSuccess) return "";
  cudaGetLastError();  // of ours; the next call must not see it
  static thread_local std::string reason;
  reason = std::string("cannot run on this GPU: ") + cudaGetErrorString(error);
  return reason.c_str();
}

}  // namespace hopper
}  // namespace scoat
