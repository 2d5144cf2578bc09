// What the kernels of both layouts share: vectors of 16 bytes, indices, sums, and the passes of a normalisation.
#pragma once

#include <cuda_runtime.h>

#include "kernels.h"
#include "resample.h"

namespace scoat {
namespace cuda {

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

}  // namespace cuda
}  // namespace scoat
