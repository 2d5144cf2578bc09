// What comes from the level below: upsampled and gated into the tile, by warps of its own.
#pragma once

#include "hopper_form.h"
#include "resample.h"

namespace scoat {
namespace hopper {

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

}  // namespace hopper
}  // namespace scoat
