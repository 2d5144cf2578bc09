// The kernels in CUDA. A thread holds 16 bytes of each tensor: channels in channels-last, else columns; where sizes,
// steps or addresses do not allow that it holds one element (channels-last) or reads them one by one (columns).
#include <cuda_runtime.h>

#include <string>

#include "kernels.h"
#include "resample.h"

namespace scoat {
namespace cuda {
namespace {

constexpr int THREADS = 256;
constexpr int BACKWARD_TILE = 8;   // inputs along a row that a thread of the backward pass gathers
constexpr int CHANNEL_GROUPS = 8;  // parts of the channels that threads of a block sum side by side
constexpr unsigned ALL = 0xffffffffu;

template <typename T>
constexpr int LANES = 16 / sizeof(T);

template <typename T, int V>
struct alignas(V * sizeof(T)) Vector {
  T values[V];
};

template <int V, typename T>
__device__ __forceinline__ void load(const T* from, float (&to)[V]) {
  const auto vector = *reinterpret_cast<const Vector<T, V>*>(from);
#pragma unroll
  for (int i = 0; i < V; ++i) to[i] = to_float(vector.values[i]);
}

template <int V, typename T>
__device__ __forceinline__ void store(const float (&from)[V], T* to) {
  Vector<T, V> vector;
#pragma unroll
  for (int i = 0; i < V; ++i) vector.values[i] = from_float<T>(from[i]);
#ifdef __CUDA_ARCH__
  if constexpr (sizeof(vector) == 16) {  // left to itself, the compiler makes single stores of some of these
    uint32_t bits[4];
    memcpy(bits, &vector, sizeof bits);
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)), "r"(bits[0]),
                 "r"(bits[1]), "r"(bits[2]), "r"(bits[3])
                 : "memory");
    return;
  }
#endif
  *reinterpret_cast<Vector<T, V>*>(to) = vector;
}

// V columns from `first` on of a row of `width`; zeros past its end.
template <int V, bool WHOLE, typename T>
__device__ __forceinline__ void load_columns(const T* row, int first, int width, float (&to)[V]) {
  if constexpr (WHOLE) {
    load<V>(row + first, to);
  } else {
#pragma unroll
    for (int i = 0; i < V; ++i) to[i] = first + i < width ? to_float(row[first + i]) : 0.0f;
  }
}

template <int V, bool WHOLE, typename T>
__device__ __forceinline__ void store_columns(const float (&from)[V], int first, int width, T* row) {
  if constexpr (WHOLE) {
    store<V>(from, row + first);
  } else {
#pragma unroll
    for (int i = 0; i < V; ++i)
      if (first + i < width) row[first + i] = from_float<T>(from[i]);
  }
}

template <typename T>
__device__ __forceinline__ T* at(const View& view, int64_t n, int64_t c, int64_t h) {
  return static_cast<T*>(view.data) + n * view.n + c * view.c + h * view.h;
}

__device__ __forceinline__ int clamp(int value, int size) { return min(max(value, 0), size - 1); }

__device__ __forceinline__ float* sums_at(const Arguments& a, int n, int64_t tiles, int tile, int c) {
  return a.sums + (n * tiles + tile) * a.sum_channels + c;
}

// Digits of a flat index, the fastest first.
struct Index {
  unsigned rest;
  __device__ __forceinline__ int next(int size) {
    const unsigned digit = rest % unsigned(size);
    rest /= unsigned(size);
    return int(digit);
  }
};

__device__ __forceinline__ unsigned flat_index() { return blockIdx.x * blockDim.x + threadIdx.x; }

// Sums over groups of `size` neighbouring threads, a power of two up to 32; all threads of the warp take part.
__device__ __forceinline__ float sum_of_group(float value, int size) {
  for (int step = size / 2; step > 0; step /= 2) value += __shfl_xor_sync(ALL, value, step);
  return value;
}

// ---------------------------------------------------------------------------------------------- channels-last

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

// The passes of a normalisation; what may be lacking is so for all threads alike.
enum class Pass { moments, norm, norm_sums, norm_backward };

template <Pass P>
constexpr bool SUMS = P == Pass::moments || P == Pass::norm_sums;
template <Pass P>
constexpr bool READS_X = P == Pass::norm_sums || P == Pass::norm_backward;

// Where this is known to the compiler, it stores whole vectors.
template <Pass P>
__device__ __forceinline__ bool writes(const Arguments& a) {
  return P == Pass::norm_sums ? a.out.data != nullptr : P != Pass::moments;
}

template <int V>
struct Coefficients {
  float scale[V], shift[V], slope[V];

  __device__ __forceinline__ Coefficients(const Arguments& a, int64_t first) {
#pragma unroll
    for (int i = 0; i < V; ++i) {
      scale[i] = a.scale ? a.scale[first + i] : 1.0f;
      shift[i] = a.shift ? a.shift[first + i] : 0.0f;
      slope[i] = a.slope ? a.slope[first + i] : 0.0f;
    }
  }
};

// What a pass makes of an element, and what it adds to the second sum.
template <Pass P>
__device__ __forceinline__ float passed(float a, float b, bool has_b, float x, float scale, float shift, float slope) {
  if constexpr (P == Pass::moments) return a - shift;
  if constexpr (P == Pass::norm) return relu(a * scale + shift + b);
  const float g = has_b && b <= 0.0f ? 0.0f : a;
  return P == Pass::norm_sums ? g : g * scale + x * slope + shift;
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

// ------------------------------------------------------------------------------------------------- contiguous

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

// --------------------------------------------------------------------------------------------------- launching

// Whether a tensor can be read 16 bytes at a time: its address and all its steps but the dense one.
bool in_vectors(const View& view, int lanes, int64_t element, bool channels_last) {
  if (!view.data) return true;
  const int64_t steps = view.n | view.h | (channels_last ? view.w : view.c);
  return steps % lanes == 0 && reinterpret_cast<uintptr_t>(view.data) % (lanes * element) == 0;
}

// A map of one channel has no channels to step over.
View without_channels(View map) {
  map.c = 0;
  return map;
}

template <typename T>
bool channels_in_vectors(const Arguments& a, bool out_is_map) {
  const bool out = out_is_map || in_vectors(a.out, LANES<T>, sizeof(T), true);
  return a.shape.c % LANES<T> == 0 && in_vectors(a.a, LANES<T>, sizeof(T), true) &&
         in_vectors(a.b, LANES<T>, sizeof(T), true) && out;
}

// `a` and `out` of up_forward are read by columns of other sizes: `columns` are those of the high resolution.
template <typename T>
bool columns_in_vectors(const Arguments& a, const View& first, const View& second, int64_t columns) {
  return columns % LANES<T> == 0 && in_vectors(first, LANES<T>, sizeof(T), false) &&
         in_vectors(second, LANES<T>, sizeof(T), false) &&
         in_vectors(without_channels(a.gate), LANES<T>, sizeof(T), false);
}

template <typename Kernel, typename... More>
int launch(Kernel kernel, const Arguments& a, int64_t items, int64_t per_block, dim3 block, void* stream,
           More... more) {
  const int64_t blocks = (items + per_block - 1) / per_block;
  if (items + THREADS > int64_t(0xffffffffu) || blocks > int64_t(0x7fffffff)) return cudaErrorInvalidConfiguration;
  if (blocks == 0) return cudaSuccess;
#ifdef SCOAT_EMULATED
  emulated::run(unsigned(blocks), block, [&] { kernel(a, unsigned(items), more...); });
#else
  // clang-format off: it takes these for shifts
  kernel<<<unsigned(blocks), block, 0, static_cast<cudaStream_t>(stream)>>>(a, unsigned(items), more...);
  // clang-format on
#endif
  return cudaGetLastError();
}

template <typename Kernel, typename... More>
int launch(Kernel kernel, const Arguments& a, int64_t items, void* stream, More... more) {
  return launch(kernel, a, items, THREADS, dim3(THREADS), stream, more...);
}

template <typename T>
int up_forward_of(const Arguments& a, void* stream) {
  constexpr int V = LANES<T>;
  const auto [n, c, h, w] = a.shape;
  if (a.channels_last) {
    const int64_t items = n * (h + 1) * column_tiles(2 * w) * c;
    if (channels_in_vectors<T>(a, false)) return launch(up_forward_channels_last<T, V>, a, items / V, stream);
    return launch(up_forward_channels_last<T, 1>, a, items, stream);
  }
  const int64_t items = n * c * (h + 1) * threads_of_row<V>(2 * w);
  if (columns_in_vectors<T>(a, a.out, {}, 2 * w)) return launch(up_forward_contiguous<T, true>, a, items, stream);
  return launch(up_forward_contiguous<T, false>, a, items, stream);
}

template <typename T>
int up_backward_of(const Arguments& a, void* stream) {
  constexpr int V = LANES<T>, U = V / 2;
  const auto [n, c, h, w] = a.shape;
  if (a.channels_last) {
    const int64_t items = n * h * ((w + BACKWARD_TILE - 1) / BACKWARD_TILE) * c;
    if (channels_in_vectors<T>(a, false)) return launch(up_backward_channels_last<T, V>, a, items / V, stream);
    return launch(up_backward_channels_last<T, 1>, a, items, stream);
  }
  const int64_t items = n * c * h * ((w + U - 1) / U);
  if (columns_in_vectors<T>(a, a.a, a.out, 2 * w)) return launch(up_backward_contiguous<T, true>, a, items, stream);
  return launch(up_backward_contiguous<T, false>, a, items, stream);
}

template <typename T>
int gate_backward_of(const Arguments& a, void* stream) {
  constexpr int V = LANES<T>;
  const auto [n, c, h, w] = a.shape;
  if (a.channels_last) {
    const bool vectors = channels_in_vectors<T>(a, true);
    const int64_t parts = vectors ? c / V : c;
    int group = 1;
    while (group < 32 && group < parts) group *= 2;
    const int64_t items = n * (h + 1) * (w + 1) * group;
    if (vectors) return launch(gate_backward_channels_last<T, V>, a, items, stream, group);
    return launch(gate_backward_channels_last<T, 1>, a, items, stream, group);
  }
  const int64_t items = n * (h + 1) * ((2 * w + V - 1) / V);
  const dim3 block(32, CHANNEL_GROUPS);
  if (columns_in_vectors<T>(a, a.a, without_channels(a.out), 2 * w))
    return launch(gate_backward_contiguous<T, true>, a, items, 32, block, stream);
  return launch(gate_backward_contiguous<T, false>, a, items, 32, block, stream);
}

template <typename T, bool WRITES>
int channels_of(const Arguments& a, void* stream) {
  constexpr int V = LANES<T>;
  const auto [n, c, h, w] = a.shape;
  if (a.channels_last) {
    const int64_t items = n * (h / 2 + 1) * column_tiles(w) * c;
    if (channels_in_vectors<T>(a, false)) return launch(channels_channels_last<T, V, WRITES>, a, items / V, stream);
    return launch(channels_channels_last<T, 1, WRITES>, a, items, stream);
  }
  const int64_t items = n * c * (h / 2 + 1) * threads_of_row<V>(w);
  if (columns_in_vectors<T>(a, a.a, WRITES ? a.out : a.b, w))
    return launch(channels_contiguous<T, true, WRITES>, a, items, stream);
  return launch(channels_contiguous<T, false, WRITES>, a, items, stream);
}

template <typename T>
int affine_of(const Arguments& a, void* stream) {
  return channels_of<T, true>(a, stream);
}

template <typename T>
int dot_of(const Arguments& a, void* stream) {
  return channels_of<T, false>(a, stream);
}

template <typename T, Pass P>
int pass_of(const Arguments& a, void* stream) {
  constexpr int V = LANES<T>;
  const auto [n, c, h, w] = a.shape;
  const auto vectors = [&](bool channels_last) {
    bool all = true;
    for (const View* view : {&a.a, &a.b, &a.gate, &a.out}) all = all && in_vectors(*view, V, sizeof(T), channels_last);
    return all;
  };
  if (a.channels_last) {
    const int64_t items = n * (h / 2 + 1) * column_tiles(w) * c;
    if (c % V == 0 && vectors(true)) return launch(pass_channels_last<T, V, P>, a, items / V, stream);
    return launch(pass_channels_last<T, 1, P>, a, items, stream);
  }
  const int64_t items = n * c * (h / 2 + 1) * threads_of_row<V>(w);
  if (w % V == 0 && vectors(false)) return launch(pass_contiguous<T, true, P>, a, items, stream);
  return launch(pass_contiguous<T, false, P>, a, items, stream);
}

#define SCOAT_PASS(name)                            \
  template <typename T>                             \
  int name##_of(const Arguments& a, void* stream) { \
    return pass_of<T, Pass::name>(a, stream);       \
  }
SCOAT_PASS(moments)
SCOAT_PASS(norm)
SCOAT_PASS(norm_sums)
SCOAT_PASS(norm_backward)
#undef SCOAT_PASS

}  // namespace

#define SCOAT_DEFINE(name)                     \
  int name(const Arguments& a, void* stream) { \
    switch (a.dtype) {                         \
      case DType::float32:                     \
        return name##_of<float>(a, stream);    \
      case DType::float16:                     \
        return name##_of<Half>(a, stream);     \
      case DType::bfloat16:                    \
        return name##_of<BFloat>(a, stream);   \
    }                                          \
    return cudaErrorInvalidValue;              \
  }
SCOAT_KERNELS(SCOAT_DEFINE)
#undef SCOAT_DEFINE

const char* error_name(int error) { return cudaGetErrorName(static_cast<cudaError_t>(error)); }

const char* why_not() {
  static thread_local std::string reason;
  int driver = 0;
  cudaError_t error = cudaDriverGetVersion(&driver);
  if (error == cudaSuccess && driver == 0) return "finds no NVIDIA driver";
  if (error == cudaSuccess && driver < CUDART_VERSION / 1000 * 1000) {
    reason = "needs a driver for CUDA " + std::to_string(CUDART_VERSION / 1000) + ", this one is for CUDA " +
             std::to_string(driver / 1000) + "." + std::to_string(driver % 1000 / 10);
    return reason.c_str();
  }
  cudaFuncAttributes attributes;
  if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, up_forward_contiguous<float, true>);
  if (error == cudaSuccess) return "";
  cudaGetLastError();  // of ours; the next call must not see it
  reason = std::string("cannot run on this GPU: ") + cudaGetErrorString(error);
  return reason.c_str();
}

}  // namespace cuda
}  // namespace scoat
