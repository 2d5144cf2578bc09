// The nine kernels under the four operations, and what they take. No torch and no Python from here on.
#pragma once

#include "numbers.h"

namespace scoat {

// A tensor [N, C, H, W] in memory: where it starts, and the steps of its axes in elements. Absent where data is null.
struct View {
  void* data;
  int64_t n, c, h, w;
};

struct Shape {
  int64_t n, c, h, w;
};

// What a kernel reads and writes. In channels-last all views have a channel step of 1, else a column step of 1;
// maps of one channel have a column step of 1 in both.
struct Arguments {
  DType dtype;
  bool channels_last;
  Shape shape;  // of y in the first three kernels, of x in the others
  View a, b, gate, out;
  const float* scale;  // [N, C], or null
  const float* shift;  // [N, C], or null
  const float* slope;  // [N, C], or null
  float* sums;         // [N, tiles, sum_channels] from this operand's first channel on, or null
  int64_t sum_channels;
};

// up_forward:    out = (1 + gate) * up(a);           sums of out over each tile of pixels
// up_backward:   out = up^T((1 + gate) * (a + shift))
// gate_backward: out = sum over channels of (a + shift) * up(b)
// affine:        out = a * scale + shift;            sums of out over each tile of pixels
// dot:           sums of a * b (of a, without b) over each tile of pixels
//
// and of a normalisation with statistics of its own batch, where `gate` has the channels of a and g = b > 0 ? a : 0:
//
// moments:       sums of a - shift, and of its square
// norm:          out = relu(a * scale + shift + b)
// norm_sums:     out = g;                            sums of g, and of g * (gate - shift)
// norm_backward: out = g * scale + gate * slope + shift, with g = a where there is no b
//
// Of two sums, the second lies C channels after the first. norm may lack b, norm_sums may lack out.
//
// A missing gate counts as 0, a missing scale as 1, a missing shift as 0. Every sum of a tile is written by one
// thread in a fixed order, so that equal input gives equal bits.
#define SCOAT_KERNELS(apply)                                                                                    \
  apply(up_forward) apply(up_backward) apply(gate_backward) apply(affine) apply(dot) apply(moments) apply(norm) \
      apply(norm_sums) apply(norm_backward)

namespace cpu {
// Tiles of the sums over [H, W]: rows.
inline int64_t tiles(int64_t height, int64_t) { return height; }

#define SCOAT_DECLARE(name) void name(const Arguments&, int threads);
SCOAT_KERNELS(SCOAT_DECLARE)
#undef SCOAT_DECLARE

// The instruction set that the CPU kernels run with here.
const char* instruction_set();
}  // namespace cpu

namespace cuda {
constexpr int64_t TILE = 16;  // pairs of columns

// Tiles of the sums over [H, W]: two rows (the first tile has one) of up to 2 * TILE columns.
SCOAT_BOTH int64_t column_tiles(int64_t width) { return (width / 2 + 1 + TILE - 1) / TILE; }
inline int64_t tiles(int64_t height, int64_t width) { return (height / 2 + 1) * column_tiles(width); }

// Each returns a cudaError_t, 0 where the launch went well.
#define SCOAT_DECLARE(name) int name(const Arguments&, void* stream);
SCOAT_KERNELS(SCOAT_DECLARE)
#undef SCOAT_DECLARE

const char* error_name(int error);
// Why this build cannot run on the current device (driver too old, no code for it), or an empty string.
const char* why_not();
}  // namespace cuda

}  // namespace scoat
