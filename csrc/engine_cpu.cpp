// The steps of the inference engine on a CPU. Compiled once for each instruction set (SCOAT_ISA names its namespace).
//
// 3x3 convolutions use Winograd's algorithm, with a quarter of the multiplications. All of it stays in the cache of a
// core: a work item transforms the inputs of a run of tiles for DEPTH channels, multiplies, goes on to the next DEPTH
// channels, and transforms the sums in the end.
#include <cmath>

#include "resample.h"
#include "winograd.h"

namespace scoat {
namespace cpu {
namespace SCOAT_ISA {

namespace {

constexpr int PIXELS = 4 * ROWS;  // that a 1x1 convolution takes at once

// NaN stays NaN, as in torch.
inline Lanes positive(const Lanes& x) { return x < 0.0f ? Lanes{} : x; }
inline Lanes larger(const Lanes& a, const Lanes& b) { return (a > b) | (a != a) ? a : b; }

inline int64_t panel_floats(int64_t in, int64_t out) { return ceil_div(out, PANEL) * PANEL * in; }

// c [rows, padded] (+)= a [rows, depth] panels, for `rows` rounded up to ROWS. A panel has `channels` rows in all.
inline void multiply_panels(const float* a, int64_t rows, int64_t depth, const float* panels, int64_t channels,
                            float* c, int64_t padded, bool add) {
  for (int64_t block = 0; block * PANEL < padded; ++block) {
    const float* b = panels + block * channels * PANEL;
    const bool half = block * PANEL + LANES >= padded;
    for (int64_t row = 0; row < rows; row += ROWS) {
      float* to = c + row * padded + block * PANEL;
      if (half)
        multiply<1, DEPTH, 1>(a + row * DEPTH, depth, b, PANEL, to, padded, add);
      else
        multiply<2, DEPTH, 1>(a + row * DEPTH, depth, b, PANEL, to, padded, add);
    }
  }
}

// One dimension of A^T m.
inline void transform_output(const Lanes m[6], Lanes out[4]) {
  const Lanes a = m[1] + m[2], b = m[1] - m[2], c = m[3] + m[4], d = m[3] - m[4];
  out[0] = m[0] + a + c;
  out[1] = A * b + B * d;
  out[2] = A2 * a + B2 * c;
  out[3] = (A * A2) * b + ((B * B2) * d + m[5]);
}

// sums [36][rows, padded] = the products of a run of tiles at all points, over all channels.
void multiply_run(const Features* sources, int64_t channels, const float* scale, const float* weights, int64_t out,
                  int64_t in, const Tiles& tiles, int64_t first, int64_t count, float* points, float* sums) {
  const int64_t padded = padded_channels(out), floats = panel_floats(channels, out);
  for (int64_t done = 0; done < channels;) {
    const Chunk chunk = chunk_at(sources, done);
    transform_inputs(chunk, scale ? scale + in * channels + done : nullptr, in, tiles, first, count, points);
    for (int point = 0; point < POINTS; ++point)
      multiply_panels(points + point * point_step(count, DEPTH), count, chunk.count,
                      weights + point * floats + done * PANEL, channels, sums + point * point_step(count, padded),
                      padded, done > 0);
    done += chunk.count;
  }
}

// Calls use(lanes of 4x4 outputs, first channel) for one tile.
template <typename Use>
inline void transform_outputs(const float* sums, int64_t step, int64_t padded, const float* bias, const Use& use) {
  for (int64_t c = 0; c < padded; c += LANES) {
    Lanes half[4][6], tile[4][4];
#pragma GCC unroll 6
    for (int j = 0; j < 6; ++j) {
      Lanes m[6], done[4];
#pragma GCC unroll 6
      for (int i = 0; i < 6; ++i) m[i] = load(sums + (i * 6 + j) * step + c);
      transform_output(m, done);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) half[i][j] = done[i];
    }
    const Lanes shift = load(bias + c);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      transform_output(half[i], tile[i]);
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) tile[i][j] += shift;
    }
    use(tile, c);
  }
}

// Stores a tile of a convolution, adds it to `total`, and pools it.
inline void finish_tile(const Convolution& a, Lanes tile[4][4], int64_t in, int64_t y, int64_t x, int64_t c,
                        float* total) {
  const int64_t high = std::min<int64_t>(4, a.h - y), wide = std::min<int64_t>(4, a.w - x), some = a.out.channels - c;
  Lanes sum = {};
  for (int i = 0; i < high; ++i) {
    float* to = pixel(a.out, in, y + i, x) + c;
    for (int j = 0; j < wide; ++j, to += a.out.w) {
      Lanes value = tile[i][j];
      if (a.residual_before) value += load_some(to, some);
      if (a.relu) value = positive(value);
      if (a.residual_after) value += load_some(to, some);
      store_some(value, to, some);
      sum += value;
      tile[i][j] = value;
    }
  }
  if (a.sums) store(load(total + c) + sum, total + c);
  if (a.pooled.data)
    for (int i = 0; i + 1 < high; i += 2)
      for (int j = 0; j + 1 < wide; j += 2)
        store_some(larger(larger(tile[i][j], tile[i][j + 1]), larger(tile[i + 1][j], tile[i + 1][j + 1])),
                   pixel(a.pooled, in, (y + i) / 2, (x + j) / 2) + c, some);
}

// to [count, padded] = the 1x1 convolution of `count` neighbouring pixels of a row, without its bias.
void multiply_pixels(const Features* sources, int64_t channels, const float* scale, const float* weights, int64_t out,
                     int64_t in, int64_t y, int64_t x, int64_t count, float* left, float* to) {
  for (int64_t done = 0; done < channels;) {
    const Chunk chunk = chunk_at(sources, done);
    const float* factor = scale ? scale + in * channels + done : nullptr;
    for (int64_t p = 0; p < count; ++p) {
      const float* from = pixel(chunk.source, in, y, x + p) + chunk.within;
      for (int64_t c = 0; c < chunk.count; c += LANES) {
        const int64_t some = chunk.count - c;
        const Lanes value = load_some(from + c, some);
        store(factor ? value * load_some(factor + c, some) : value, left + p * DEPTH + c);
      }
    }
    multiply_panels(left, count, chunk.count, weights + done * PANEL, channels, to, padded_channels(out), done > 0);
    done += chunk.count;
  }
}

inline int64_t channels_of(const Features* sources) {
  int64_t channels = 0;
  for (int i = 0; i < SOURCES; ++i) channels += sources[i].channels;
  return channels;
}

// Stores pixels [count, padded] into a row.
inline void store_pixels(const float* from, int64_t padded, const float* bias, bool relu, const Features& out,
                         int64_t in, int64_t y, int64_t x, int64_t count) {
  for (int64_t p = 0; p < count; ++p) {
    float* to = pixel(out, in, y, x + p);
    for (int64_t c = 0; c < out.channels; c += LANES) {
      const Lanes value = load(from + p * padded + c) + load(bias + c);
      store_some(relu ? positive(value) : value, to + c, out.channels - c);
    }
  }
}

// The shortcut of the pixels of a run of tiles.
void add_shortcut(const Convolution& a, int64_t channels, int64_t in, const Tiles& tiles, int64_t first, int64_t count,
                  float* left, float* right) {
  const int64_t out = a.shortcut_out.channels;
  for (int64_t t = first; t < first + count;) {
    const int64_t y = t / tiles.across * 4, x0 = t % tiles.across;
    const int64_t run = std::min(tiles.across - x0, first + count - t), end = std::min((x0 + run) * 4, a.w);
    for (int64_t row = y; row < std::min(y + 4, a.h); ++row)
      for (int64_t x = x0 * 4; x < end; x += PIXELS) {
        const int64_t pixels = std::min<int64_t>(PIXELS, end - x);
        multiply_pixels(a.sources, channels, a.shortcut_scaled ? a.scale : nullptr, a.shortcut.weights, out, in, row, x,
                        pixels, left, right);
        store_pixels(right, padded_channels(out), a.shortcut.bias, a.shortcut_relu, a.shortcut_out, in, row, x, pixels);
      }
    t += run;
  }
}

// Scratch of the two matrices of a shortcut.
int64_t pixel_floats(int64_t out) { return PIXELS * (DEPTH + padded_channels(out)); }

}  // namespace

void convolve(const Convolution& a, int threads) {
  const Tiles tiles(a.h, a.w);
  const int64_t channels = channels_of(a.sources), out = a.out.channels, padded = padded_channels(out);
  const int64_t parts = ceil_div(tiles.count, a.tiles);
#pragma omp parallel num_threads(threads)
  {
    const Scratch scratch(run_floats(a.tiles, out) + pixel_floats(out) + padded);
    float *points = scratch.data(), *sums = points + POINTS * point_step(a.tiles, DEPTH);
    float *left = points + run_floats(a.tiles, out), *right = left + PIXELS * DEPTH, *total = right + PIXELS * padded;
#pragma omp for schedule(dynamic)
    for (int64_t item = 0; item < a.n * parts; ++item) {
      const int64_t in = item / parts, part = item % parts, first = part * a.tiles;
      const int64_t count = std::min(a.tiles, tiles.count - first), step = point_step(count, padded);
      multiply_run(a.sources, channels, a.scale, a.panels.weights, out, in, tiles, first, count, points, sums);
      std::fill(total, total + padded, 0.0f);
      for (int64_t t = 0; t < count; ++t) {
        const int64_t y = (first + t) / tiles.across * 4, x = (first + t) % tiles.across * 4;
        transform_outputs(sums + t * padded, step, padded, a.panels.bias,
                          [&](Lanes tile[4][4], int64_t c) { finish_tile(a, tile, in, y, x, c, total); });
      }
      if (a.sums) std::copy(total, total + out, a.sums + (in * parts + part) * a.sum_channels);
      if (a.shortcut.weights) add_shortcut(a, channels, in, tiles, first, count, left, right);
    }
  }
}

void project(const Projection& a, int threads) {
  const int64_t out = a.out.channels, padded = padded_channels(out), across = ceil_div(a.w, PIXELS);
#pragma omp parallel num_threads(threads)
  {
    const Scratch scratch(pixel_floats(out));
    float *left = scratch.data(), *right = left + PIXELS * DEPTH;
#pragma omp for schedule(dynamic, 4)
    for (int64_t item = 0; item < a.n * a.h * across; ++item) {
      const int64_t in = item / across / a.h, y = item / across % a.h, x = item % across * PIXELS;
      const int64_t pixels = std::min<int64_t>(PIXELS, a.w - x);
      multiply_pixels(&a.source, a.source.channels, nullptr, a.panels.weights, out, in, y, x, pixels, left, right);
      store_pixels(right, padded, a.panels.bias, false, a.out, in, y, x, pixels);
    }
  }
}

void attend(const Attention& a, int threads) {
  const int64_t out = a.below.channels, padded = padded_channels(out), across = ceil_div(a.w, PIXELS);
  const int64_t h = a.h / 2, w = a.w / 2;
  const float inverse_h = inverse_of(h), inverse_w = inverse_of(w);
#pragma omp parallel num_threads(threads)
  {
    const Scratch scratch(pixel_floats(out));
    float *left = scratch.data(), *right = left + PIXELS * DEPTH;
#pragma omp for schedule(dynamic, 4)
    for (int64_t item = 0; item < a.n * a.h * across; ++item) {
      const int64_t in = item / across / a.h, y = item / across % a.h, x = item % across * PIXELS;
      const int64_t pixels = std::min<int64_t>(PIXELS, a.w - x);
      const Source vertical = source_of(y, h, inverse_h);
      multiply_pixels(&a.row, a.row.channels, nullptr, a.panels.weights, out, in, y, x, pixels, left, right);
      for (int64_t p = 0; p < pixels; ++p) {
        const Source across_row = source_of(x + p, w, inverse_w);
        const float *y00 = pixel(a.below, in, vertical.first, across_row.first),
                    *y01 = pixel(a.below, in, vertical.first, across_row.second),
                    *y10 = pixel(a.below, in, vertical.second, across_row.first),
                    *y11 = pixel(a.below, in, vertical.second, across_row.second);
        const float w00 = vertical.first_weight * across_row.first_weight,
                    w01 = vertical.first_weight * across_row.second_weight,
                    w10 = vertical.second_weight * across_row.first_weight,
                    w11 = vertical.second_weight * across_row.second_weight;
        Lanes sum = {};
        for (int64_t c = 0; c < out; c += LANES) {
          const int64_t some = out - c;
          Lanes from_row = load(right + p * padded + c) + load(a.panels.bias + c);
          Lanes from_below = w00 * load_some(y00 + c, some) + w01 * load_some(y01 + c, some) +
                             w10 * load_some(y10 + c, some) + w11 * load_some(y11 + c, some);
          const Lanes joined = a.each ? positive(from_row) + positive(from_below) : positive(from_row + from_below);
          sum += joined * load_some(a.psi + c, some);
        }
        float logit = a.bias;
        for (int i = 0; i < LANES; ++i) logit += sum[i];
        a.map[(in * a.h + y) * a.w + x + p] = 1.0f / (1.0f + std::exp(-logit));
      }
    }
  }
}

void output(const Output& a, int threads) {
  const Tiles tiles(a.h, a.w);
  const int64_t padded = padded_channels(a.classes), parts = ceil_div(tiles.count, a.tiles);
  const Features sources[SOURCES] = {a.source};
#pragma omp parallel num_threads(threads)
  {
    const Scratch scratch(run_floats(a.tiles, a.classes));
    float *points = scratch.data(), *sums = points + POINTS * point_step(a.tiles, DEPTH);
#pragma omp for schedule(dynamic)
    for (int64_t item = 0; item < a.n * parts; ++item) {
      const int64_t in = item / parts, first = item % parts * a.tiles;
      const int64_t count = std::min(a.tiles, tiles.count - first), step = point_step(count, padded);
      multiply_run(sources, a.source.channels, nullptr, a.panels.weights, a.classes, in, tiles, first, count, points,
                   sums);
      for (int64_t t = 0; t < count; ++t) {
        const int64_t y = (first + t) / tiles.across * 4, x = (first + t) % tiles.across * 4;
        transform_outputs(sums + t * padded, step, padded, a.panels.bias, [&](Lanes tile[4][4], int64_t c) {
          for (int64_t k = c; k < std::min<int64_t>(c + LANES, a.classes); ++k)
            for (int64_t i = 0; i < std::min<int64_t>(4, a.h - y); ++i)
              for (int64_t j = 0; j < std::min<int64_t>(4, a.w - x); ++j) {
                const int64_t at = ((in * a.classes + k) * a.h + y + i) * a.w + x + j;
                const float logit = tile[i][j][k - c];
                if (a.mask)
                  a.mask[at] = !(logit <= *a.threshold);  // NaN is no clean zero
                else
                  a.logits[at] = logit;
              }
        });
      }
    }
  }
}

int64_t panel() { return PANEL; }

}  // namespace SCOAT_ISA
}  // namespace cpu
}  // namespace scoat
