// What the engine and the training on a CPU share of the Winograd algorithm F(4x4, 3x3) (Lavin and Gray, arXiv
// 1509.09308): a tile of 6x6 inputs becomes 36 points, at each of which all channels are multiplied as one matrix, and
// 36 sums become 4x4 outputs. For files that are compiled once for each instruction set (SCOAT_ISA names its
// namespace).
#pragma once

#include <algorithm>
#include <cstring>
#include <memory>

#include "engine.h"
#include "lanes.h"

namespace scoat {
namespace cpu {
namespace SCOAT_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int ROWS = 12;  // 24 of 32 registers are sums
#else
constexpr int ROWS = 6;  // 12 of 16
#endif
constexpr int PANEL = 2 * LANES;
constexpr int DEPTH = 64;  // input channels at once, and the step between rows of the left matrix
constexpr int POINTS = 36;

inline Lanes load(const float* from) {
  Lanes lanes;
  memcpy(&lanes, from, sizeof lanes);
  return lanes;
}

inline void store(const Lanes& lanes, float* to) { memcpy(to, &lanes, sizeof lanes); }

inline Lanes load_some(const float* from, int64_t count) {
  if (count >= LANES) return load(from);
  Lanes lanes = {};
  memcpy(&lanes, from, count * sizeof(float));
  return lanes;
}

inline void store_some(const Lanes& lanes, float* to, int64_t count) {
  if (count >= LANES) return store(lanes, to);
  memcpy(to, &lanes, count * sizeof(float));
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Aligned memory of a thread.
class Scratch {
 public:
  explicit Scratch(int64_t floats) : memory_(new float[floats + 16]()) {}
  float* data() const {
    return reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(memory_.get()) + 63) & ~uintptr_t(63));
  }

 private:
  std::unique_ptr<float[]> memory_;
};

inline int64_t padded_channels(int64_t channels) { return ceil_div(channels, LANES) * LANES; }
inline int64_t padded_rows(int64_t rows) { return ceil_div(rows, ROWS) * ROWS; }

// Floats from one point to the next of matrices [rows, columns]: off a power of two by a cache line, since the points
// of a tile are read and written together and must not fall into the same sets of the cache.
inline int64_t point_step(int64_t rows, int64_t columns) { return padded_rows(rows) * columns + 16; }

// Scratch of a run of tiles: matrices of DEPTH and of `channels` columns.
inline int64_t run_floats(int64_t tiles, int64_t channels) {
  return POINTS * (point_step(tiles, DEPTH) + point_step(tiles, padded_channels(channels)));
}

// c [ROWS, VECTORS * LANES] (+)= a [ROWS, depth] b [depth, VECTORS * LANES], where rows of a are ROW_STEP apart, and
// its columns COLUMN_STEP.
template <int VECTORS, int ROW_STEP, int COLUMN_STEP>
inline void multiply(const float* __restrict a, int64_t depth, const float* __restrict b, int64_t b_step,
                     float* __restrict c, int64_t c_step, bool add) {
  Lanes sums[ROWS][VECTORS];
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < VECTORS; ++v) sums[i][v] = add ? load(c + i * c_step + v * LANES) : Lanes{};
#pragma GCC unroll 1
  for (int64_t k = 0; k < depth; ++k) {
    Lanes right[VECTORS];
#pragma GCC unroll 2
    for (int v = 0; v < VECTORS; ++v) right[v] = load(b + k * b_step + v * LANES);
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 2
      for (int v = 0; v < VECTORS; ++v) sums[i][v] += a[i * ROW_STEP + k * COLUMN_STEP] * right[v];
  }
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < VECTORS; ++v) store(sums[i][v], c + i * c_step + v * LANES);
}

// The points of the algorithm: 0, A, -A, B, -B and infinity. With 1 and 2, as in the paper, rounding is 2 to 3 times
// what it is with these: their powers are more alike.
constexpr float A = 0.625f, B = 1.375f, A2 = A * A, B2 = B * B;  // exact in float32

// One dimension of B^T d.
inline void transform_input(const Lanes d[6], Lanes out[6]) {
  const Lanes a = d[4] - B2 * d[2], b = A * (d[3] - B2 * d[1]), c = d[4] - A2 * d[2], e = B * (d[3] - A2 * d[1]);
  out[0] = (A2 * B2) * d[0] + (d[4] - (A2 + B2) * d[2]);
  out[1] = a + b;
  out[2] = a - b;
  out[3] = c + e;
  out[4] = c - e;
  out[5] = (A2 * B2) * d[1] + (d[5] - (A2 + B2) * d[3]);
}

alignas(64) const float ZEROS[DEPTH + LANES] = {};

// Tiles of 4x4 pixels over an image, in rows.
struct Tiles {
  int64_t h, w, across, count;
  Tiles(int64_t h, int64_t w) : h(h), w(w), across(ceil_div(w, 4)), count(ceil_div(h, 4) * across) {}
};

// Channels from `first` on of the concatenated sources, as far as one source and DEPTH reach.
struct Chunk {
  Features source;
  int64_t within, count;  // first channel within the source
};

inline Chunk chunk_at(const Features* sources, int64_t first) {
  while (first >= sources->channels) first -= (sources++)->channels;
  return {*sources, first, std::min<int64_t>(DEPTH, sources->channels - first)};
}

// points [36][rows, DEPTH] = the transformed inputs of tiles from `first` on.
void transform_inputs(const Chunk& chunk, const float* scale, int64_t in, const Tiles& tiles, int64_t first,
                      int64_t count, float* points) {
  const int64_t step = point_step(count, DEPTH);
  for (int64_t t = 0; t < count; ++t) {
    const int64_t y = (first + t) / tiles.across * 4 - 1, x = (first + t) % tiles.across * 4 - 1;
    const float* from[6][6];
    const float* base = chunk.source.data + in * chunk.source.n + chunk.within;
    for (int i = 0; i < 6; ++i)
      for (int j = 0; j < 6; ++j) {
        const bool inside = y + i >= 0 && y + i < tiles.h && x + j >= 0 && x + j < tiles.w;
        from[i][j] = inside ? base + (y + i) * chunk.source.h + (x + j) * chunk.source.w : ZEROS;
      }
    for (int64_t c = 0; c < chunk.count; c += LANES) {
      const int64_t some = chunk.count - c;
      Lanes half[6][6];  // transformed along columns: [column][point]
#pragma GCC unroll 6
      for (int j = 0; j < 6; ++j) {
        Lanes d[6];
#pragma GCC unroll 6
        for (int i = 0; i < 6; ++i) d[i] = load_some(from[i][j] + c, some);
        transform_input(d, half[j]);
      }
      const Lanes factor = scale ? load_some(scale + c, some) : Lanes{} + 1.0f;
      float* to = points + t * DEPTH + c;
#pragma GCC unroll 6
      for (int i = 0; i < 6; ++i) {
        Lanes d[6], done[6];
#pragma GCC unroll 6
        for (int j = 0; j < 6; ++j) d[j] = half[j][i];
        transform_input(d, done);
#pragma GCC unroll 6
        for (int j = 0; j < 6; ++j) store(done[j] * factor, to + (i * 6 + j) * step);
      }
    }
  }
}

inline float* pixel(const Features& f, int64_t in, int64_t y, int64_t x) {
  return f.data + in * f.n + y * f.h + x * f.w;
}

}  // namespace
}  // namespace SCOAT_ISA
}  // namespace cpu
}  // namespace scoat
