// What the inference engine runs on a CPU with AMX, the matrix registers of Xeon processors from Sapphire Rapids on, in
// bfloat16. Features are [N, H, W, C] with a channel step of 1.
#pragma once

#include <cstdint>

namespace scoat {
namespace amx {

// A slice of channels of features in memory, with its steps in elements. Absent where data is null.
struct Features {
  uint16_t* data;
  int64_t n, h, w, channels;
};

// What a convolution reads: the sources side by side. The second is at half the height and width where `below` is set,
// and is upsampled on the way in.
struct Inputs {
  int64_t n, h, w;
  Features sources[2];
  bool below;
};

// Weights as tiles (see amx.cpp), and a bias as long as all tiles.
struct Weights {
  const uint16_t* tiles;
  const float* bias;
};

// Weights in float32 that become each slice's own, multiplied by the scale of their input channels.
struct Scaling {
  const float* scale;     // [N, channels], or null: nothing is scaled
  const float* tiles;     // of the convolution
  const float* shortcut;  // of the shortcut, or null: it reads the sources as they are
  int64_t channels;
  uint16_t* scaled;  // room for both, [N, scaled_step]
  int64_t scaled_step;
};

// A convolution of size 3 with zero padding, or of size 1.
struct Convolution {
  Inputs inputs;
  int64_t size;
  Scaling scaling;
  Weights weights;
  Features out;
  bool relu, residual_before, residual_after;  // residual: what out holds is added, before or after the ReLU
  Features pooled;
  float* sums;  // [N, parts, sum_channels], or null
  int64_t sum_channels;
  Weights shortcut;  // a 1x1 convolution of the inputs into shortcut_out; absent where its bias is null
  Features shortcut_out;
  bool shortcut_relu;
};

// map = sigmoid(bias + sum over channels of psi * relu(W_x row + up(below))); with `each`, ReLU of either term.
struct Attention {
  Inputs row;
  Features below;
  Weights weights;
  const float* psi;  // as long as all tiles
  float bias;
  bool each;
  uint16_t* map;  // [N, H, W]
};

// A 3x3 convolution to logits [N, K, H, W], or to a mask where a logit exceeds the threshold.
struct Output {
  Inputs source;
  int64_t classes;
  Weights weights;
  float* logits;
  uint8_t* mask;
  const float* threshold;
};

// In how many parts a convolution leaves its sums over h x w pixels.
int64_t parts(int64_t h, int64_t w);

void convolve(const Convolution&, int threads);
void attend(const Attention&, int threads);
void output(const Output&, int threads);

}  // namespace amx
}  // namespace scoat
