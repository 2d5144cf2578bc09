// The kernels for tensors of which neighbouring channels lie side by side.
#pragma once

#include "cuda_common.h"

namespace scoat {
namespace cuda {

// Two rows of outputs, those between input rows ky and ky + 1, over TILE pairs of columns; V channels.
template <typename T, int V>
__global__ void __launch_bounds__(THREADS) up_forward_channels_last(const Arguments a, unsigned items) {
  if (flat_index() >= items) return;
  const int c = int(a.shape.c), h = int(a.shape.h), w = int(a.shape.w), tiles = int(column_tiles(2 * w));
  Index index{flat_index()};
  const int ic = index.next(c / V) * V, tile = index.next(tiles), ky = index.next(h + 1) - 1, in = int(index.rest);
  const float inverse_h = inverse_of(h), inverse_w = inverse_of(w);
  const T *y0 = at<T>(a.a, in, ic, clamp(ky, h)), *y1 = at<T>(a.a, in, ic, clamp(ky + 1, h));
  const float rows[2][2] = {{odd_first(ky, h, inverse_h), odd_second(ky, h, inverse_h)},
                            {even_first(ky, h, inverse_h), even_second(ky, h, inverse_h)}};
  float left[2][V], right[2][V], sum[V] = {};
  const auto blend = [&](int column, float (&to)[2][V]) {
    float top[V], bottom[V];
    load<V>(y0 + clamp(column, w) * a.a.w, top);
    load<V>(y1 + clamp(column, w) * a.a.w, bottom);
#pragma unroll
    for (int r = 0; r < 2; ++r)
#pragma unroll
      for (int i = 0; i < V; ++i) to[r][i] = rows[r][0] * top[i] + rows[r][1] * bottom[i];
  };
  const int first = tile * int(TILE) - 1, last = min(first + int(TILE), w);
  blend(first, left);
  for (int kx = first; kx < last; ++kx) {
    blend(kx + 1, right);
    const float columns[2][2] = {{odd_first(kx, w, inverse_w), odd_second(kx, w, inverse_w)},
                                 {even_first(kx, w, inverse_w), even_second(kx, w, inverse_w)}};
#pragma unroll
    for (int r = 0; r < 2; ++r)
#pragma unroll
      for (int s = 0; s < 2; ++s) {
        const int oy = 2 * ky + 1 + r, ox = 2 * kx + 1 + s;
        if (oy < 0 || oy >= 2 * h || ox < 0 || ox >= 2 * w) continue;
        const float factor = a.gate.data ? 1.0f + to_float(at<T>(a.gate, in, 0, oy)[ox]) : 1.0f;
        float out[V];
#pragma unroll
        for (int i = 0; i < V; ++i) {
          out[i] = factor * (columns[s][0] * left[r][i] + columns[s][1] * right[r][i]);
          sum[i] += out[i];
        }
        store<V>(out, at<T>(a.out, in, ic, oy) + ox * a.out.w);
      }
#pragma unroll
    for (int r = 0; r < 2; ++r)
#pragma unroll
      for (int i = 0; i < V; ++i) left[r][i] = right[r][i];
  }
  if (a.sums) {
    float* sums = sums_at(a, in, int64_t(h + 1) * tiles, (ky + 1) * tiles + tile, ic);
#pragma unroll
    for (int i = 0; i < V; ++i) sums[i] = sum[i];
  }
}

// Gathers BACKWARD_TILE inputs along a row, each from 4 x 4 outputs; V channels.
template <typename T, int V>
__global__ void __launch_bounds__(THREADS) up_backward_channels_last(const Arguments a, unsigned items) {
  if (flat_index() >= items) return;
  const int c = int(a.shape.c), h = int(a.shape.h), w = int(a.shape.w);
  Index index{flat_index()};
  const int ic = index.next(c / V) * V, tile = index.next((w + BACKWARD_TILE - 1) / BACKWARD_TILE), ky = index.next(h);
  const int in = int(index.rest);
  const float inverse_w = inverse_of(w);
  const Targets rows = targets_of(ky, h, inverse_of(h));
  float shift[V] = {};
  if (a.shift)
#pragma unroll
    for (int i = 0; i < V; ++i) shift[i] = a.shift[int64_t(in) * c + ic + i];
  // the sum down a column of outputs, with the weights of this row of inputs
  const auto gather_column = [&](int ox, float (&to)[V]) {
#pragma unroll
    for (int i = 0; i < V; ++i) to[i] = 0.0f;
    if (ox < 0 || ox >= 2 * w) return;
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const int oy = 2 * ky - 1 + r;
      if (oy < 0 || oy >= 2 * h) continue;
      const float weight = rows.weight[r] * (a.gate.data ? 1.0f + to_float(at<T>(a.gate, in, 0, oy)[ox]) : 1.0f);
      float dout[V];
      load<V>(at<T>(a.a, in, ic, oy) + ox * a.a.w, dout);
#pragma unroll
      for (int i = 0; i < V; ++i) to[i] += weight * (dout[i] + shift[i]);
    }
  };
  const int first = tile * BACKWARD_TILE, last = min(first + BACKWARD_TILE, w);
  float column[4][V];
  gather_column(2 * first - 1, column[0]);
  gather_column(2 * first, column[1]);
  for (int kx = first; kx < last; ++kx) {
    gather_column(2 * kx + 1, column[2]);
    gather_column(2 * kx + 2, column[3]);
    const Targets columns = targets_of(kx, w, inverse_w);
    float dy[V];
#pragma unroll
    for (int i = 0; i < V; ++i) {
      dy[i] = columns.weight[0] * column[0][i] + columns.weight[1] * column[1][i] + columns.weight[2] * column[2][i] +
              columns.weight[3] * column[3][i];
      column[0][i] = column[2][i];
      column[1][i] = column[3][i];
    }
    store<V>(dy, at<T>(a.out, in, ic, ky) + kx * a.out.w);
  }
}

// The map's gradient at the 2 x 2 outputs between four inputs; `group` threads share the channels.
template <typename T, int V>
__global__ void __launch_bounds__(THREADS) gate_backward_channels_last(const Arguments a, unsigned items, int group) {
  const bool active = flat_index() < items;
  const int c = int(a.shape.c), h = int(a.shape.h), w = int(a.shape.w);
  Index index{active ? flat_index() : 0};
  const int lane = index.next(group), kx = index.next(w + 1) - 1, ky = index.next(h + 1) - 1, in = int(index.rest);
  const float inverse_h = inverse_of(h), inverse_w = inverse_of(w);
  const float rows[2][2] = {{odd_first(ky, h, inverse_h), odd_second(ky, h, inverse_h)},
                            {even_first(ky, h, inverse_h), even_second(ky, h, inverse_h)}};
  const float columns[2][2] = {{odd_first(kx, w, inverse_w), odd_second(kx, w, inverse_w)},
                               {even_first(kx, w, inverse_w), even_second(kx, w, inverse_w)}};
  float sum[2][2] = {};
  for (int ic = lane * V; active && ic < c; ic += group * V) {
    float y[2][2][V];
#pragma unroll
    for (int r = 0; r < 2; ++r)
#pragma unroll
      for (int s = 0; s < 2; ++s) load<V>(at<T>(a.b, in, ic, clamp(ky + r, h)) + clamp(kx + s, w) * a.b.w, y[r][s]);
    float shift[V] = {};
    if (a.shift)
#pragma unroll
      for (int i = 0; i < V; ++i) shift[i] = a.shift[int64_t(in) * c + ic + i];
#pragma unroll
    for (int r = 0; r < 2; ++r)
#pragma unroll
      for (int s = 0; s < 2; ++s) {
        const int oy = 2 * ky + 1 + r, ox = 2 * kx + 1 + s;
        if (oy < 0 || oy >= 2 * h || ox < 0 || ox >= 2 * w) continue;
        float dout[V];
        load<V>(at<T>(a.a, in, ic, oy) + ox * a.a.w, dout);
#pragma unroll
        for (int i = 0; i < V; ++i)
          sum[r][s] += (dout[i] + shift[i]) * interpolate(y[0][0][i], y[0][1][i], y[1][0][i], y[1][1][i], rows[r][0],
                                                          rows[r][1], columns[s][0], columns[s][1]);
      }
  }
#pragma unroll
  for (int r = 0; r < 2; ++r)
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      const float total = sum_of_group(sum[r][s], group);
      const int oy = 2 * ky + 1 + r, ox = 2 * kx + 1 + s;
      if (!active || lane != 0 || oy < 0 || oy >= 2 * h || ox < 0 || ox >= 2 * w) continue;
      at<T>(a.out, in, 0, oy)[ox * a.out.w] = from_float<T>(total);
    }
}

// affine and dot, over two rows of 2 * TILE columns; V channels.
template <typename T, int V, bool WRITES>
__global__ void __launch_bounds__(THREADS) channels_channels_last(const Arguments a, unsigned items) {
  if (flat_index() >= items) return;
  const int c = int(a.shape.c), h = int(a.shape.h), w = int(a.shape.w), tiles = int(column_tiles(w));
  Index index{flat_index()};
  const int ic = index.next(c / V) * V, tile = index.next(tiles), pair = index.next(h / 2 + 1), in = int(index.rest);
  float scale[V], shift[V], sum[V] = {};
#pragma unroll
  for (int i = 0; i < V; ++i) {
    scale[i] = a.scale ? a.scale[int64_t(in) * c + ic + i] : 1.0f;
    shift[i] = a.shift ? a.shift[int64_t(in) * c + ic + i] : 0.0f;
  }
  const int first = tile * 2 * int(TILE), last = min(first + 2 * int(TILE), w);
  for (int iy = max(2 * pair - 1, 0); iy <= min(2 * pair, h - 1); ++iy) {
    const T* x = at<T>(a.a, in, ic, iy);
#pragma unroll 4
    for (int ix = first; ix < last; ++ix) {
      float value[V];
      load<V>(x + ix * a.a.w, value);
      if constexpr (WRITES) {
#pragma unroll
        for (int i = 0; i < V; ++i) value[i] = value[i] * scale[i] + shift[i];
        store<V>(value, at<T>(a.out, in, ic, iy) + ix * a.out.w);
      } else if (a.b.data) {
        float other[V];
        load<V>(at<T>(a.b, in, ic, iy) + ix * a.b.w, other);
#pragma unroll
        for (int i = 0; i < V; ++i) value[i] *= other[i];
      }
#pragma unroll
      for (int i = 0; i < V; ++i) sum[i] += value[i];
    }
  }
  if (a.sums) {
    float* sums = sums_at(a, in, int64_t(h / 2 + 1) * tiles, pair * tiles + tile, ic);
#pragma unroll
    for (int i = 0; i < V; ++i) sums[i] = sum[i];
  }
}

// Over two rows of 2 * TILE columns; V channels.
template <typename T, int V, Pass P>
__global__ void __launch_bounds__(THREADS) pass_channels_last(const Arguments a, unsigned items) {
  if (flat_index() >= items) return;
  const int c = int(a.shape.c), h = int(a.shape.h), w = int(a.shape.w), tiles = int(column_tiles(w));
  Index index{flat_index()};
  const int ic = index.next(c / V) * V, tile = index.next(tiles), pair = index.next(h / 2 + 1), in = int(index.rest);
  const Coefficients<V> coefficients(a, int64_t(in) * c + ic);
  float first_sum[V] = {}, second_sum[V] = {};
  const int first = tile * 2 * int(TILE), last = min(first + 2 * int(TILE), w);
  for (int iy = max(2 * pair - 1, 0); iy <= min(2 * pair, h - 1); ++iy) {
#pragma unroll 1  // more would spill at the registers that ptxas allows some of these
    for (int ix = first; ix < last; ++ix) {
      float value[V], b[V] = {}, x[V] = {};
      load<V>(at<T>(a.a, in, ic, iy) + ix * a.a.w, value);
      if (P != Pass::moments && a.b.data) load<V>(at<T>(a.b, in, ic, iy) + ix * a.b.w, b);
      if constexpr (READS_X<P>) load<V>(at<T>(a.gate, in, ic, iy) + ix * a.gate.w, x);
#pragma unroll
      for (int i = 0; i < V; ++i) {
        value[i] = passed<P>(value[i], b[i], a.b.data, x[i], coefficients.scale[i], coefficients.shift[i],
                             coefficients.slope[i]);
        first_sum[i] += value[i];
        second_sum[i] += value[i] * (READS_X<P> ? x[i] - coefficients.shift[i] : value[i]);
      }
      if (writes<P>(a)) store<V>(value, at<T>(a.out, in, ic, iy) + ix * a.out.w);
    }
  }
  if constexpr (SUMS<P>) {
    float* sums = sums_at(a, in, int64_t(h / 2 + 1) * tiles, pair * tiles + tile, ic);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      sums[i] = first_sum[i];
      sums[c + i] = second_sum[i];
    }
  }
}

}  // namespace cuda
}  // namespace scoat
