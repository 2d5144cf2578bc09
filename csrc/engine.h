// What the inference engine runs on a CPU, and training for the weights, in float32. Features are [N, H, W, C] with a
// channel step of 1.
#pragma once

#include <cstdint>

namespace scoat {

// A slice of channels of features in memory, with its steps in elements. Absent where data is null.
struct Features {
  float* data;
  int64_t n, h, w, channels;
};

// Weights [out, in] as panels: [points][ceil(out / panel)][in][panel], zero where there is no output channel; the bias
// is as long as all panels of a point.
struct Panels {
  const float* weights;
  const float* bias;
};

constexpr int SOURCES = 2;

// A 3x3 convolution with zero padding, by the Winograd algorithm F(4x4, 3x3): see engine_cpu.cpp. A work item is a run
// of `tiles` tiles of 4x4 pixels; it leaves its own part of the sums.
struct Convolution {
  int64_t n, h, w, tiles;
  Features sources[SOURCES];
  const float* scale;  // [N, channels of all sources], or null
  Panels panels;
  Features out;
  bool relu, residual_before, residual_after;  // residual: what out holds is added, before or after the ReLU
  Features pooled;
  float* sums;  // [N, parts, sum_channels], or null
  int64_t sum_channels;
  Panels shortcut;  // a 1x1 convolution of the sources into shortcut_out; absent where its weights are null
  Features shortcut_out;
  bool shortcut_relu, shortcut_scaled;
};

// A 1x1 convolution.
struct Projection {
  int64_t n, h, w;
  Features source;
  Panels panels;
  Features out;
};

// map = sigmoid(bias + sum over channels of psi * relu(W_x row + up(below))); with `each`, ReLU of either term.
struct Attention {
  int64_t n, h, w;  // of the map
  Features row, below;
  Panels panels;
  const float* psi;
  float bias;
  bool each;
  float* map;  // [N, H, W]
};

// A 3x3 convolution to logits [N, K, H, W], or to a mask where a logit exceeds the threshold.
struct Output {
  int64_t n, h, w, tiles;
  Features source;
  int64_t classes;
  Panels panels;
  float* logits;
  uint8_t* mask;
  const float* threshold;
};

// For training: the gradient of the weights of a 3x3 convolution with zero padding, by the adjoint of the same
// algorithm. At each of 36 points, products of inputs and gradients are summed over parts of the tiles, those of all
// slices one after the other: sums is room for [parts][36][channels of source][channels of gradient].
struct WeightGradient {
  int64_t n, h, w, tiles, parts;  // `tiles` are transformed at once
  Features source, gradient;
  float *sums, *out;  // out [3][3][channels of source][channels of gradient]
};

#define SCOAT_STEPS(apply)                                                                               \
  apply(convolve, Convolution) apply(project, Projection) apply(attend, Attention) apply(output, Output) \
      apply(weight_gradient, WeightGradient)

namespace cpu {
#define SCOAT_DECLARE_STEP(name, Step) void name(const Step&, int threads);
SCOAT_STEPS(SCOAT_DECLARE_STEP)
#undef SCOAT_DECLARE_STEP

// Output channels of a panel.
int64_t panel();
}  // namespace cpu
}  // namespace scoat
