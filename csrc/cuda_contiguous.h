// The kernels for tensors of which neighbouring columns lie side by side.
#pragma once

#include "cuda_common.h"

namespace scoat {
namespace cuda {

// The columns of inputs, and their weights, of V outputs from V * j on: outputs 2m and 2m + 1 lie after inputs m - 1
// and m, of which `local` counts from V / 2 * j - 1 on.
template <int V>
struct Columns {
  float first[V], second[V];

  __device__ __forceinline__ Columns(int j, int w, float inverse) {
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const int k = V / 2 * j + i / 2 - (i % 2 == 0);
      first[i] = i % 2 ? odd_first(k, w, inverse) : even_first(k, w, inverse);
      second[i] = i % 2 ? odd_second(k, w, inverse) : even_second(k, w, inverse);
    }
  }

  static __device__ __forceinline__ constexpr int local(int i) { return i / 2 + i % 2; }
};

// The blend of two rows at the V / 2 + 2 columns of inputs around V outputs.
template <int V, typename T>
__device__ __forceinline__ void blend_rows(const T* y0, const T* y1, const float (&row)[2], int j, int w,
                                           float (&to)[V / 2 + 2]) {
#pragma unroll
  for (int i = 0; i < V / 2 + 2; ++i) {
    const int column = clamp(V / 2 * j - 1 + i, w);
    to[i] = row[0] * to_float(y0[column]) + row[1] * to_float(y1[column]);
  }
}

// Threads along a row of `width` outputs: whole tiles of sums, so that a tile's threads are neighbours.
template <int V>
__host__ __device__ __forceinline__ int threads_of_row(int64_t width) {
  return int(column_tiles(width) * (2 * TILE / V));
}

template <typename T, bool WHOLE>
__global__ void __launch_bounds__(THREADS) up_forward_contiguous(const Arguments a, unsigned items) {
  constexpr int V = LANES<T>, GROUP = int(2 * TILE) / V;
  const bool active = flat_index() < items;
  const int c = int(a.shape.c), h = int(a.shape.h), w = int(a.shape.w), across = threads_of_row<V>(2 * w);
  Index index{active ? flat_index() : 0};
  const int j = index.next(across), ky = index.next(h + 1) - 1, ic = index.next(c), in = int(index.rest);
  const float inverse = inverse_of(h);
  float sum = 0;
  if (active && V * j < 2 * w) {
    const Columns<V> columns(j, w, inverse_of(w));
    const T *y0 = at<T>(a.a, in, ic, clamp(ky, h)), *y1 = at<T>(a.a, in, ic, clamp(ky + 1, h));
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int oy = 2 * ky + 1 + r;
      if (oy < 0 || oy >= 2 * h) continue;
      const float row[2] = {r ? even_first(ky, h, inverse) : odd_first(ky, h, inverse),
                            r ? even_second(ky, h, inverse) : odd_second(ky, h, inverse)};
      float y[V / 2 + 2], out[V], gate[V] = {};
      blend_rows<V>(y0, y1, row, j, w, y);
      if (a.gate.data) load_columns<V, WHOLE>(at<T>(a.gate, in, 0, oy), V * j, 2 * w, gate);
#pragma unroll
      for (int i = 0; i < V; ++i) {
        const int k = Columns<V>::local(i);
        out[i] = (1.0f + gate[i]) * (columns.first[i] * y[k] + columns.second[i] * y[k + 1]);
        sum += WHOLE || V * j + i < 2 * w ? out[i] : 0.0f;
      }
      store_columns<V, WHOLE>(out, V * j, 2 * w, at<T>(a.out, in, ic, oy));
    }
  }
  if (!a.sums) return;
  sum = sum_of_group(sum, GROUP);
  const int tiles = across / GROUP;
  if (active && j % GROUP == 0) *sums_at(a, in, int64_t(h + 1) * tiles, (ky + 1) * tiles + j / GROUP, ic) = sum;
}

template <typename T, bool WHOLE>
__global__ void __launch_bounds__(THREADS) up_backward_contiguous(const Arguments a, unsigned items) {
  constexpr int V = LANES<T>, U = V / 2;
  if (flat_index() >= items) return;
  const int c = int(a.shape.c), h = int(a.shape.h), w = int(a.shape.w);
  Index index{flat_index()};
  const int j = index.next((w + U - 1) / U), ky = index.next(h), ic = index.next(c), in = int(index.rest);
  const Targets rows = targets_of(ky, h, inverse_of(h));
  const float shift = a.shift ? a.shift[int64_t(in) * c + ic] : 0.0f, inverse_w = inverse_of(w);
  float column[V + 2] = {};  // sums down the columns of outputs V * j - 1 to V * j + V
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    const int oy = 2 * ky - 1 + r;
    if (oy < 0 || oy >= 2 * h) continue;
    const T* dout = at<T>(a.a, in, ic, oy);
    const T* gate = a.gate.data ? at<T>(a.gate, in, 0, oy) : nullptr;
    float middle[V], factor[V] = {};
    load_columns<V, WHOLE>(dout, V * j, 2 * w, middle);
    if (gate) load_columns<V, WHOLE>(gate, V * j, 2 * w, factor);
#pragma unroll
    for (int i = 0; i < V; ++i) column[i + 1] += rows.weight[r] * (1.0f + factor[i]) * (middle[i] + shift);
    const int before = V * j - 1, after = V * j + V;
    if (before >= 0)
      column[0] += rows.weight[r] * (gate ? 1.0f + to_float(gate[before]) : 1.0f) * (to_float(dout[before]) + shift);
    if (after < 2 * w)
      column[V + 1] += rows.weight[r] * (gate ? 1.0f + to_float(gate[after]) : 1.0f) * (to_float(dout[after]) + shift);
  }
  float dy[U];
#pragma unroll
  for (int i = 0; i < U; ++i) {
    const Targets weights = targets_of(U * j + i, w, inverse_w);  // zero for outputs that do not exist
    dy[i] = 0;
#pragma unroll
    for (int t = 0; t < 4; ++t) dy[i] += weights.weight[t] * column[2 * i + t];
  }
  store_columns<U, WHOLE>(dy, U * j, w, at<T>(a.out, in, ic, ky));
}

// Blocks of 32 x CHANNEL_GROUPS threads: V columns of two rows of outputs each, and a part of the channels.
template <typename T, bool WHOLE>
__global__ void __launch_bounds__(32 * CHANNEL_GROUPS) gate_backward_contiguous(const Arguments a, unsigned items) {
  constexpr int V = LANES<T>;
  __shared__ float partial[CHANNEL_GROUPS][2 * V][32];
  const int c = int(a.shape.c), h = int(a.shape.h), w = int(a.shape.w);
  const unsigned item = blockIdx.x * 32 + threadIdx.x;
  const bool active = item < items;
  Index index{active ? item : 0};
  const int j = index.next((2 * w + V - 1) / V), ky = index.next(h + 1) - 1, in = int(index.rest);
  const float inverse = inverse_of(h);
  const Columns<V> columns(j, w, inverse_of(w));
  float sum[2][V] = {};
  for (int ic = threadIdx.y; active && ic < c; ic += CHANNEL_GROUPS) {
    const T *y0 = at<T>(a.b, in, ic, clamp(ky, h)), *y1 = at<T>(a.b, in, ic, clamp(ky + 1, h));
    const float shift = a.shift ? a.shift[int64_t(in) * c + ic] : 0.0f;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int oy = 2 * ky + 1 + r;
      if (oy < 0 || oy >= 2 * h) continue;
      const float row[2] = {r ? even_first(ky, h, inverse) : odd_first(ky, h, inverse),
                            r ? even_second(ky, h, inverse) : odd_second(ky, h, inverse)};
      float y[V / 2 + 2], dout[V];
      blend_rows<V>(y0, y1, row, j, w, y);
      load_columns<V, WHOLE>(at<T>(a.a, in, ic, oy), V * j, 2 * w, dout);
#pragma unroll
      for (int i = 0; i < V; ++i) {
        const int k = Columns<V>::local(i);
        sum[r][i] += (dout[i] + shift) * (columns.first[i] * y[k] + columns.second[i] * y[k + 1]);
      }
    }
  }
#pragma unroll
  for (int r = 0; r < 2; ++r)
#pragma unroll
    for (int i = 0; i < V; ++i) partial[threadIdx.y][r * V + i][threadIdx.x] = sum[r][i];
  __syncthreads();
  if (!active || threadIdx.y > 1) return;
  const int oy = 2 * ky + 1 + int(threadIdx.y);  // the first two rows of threads write a row of outputs each
  if (oy < 0 || oy >= 2 * h) return;
  float total[V] = {};
#pragma unroll
  for (int i = 0; i < V; ++i)
    for (int group = 0; group < CHANNEL_GROUPS; ++group) total[i] += partial[group][threadIdx.y * V + i][threadIdx.x];
  store_columns<V, WHOLE>(total, V * j, 2 * w, at<T>(a.out, in, 0, oy));
}

// affine and dot, over V columns of two rows.
template <typename T, bool WHOLE, bool WRITES>
__global__ void __launch_bounds__(THREADS) channels_contiguous(const Arguments a, unsigned items) {
  constexpr int V = LANES<T>, GROUP = int(2 * TILE) / V;
  const bool active = flat_index() < items;
  const int c = int(a.shape.c), h = int(a.shape.h), w = int(a.shape.w), across = threads_of_row<V>(w);
  Index index{active ? flat_index() : 0};
  const int j = index.next(across), pair = index.next(h / 2 + 1), ic = index.next(c), in = int(index.rest);
  float sum = 0;
  if (active && V * j < w) {
    const float scale = a.scale ? a.scale[int64_t(in) * c + ic] : 1.0f;
    const float shift = a.shift ? a.shift[int64_t(in) * c + ic] : 0.0f;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int iy = 2 * pair - 1 + r;
      if (iy < 0 || iy >= h) continue;
      float value[V];
      load_columns<V, WHOLE>(at<T>(a.a, in, ic, iy), V * j, w, value);
      if constexpr (WRITES) {
#pragma unroll
        for (int i = 0; i < V; ++i) value[i] = value[i] * scale + shift;
        store_columns<V, WHOLE>(value, V * j, w, at<T>(a.out, in, ic, iy));
      } else if (a.b.data) {
        float other[V];
        load_columns<V, WHOLE>(at<T>(a.b, in, ic, iy), V * j, w, other);
#pragma unroll
        for (int i = 0; i < V; ++i) value[i] *= other[i];
      }
#pragma unroll
      for (int i = 0; i < V; ++i) sum += WHOLE || V * j + i < w ? value[i] : 0.0f;
    }
  }
  if (!a.sums) return;
  sum = sum_of_group(sum, GROUP);
  const int tiles = across / GROUP;
  if (active && j % GROUP == 0) *sums_at(a, in, int64_t(h / 2 + 1) * tiles, pair * tiles + j / GROUP, ic) = sum;
}

// The passes of a normalisation, over V columns of two rows.
template <typename T, bool WHOLE, Pass P>
__global__ void __launch_bounds__(THREADS) pass_contiguous(const Arguments a, unsigned items) {
  constexpr int V = LANES<T>, GROUP = int(2 * TILE) / V;
  const bool active = flat_index() < items;
  const int c = int(a.shape.c), h = int(a.shape.h), w = int(a.shape.w), across = threads_of_row<V>(w);
  Index index{active ? flat_index() : 0};
  const int j = index.next(across), pair = index.next(h / 2 + 1), ic = index.next(c), in = int(index.rest);
  float first_sum = 0, second_sum = 0;
  if (active && V * j < w) {
    const Coefficients<1> k(a, int64_t(in) * c + ic);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int iy = 2 * pair - 1 + r;
      if (iy < 0 || iy >= h) continue;
      float value[V], b[V] = {}, x[V] = {};
      load_columns<V, WHOLE>(at<T>(a.a, in, ic, iy), V * j, w, value);
      if (P != Pass::moments && a.b.data) load_columns<V, WHOLE>(at<T>(a.b, in, ic, iy), V * j, w, b);
      if constexpr (READS_X<P>) load_columns<V, WHOLE>(at<T>(a.gate, in, ic, iy), V * j, w, x);
#pragma unroll
      for (int i = 0; i < V; ++i) {
        value[i] = passed<P>(value[i], b[i], a.b.data, x[i], k.scale[0], k.shift[0], k.slope[0]);
        if (WHOLE || V * j + i < w) {
          first_sum += value[i];
          second_sum += value[i] * (READS_X<P> ? x[i] - k.shift[0] : value[i]);
        }
      }
      if (writes<P>(a)) store_columns<V, WHOLE>(value, V * j, w, at<T>(a.out, in, ic, iy));
    }
  }
  if constexpr (SUMS<P>) {
    first_sum = sum_of_group(first_sum, GROUP);
    second_sum = sum_of_group(second_sum, GROUP);
    const int tiles = across / GROUP;
    if (active && j % GROUP == 0) {
      float* sums = sums_at(a, in, int64_t(h / 2 + 1) * tiles, pair * tiles + j / GROUP, ic);
      sums[0] = first_sum;
      sums[c] = second_sum;
    }
  }
}

}  // namespace cuda
}  // namespace scoat
