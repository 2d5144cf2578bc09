// The 3x3 convolutions of the inference engine on Hopper's tensor cores, in bfloat16, float16 and float8: see
// hopper.cu.
#pragma once

#include "numbers.h"

namespace scoat {
namespace hopper {

// torch.float8_e4m3fn: no infinities, and 448 is the largest.
struct E4M3 {
  uint8_t bits;
};

// What maps and the last features are in, where features are T.
template <typename T>
struct Wider {
  using Type = T;
};
template <>
struct Wider<E4M3> {
  using Type = BFloat;
};

// Channels of features [N, H, W, C] in memory: their address, and the steps from slice to slice, row to row and pixel
// to pixel in elements. Absent where data is null.
struct Features {
  void* data;
  int64_t n, h, w, channels;
};

// A matrix of weights as `Form` lays it out, for each slice `step` bytes after the one before (0: the same for all),
// and the bias of its output channels; both divided by a unit, which is 1 but for E4M3. Absent where weights are null.
struct Weights {
  const void* weights;
  int64_t step;
  const float* bias;
  float unit;
};

constexpr int SOURCES = 2;

// out = relu(3x3 convolution of the sources, one after the other, + bias), with zero padding. The last source, `below`,
// has half the height and width and becomes (1 + attention) * up(below), bilinear with aligned corners, on its way into
// the tile; only with a shortcut. `taps` are the products of out with the nine taps of a head, and it is not stored
// then; only without a shortcut.
struct Convolution {
  bool planes;  // how pixels lie in shared memory, of BFloat alone: see `Form`
  bool wide;    // of E4M3 alone: the last result, of the shortcut where there is one, is BFloat
  int64_t n, h, w;
  Features sources[SOURCES], below;
  const void* attention;  // [N, H, W] of Wider, or null: zeros
  Weights weights;
  int channels;  // of out
  Features out;
  bool relu;
  Features residual;  // of the same dtype, is added before the ReLU
  bool after;         // or after it
  Features pooled;    // the maxima of 2x2 pixels of out
  float* sums;        // of out over what a warpgroup has of each tile: [N, tiles * GROUPS, sum_channels]; or null
  int64_t sum_channels;
  Weights shortcut;  // a 1x1 convolution of the sources into shortcut_out
  Features shortcut_out;
  bool shortcut_relu;
  Features taps;            // of Wider, TAPS channels
  const void* tap_weights;  // [channels / 16, 2, 32, 4] of Wider: what each thread of a warp has of them
};

constexpr int WIDTH = 64;          // pixels of a tile, which are the rows of a matrix product
constexpr int GROUPS = 2;          // warpgroups that multiply
constexpr int TAPS = 10;           // of a head for one class, and one of zeros, so that they are pairs
constexpr int ACCUMULATORS = 128;  // registers of a thread

// How a kernel cuts its work.
struct Cut {
  int outputs;        // channels of a block of the result: more are computed block by block
  int height, width;  // pixels of a tile
  int depth;          // channels of a source that are multiplied at once: zeros fill up what a source has less
  int slots;          // vertical taps of a slice of the weights, those that are zero included
  int zeros;          // of which so many come first, and as many last

  // Rows of a warpgroup, and those of them that share a matrix product: two where one would leave the tensor cores
  // waiting for shared memory.
  constexpr int rows() const { return height / GROUPS; }
  constexpr int joined() const { return zeros + 1; }
};

// For numbers of `size` bytes: a product takes 32 bytes of channels.
constexpr bool has_kernel(int64_t channels, int size) {
  return (channels == 16 && size == 2) || channels == 32 || (channels > 0 && channels % 64 == 0);
}

// Whether the kernel for `channels` outputs has one that gives taps in its place: for more there are no registers.
constexpr bool has_taps(int64_t channels) { return channels <= 64; }

// A shortcut's sums leave room for half as many others. So its blocks are narrow, and of more pixels: each of a tile's
// weights comes from the L2 cache, and would be too rarely used.
constexpr Cut cut_of(int channels, bool shortcut) {
  const int outputs = channels < 64 ? channels : channels % 128 == 0 && !shortcut ? 128 : 64;
  const int most = 2 * ACCUMULATORS / outputs / (shortcut ? 2 : 1), zeros = outputs <= 32 ? 1 : 0;
  return {outputs, GROUPS * (most < 8 ? most : 8), WIDTH, outputs == 16 ? 16 : 32, 3 + 2 * zeros, zeros};
}

// out = weights * scale for each of n slices: `vectors` of as many numbers as fill 16 bytes, which lie as `Form` lays
// them out, `inner` side by side and `taps` of those for each of `chunks` of channels, which has `pieces` of 16 bytes.
struct Scaling {
  int64_t n;
  const float* weights;
  int64_t vectors, inner, taps, pieces, chunks;
  const float* scale;
  int64_t scale_step;  // from slice to slice
  void* out;
  int64_t out_step;
};

constexpr int SUMMED = 256;  // pixels of a part

constexpr bool has_gate_sums(int64_t channels) { return channels % 8 == 0 && channels <= 8 * SUMMED; }

// sums [N, parts, sum_channels] = the sums of (1 + attention) * up(below) over all of its pixels, in parts of SUMMED of
// the pixels of `below`: as those of below times what up gives each of its pixels to, nothing is upsampled.
struct GateSums {
  int64_t n, h, w;  // of below
  Features below;
  const void* attention;  // [N, 2 H, 2 W] of Wider
  float* sums;
  int64_t sum_channels;
};

// logits [N, H, W] = the bias and what each tap gives the pixel beside it, or mask: where that exceeds the threshold.
struct TapSums {
  int64_t n, h, w;
  const void* taps;  // [N, H, W, TAPS] of Wider
  const float *bias, *threshold;
  float* logits;
  uint8_t* mask;  // or null
};

// Each returns a cudaError_t, 0 where the launch went well. T is Half, BFloat or E4M3: hopper.cu is compiled for each.
template <typename T>
int convolve(const Convolution&, void* stream);
template <typename T>
int scale(const Scaling&, void* stream);
template <typename T>
int gate_sums(const GateSums&, void* stream);
template <typename T>
int tap_sums(const TapSums&, void* stream);

// Why this build cannot run on the current device, or an empty string.
template <typename T>
const char* why_not();

}  // namespace hopper
}  // namespace scoat
