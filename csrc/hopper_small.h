// The small kernels around the convolutions: weights of each slice, sums of what nobody stores, and the head's end.
#pragma once

#include "hopper_form.h"
#include "resample.h"

namespace scoat {
namespace hopper {

constexpr int SCALING_THREADS = 256, SUMMED_ROWS = 8;

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

}  // namespace hopper
}  // namespace scoat
