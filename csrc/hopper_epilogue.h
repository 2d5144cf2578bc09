// The end of a tile: what becomes of the sums that a warpgroup has in its registers.
#pragma once

#include "hopper_form.h"

namespace scoat {
namespace hopper {

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

}  // namespace hopper
}  // namespace scoat
