// The gradient of the weights of a 3x3 convolution on a CPU, by the adjoint of Winograd's algorithm: with the matrices
// of the algorithm y = A^T [(G w G^T) (B^T x B)] A, dw = G^T [sum over tiles of (B^T x B) (A dy A^T)] G. Compiled once
// for each instruction set (SCOAT_ISA names its namespace).
#include "winograd.h"

namespace scoat {
namespace cpu {
namespace SCOAT_ISA {

namespace {

// One dimension of A m, the adjoint of A^T.
inline void transform_gradient(const Lanes d[4], Lanes out[6]) {
  const Lanes a = d[0] + A2 * d[2], b = A * d[1] + (A * A2) * d[3];
  const Lanes c = d[0] + B2 * d[2], e = B * d[1] + (B * B2) * d[3];
  out[0] = d[0];
  out[1] = a + b;
  out[2] = a - b;
  out[3] = c + e;
  out[4] = c - e;
  out[5] = d[3];
}

// One dimension of G^T m.
inline void transform_weights(const Lanes m[6], Lanes out[3]) {
  constexpr float FIRST = 1.0f / (2.0f * A2 * (A2 - B2)), SECOND = 1.0f / (2.0f * B2 * (B2 - A2));
  const Lanes a = FIRST * (m[1] + m[2]), b = FIRST * (m[1] - m[2]);
  const Lanes c = SECOND * (m[3] + m[4]), d = SECOND * (m[3] - m[4]);
  out[0] = (1.0f / (A2 * B2)) * m[0] + a + c;
  out[1] = A * b + B * d;
  out[2] = A2 * a + (B2 * c + m[5]);
}

// points [36][rows, padded] = the transformed gradients of tiles from `first` on.
void transform_gradients(const Features& gradient, int64_t in, const Tiles& tiles, int64_t first, int64_t count,
                         float* points) {
  const int64_t padded = padded_channels(gradient.channels), step = point_step(count, padded);
  for (int64_t t = 0; t < count; ++t) {
    const int64_t y = (first + t) / tiles.across * 4, x = (first + t) % tiles.across * 4;
    const int64_t high = std::min<int64_t>(4, tiles.h - y), wide = std::min<int64_t>(4, tiles.w - x);
    for (int64_t c = 0; c < padded; c += LANES) {
      Lanes half[4][6];  // transformed along columns: [column][point]
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        Lanes d[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i)
          d[i] =
              i < high && j < wide ? load_some(pixel(gradient, in, y + i, x + j) + c, gradient.channels - c) : Lanes{};
        transform_gradient(d, half[j]);
      }
      float* to = points + t * padded + c;
#pragma GCC unroll 6
      for (int i = 0; i < 6; ++i) {
        Lanes d[4], done[6];
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) d[j] = half[j][i];
        transform_gradient(d, done);
#pragma GCC unroll 6
        for (int j = 0; j < 6; ++j) store(done[j], to + (i * 6 + j) * step);
      }
    }
  }
}

}  // namespace

void weight_gradient(const WeightGradient& a, int threads) {
  const Tiles tiles(a.h, a.w);
  const int64_t channels = a.source.channels, out = a.gradient.channels, padded = padded_channels(out);
  const int64_t chunks = ceil_div(channels, DEPTH), all = a.n * tiles.count;
  const int64_t rows = padded_rows(std::min<int64_t>(DEPTH, channels)), total = POINTS * rows * padded;
#pragma omp parallel num_threads(threads)
  {
    // what is read beyond the channels of a chunk ends in rows of sums that nobody reads
    const Scratch scratch(run_floats(a.tiles, out) + DEPTH + total);
    float *points = scratch.data(), *gradients = points + POINTS * point_step(a.tiles, DEPTH);
    float* sums = points + run_floats(a.tiles, out) + DEPTH;
#pragma omp for schedule(dynamic)
    for (int64_t item = 0; item < a.parts * chunks; ++item) {
      const int64_t part = item / chunks, start = item % chunks * DEPTH, end = all * (part + 1) / a.parts;
      const Chunk chunk{a.source, start, std::min<int64_t>(DEPTH, channels - start)};
      std::fill(sums, sums + total, 0.0f);
      for (int64_t done = all * part / a.parts; done < end;) {
        const int64_t in = done / tiles.count, first = done % tiles.count;
        const int64_t count = std::min({a.tiles, tiles.count - first, end - done});
        transform_inputs(chunk, nullptr, in, tiles, first, count, points);
        transform_gradients(a.gradient, in, tiles, first, count, gradients);
        for (int point = 0; point < POINTS; ++point) {
          const float* left = points + point * point_step(count, DEPTH);
          const float* right = gradients + point * point_step(count, padded);
          float* to = sums + point * rows * padded;
          for (int64_t row = 0; row < chunk.count; row += ROWS)
            for (int64_t c = 0; c < padded; c += PANEL) {
              if (c + LANES < padded)
                multiply<2, 1, DEPTH>(left + row, count, right + c, padded, to + row * padded + c, padded, true);
              else
                multiply<1, 1, DEPTH>(left + row, count, right + c, padded, to + row * padded + c, padded, true);
            }
        }
        done += count;
      }
      for (int point = 0; point < POINTS; ++point)
        for (int64_t row = 0; row < chunk.count; ++row)
          std::copy_n(sums + (point * rows + row) * padded, out,
                      a.sums + ((part * POINTS + point) * channels + start + row) * out);
    }
    const int64_t count = channels * out;  // of a point
#pragma omp for schedule(static)
    for (int64_t item = 0; item < ceil_div(count, LANES); ++item) {
      const int64_t first = item * LANES;
      Lanes half[3][6];  // transformed along columns: [row][point]
      for (int j = 0; j < 6; ++j) {
        Lanes m[6] = {}, done[3];
        for (int64_t part = 0; part < a.parts; ++part)
          for (int i = 0; i < 6; ++i)
            m[i] += load_some(a.sums + (part * POINTS + i * 6 + j) * count + first, count - first);
        transform_weights(m, done);
        for (int i = 0; i < 3; ++i) half[i][j] = done[i];
      }
      for (int i = 0; i < 3; ++i) {
        Lanes done[3];
        transform_weights(half[i], done);
        for (int j = 0; j < 3; ++j) store_some(done[j], a.out + (i * 3 + j) * count + first, count - first);
      }
    }
  }
}

}  // namespace SCOAT_ISA
}  // namespace cpu
}  // namespace scoat
