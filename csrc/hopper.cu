// 3x3 convolutions on Hopper's tensor cores. A tile of pixels with its border lies in shared memory once for all nine
// taps, as each tap is the same matrix from another address on: see docs/hopper.md.
// SCOAT_TYPE is Half, BFloat or E4M3.
#include <algorithm>
#include <string>
#include <type_traits>

#include "hopper_epilogue.h"
#include "hopper_small.h"
#include "hopper_upsample.h"

namespace scoat {
namespace hopper {
namespace {

// The descriptor of a matrix whose rows of 16 bytes, or of a span, follow each other in groups of 8, without a swizzle
// or with one over the span: where it begins, and the steps from 16 bytes of channels to the next (with a swizzle not
// used, and 16 by convention) and from group to group.
template <int SPAN>
__device__ __forceinline__ uint64_t matrix(uint32_t address, int channels_step, int group_step) {
  constexpr uint64_t SWIZZLE = SPAN == 16 ? 0 : SPAN == 32 ? 3 : 2;
  return uint64_t(address >> 4) | uint64_t(channels_step >> 4) << 16 | uint64_t(group_step >> 4) << 32 | SWIZZLE << 62;
}

// All products of a stage.
template <typename F>
__device__ __forceinline__ void multiply_stage(uint32_t stage, int group, float* values, float* shortcut) {
  const uint32_t first = stage + group * F::ROWS * PITCH * F::SPAN;
  const uint64_t pixels = matrix<F::SPAN>(first, F::SPAN == 16 ? F::PLANE_BYTES : 16, 8 * F::SPAN);
  const uint64_t weights = matrix<16>(stage + F::PIXEL_BYTES, F::SLOTS_BYTES, 128);
  const uint64_t last = matrix<16>(stage + F::PIXEL_BYTES + F::WEIGHT_BYTES, F::CHANNELS * 16, 128);
  constexpr int STEP = F::SPAN == 16 ? 2 * F::PLANE_BYTES : 32;  // to what the next product multiplies
  unrolled<3 * F::STEPS>([&](auto which) {
    constexpr int TAP = which / F::STEPS, K = which % F::STEPS;
    const uint64_t left = pixels + (TAP * F::SPAN + K * STEP) / 16;
    const uint64_t right = weights + which * 2 * F::SLOTS_BYTES / 16;
    unrolled<F::ROWS / F::JOINED>([&](auto joined) {
      unrolled<F::JOINED + 2>([&](auto i) {
        multiply<typename F::T, F::JOINED * F::CHANNELS>(values + joined * F::JOINED * F::VALUES,
                                                         left + (joined * F::JOINED + i) * PITCH * F::SPAN / 16,
                                                         right + (F::JOINED + 1 - i) * F::CHANNELS);
      });
    });
    if constexpr (F::SHORTCUT && TAP == 1) {
      unrolled<F::ROWS>([&](auto row) {
        multiply<typename F::T, F::CHANNELS>(shortcut + row * F::VALUES, left + (row + 1) * PITCH * F::SPAN / 16,
                                             last + K * 2 * F::CHANNELS);
      });
    }
  });
}

// What the fetching thread does: keeps all stages full, those of the next tile too.
template <typename F>
__device__ __forceinline__ void fetch(const Parameters& p, const Shared<F>& shared) {
  Ring<F::STAGES> stage(1);
  Ring<F::SHORTCUT ? F::LOWS : 1> low(1);
  int64_t filled = 0;
  // whether each stage has the same weights in every tile
  const int chunks = p.chunks[0] + p.chunks[1] + p.chunks[SOURCES];
  const bool stays = !F::SHORTCUT && p.weights.step == 0 && p.blocks == 1 && F::STAGES % chunks == 0;
  for (int64_t number = blockIdx.x; number < p.tiles; number += gridDim.x) {
    const Tile<F> tile(p, number);
    const int64_t before = int64_t(tile.block) * chunks;
    const auto* weights = static_cast<const uint8_t*>(p.weights.weights) + tile.n * p.weights.step;
    const auto* shortcut = static_cast<const uint8_t*>(p.shortcut.weights) + tile.n * p.shortcut.step;
    weights += before * F::WEIGHT_BYTES, shortcut += before * F::SHORTCUT_BYTES;
    for (int source = 0; source <= SOURCES; ++source) {
      for (int chunk = 0; chunk < p.chunks[source]; ++chunk, stage.next()) {
        const bool whole = !F::SHORTCUT || source < SOURCES;
        if constexpr (F::SHORTCUT)
          if (!whole) {
            Barrier* const barrier = shared.low_full + low.index;
            wait(shared.low_empty + low.index, low.parity);
            arrive_expect(barrier, F::LOW_BYTES);
            copy_box(shared.lows + low.index * F::LOW_STRIDE, p.maps + source, barrier, chunk * F::DEPTH,
                     tile.x / 2 - 1, tile.y / 2 - 1, int(tile.n));
            low.next();
          }
        uint8_t* const to = shared.stages + stage.index * F::STRIDE;
        Barrier* const barrier = shared.full + stage.index;
        wait(shared.empty + stage.index, stage.parity);
        const bool kept = stays && filled >= F::STAGES;  // the weights of a stage
        ++filled;
        arrive_expect(barrier, F::BYTES - (whole ? 0 : F::PIXEL_BYTES) - (kept ? F::WEIGHT_BYTES : 0));
        constexpr int PLANES = F::PIXEL_BYTES / F::PLANE_BYTES, HEIGHT = F::HEIGHT / F::BOXES;
        for (int plane = 0; plane < PLANES && whole; ++plane)
          for (int box = 0; box < F::BOXES; ++box)
            copy_box(to + plane * F::PLANE_BYTES + box * HEIGHT * PITCH * F::SPAN, p.maps + source, barrier,
                     chunk * F::DEPTH + plane * F::SPAN / F::SIZE, tile.x - 1, tile.y - 1 + box * HEIGHT, int(tile.n));
        if (!kept) copy_bytes(to + F::PIXEL_BYTES, weights, F::WEIGHT_BYTES, barrier);
        weights += F::WEIGHT_BYTES;
        if constexpr (F::SHORTCUT) {
          copy_bytes(to + F::PIXEL_BYTES + F::WEIGHT_BYTES, shortcut, F::SHORTCUT_BYTES, barrier);
          shortcut += F::SHORTCUT_BYTES;
        }
      }
    }
  }
}

template <typename F>
__global__ void __launch_bounds__(THREADS, 1) convolve_tiles(const __grid_constant__ Parameters p) {
  SCOAT_DYNAMIC_SHARED(memory);
  const Shared<F> shared(memory);
  const bool upsamples = F::SHORTCUT && p.chunks[SOURCES] > 0;
  const int warp = __shfl_sync(ALL, int(threadIdx.x) / 32, 0), group = warp / 4;  // known to be the same for a warp
  if (threadIdx.x == 0) {
    for (int i = 0; i < F::STAGES; ++i) init(shared.full + i, upsamples ? 1 + UPSAMPLERS : 1);
    for (int i = 0; i < F::STAGES; ++i) init(shared.empty + i, WARPS);
    for (int i = 0; i < F::LOWS; ++i) init(shared.low_full + i, 1), init(shared.low_empty + i, UPSAMPLERS);
    fence_init();
  }
  __syncthreads();
  if (group == GROUPS) {
    give_registers<LEFT_REGISTERS>();
    if (threadIdx.x == 32 * WARPS) fetch<F>(p, shared);
    if constexpr (F::SHORTCUT)
      if (upsamples && warp > WARPS) upsample<F>(p, shared, int(threadIdx.x) - 32 * (WARPS + 1));
    return;
  }
  take_registers<REGISTERS>();
  if (group == 1) synchronise(LATER, 32 * WARPS);  // so that one multiplies while the other stores
  Ring<F::STAGES> stage(0);
  using Out = typename F::Out;
  constexpr int QUADS = Words<Out, F>::QUADS;
  constexpr int AHEAD = F::TAPPED ? (QUADS < 4 ? 4 / QUADS : 1) : 8 / QUADS;  // rows of residual that are on their way
  const bool residual = p.residual_before || p.residual_after;
  for (int64_t number = blockIdx.x; number < p.tiles; number += gridDim.x) {
    const Tile<F> tile(p, number);
    const int y = tile.y + group * F::ROWS;
    float values[F::ROWS * F::VALUES], shortcut[F::SHORTCUT ? F::ROWS * F::VALUES : 1];
    begin<F>(values, p.weights.bias + tile.first());
    if constexpr (F::SHORTCUT) begin<F>(shortcut, p.shortcut.bias + tile.first());
    uint4 held[F::SHORTCUT ? 1 : AHEAD * QUADS] = {};
    if constexpr (!F::SHORTCUT)
      if (residual)
        unrolled<AHEAD * QUADS>(
            [&](auto i) { held[i] = held_at<Out, F>(p.residual, i % QUADS, tile, y + i / QUADS, p.h, p.w); });

    int before = -1;  // the stage whose products may still run
    for (int chunk = 0; chunk < p.chunks[0] + p.chunks[1] + p.chunks[SOURCES]; ++chunk, stage.next()) {
      wait(shared.full + stage.index, stage.parity);
      products_begin();
      multiply_stage<F>(shared_address(shared.stages + stage.index * F::STRIDE), group, values, shortcut);
      products_commit();
      if (group == 0 && chunk == 0 && number == blockIdx.x) announce(LATER, 32 * WARPS);
      products_wait<1>();
      if (before >= 0 && threadIdx.x % 32 == 0) arrive(shared.empty + before);
      before = stage.index;
    }
    products_wait<0>();
    if (threadIdx.x % 32 == 0) arrive(shared.empty + before);
    if constexpr (std::is_same_v<typename F::T, E4M3>) {
      for (float& value : values) value *= p.weights.unit;
      for (float& value : shortcut) value *= p.shortcut.unit;
    }

    unrolled<F::ROWS>([&](auto row) {
      unrolled<QUADS>([&](auto quad) {
        constexpr int SLOT = F::SHORTCUT ? 0 : row % AHEAD * QUADS + quad;
        const uint4 words = held[SLOT];
        if constexpr (!F::SHORTCUT && row + AHEAD < F::ROWS)
          if (residual) held[SLOT] = held_at<Out, F>(p.residual, quad, tile, y + row + AHEAD, p.h, p.w);
        finish<Out, F, !F::TAPPED>(values + row * F::VALUES, quad, words, p.residual_before, p.residual_after, p.out,
                                   p.relu, tile, y + row, p.h, p.w);
      });
      if constexpr (F::SHORTCUT)
        unrolled<Words<typename F::ShortcutOut, F>::QUADS>([&](auto quad) {
          finish<typename F::ShortcutOut, F, true>(shortcut + row * F::VALUES, quad, held[0], false, false,
                                                   p.shortcut_out, p.shortcut_relu, tile, y + row, p.h, p.w);
        });
      if constexpr (F::TAPPED)
        multiply_taps<F>(values + row * F::VALUES, p.taps, p.tap_weights, tile, y + row, p.h, p.w);
      else if constexpr (row % 2 == 1)
        if (p.pooled.data)
          pool<F>(values + (row - 1) * F::VALUES, values + row * F::VALUES, p.pooled, tile, y + row - 1, p.h, p.w);
    });
    if (!F::TAPPED && p.sums) {
      const int64_t part = (tile.n * p.across * p.down + tile.number) * GROUPS + group;
      sum<F>(values, shared.sums + group * 4 * F::CHANNELS, p.sums + part * p.sum_channels + tile.first(), group, y,
             tile.x, p.h, p.w);
    }
  }
}

template <typename F>
int launch_form(const Convolution& c, void* stream) {
  Parameters p{};
  const auto take = [&](int i, const Features& x, int64_t h, int64_t w, const int (&box)[3], int span) {
    p.chunks[i] = x.data ? int((x.channels + F::DEPTH - 1) / F::DEPTH) : 0;
    return x.data ? encode<typename F::T>(&p.maps[i], x.data, {x.n, x.h, x.w}, c.n, h, w, x.channels, box, span) : 0;
  };
  for (int i = 0; i < SOURCES; ++i)
    if (const int error = take(i, c.sources[i], c.h, c.w, {F::SPAN / F::SIZE, PITCH, F::HEIGHT / F::BOXES}, F::SPAN))
      return error;
  // for which there is no code
  if ((c.below.data && !F::SHORTCUT) || (c.residual.data && F::SHORTCUT) || (c.pooled.data && F::ROWS % 2) ||
      (F::TAPPED && (c.pooled.data || c.sums || c.taps.channels != TAPS)))
    return cudaErrorInvalidValue;
  if (const int error = take(SOURCES, c.below, c.h / 2, c.w / 2, {F::DEPTH, F::LOW_WIDTH, F::LOW_HEIGHT}, 16))
    return error;
  p.h = int(c.h), p.w = int(c.w);
  p.across = (p.w + WIDTH - 1) / WIDTH, p.down = (p.h + F::CUT.height - 1) / F::CUT.height;
  p.blocks = c.channels / F::CHANNELS, p.tiles = c.n * p.across * p.down * p.blocks;
  p.weights = c.weights, p.shortcut = c.shortcut, p.attention = c.attention;
  p.out = c.out, p.pooled = c.pooled, p.shortcut_out = c.shortcut_out;
  p.sums = c.sums, p.sum_channels = c.sum_channels;
  p.relu = c.relu, p.residual = c.residual;
  p.residual_before = c.residual.data && !c.after, p.residual_after = c.residual.data && c.after;
  p.taps = c.taps, p.tap_weights = c.tap_weights;
  p.shortcut_relu = c.shortcut_relu;
  return launch(convolve_tiles<F>, std::min(p.tiles, processors()), THREADS, F::SHARED, stream, p);
}

template <typename T, int CHANNELS, bool SHORTCUT>
int launch_shortcut(const Convolution& c, void* stream) {
  constexpr bool EIGHT = std::is_same_v<T, E4M3>;
  if constexpr (!SHORTCUT && has_taps(CHANNELS))
    if (c.taps.data && !c.planes && c.wide == EIGHT)
      return launch_form<Form<T, CHANNELS, false, false, EIGHT, true>>(c, stream);
  if (c.taps.data) return cudaErrorInvalidValue;
  if constexpr (std::is_same_v<T, BFloat>)
    if (c.planes && !c.wide) return launch_form<Form<T, CHANNELS, SHORTCUT, true, false>>(c, stream);
  if constexpr (EIGHT)
    if (c.wide && !c.planes) return launch_form<Form<T, CHANNELS, SHORTCUT, false, true>>(c, stream);
  if (c.planes || c.wide) return cudaErrorInvalidValue;
  return launch_form<Form<T, CHANNELS, SHORTCUT, false, false>>(c, stream);
}

template <typename T, int CHANNELS>
int launch_channels(const Convolution& c, void* stream) {
  if constexpr (has_kernel(CHANNELS, sizeof(T))) {
    if (!c.shortcut.weights) return launch_shortcut<T, CHANNELS, false>(c, stream);
    if constexpr (cut_of(CHANNELS, true).outputs == CHANNELS) return launch_shortcut<T, CHANNELS, true>(c, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace

template <>
int convolve<SCOAT_TYPE>(const Convolution& c, void* stream) {
  if (c.n == 0) return cudaSuccess;
  if (!has_kernel(c.channels, sizeof(SCOAT_TYPE)) || (c.taps.data && !has_taps(c.channels)))
    return cudaErrorInvalidValue;
  switch (cut_of(c.channels, c.shortcut.weights).outputs) {
    case 16:
      return launch_channels<SCOAT_TYPE, 16>(c, stream);
    case 32:
      return launch_channels<SCOAT_TYPE, 32>(c, stream);
    case 64:
      return launch_channels<SCOAT_TYPE, 64>(c, stream);
    case 128:
      return launch_channels<SCOAT_TYPE, 128>(c, stream);
  }
  return cudaErrorInvalidValue;
}

template <>
int scale<SCOAT_TYPE>(const Scaling& s, void* stream) {
  const int64_t blocks = (s.n * s.vectors + SCALING_THREADS - 1) / SCALING_THREADS;
  return blocks == 0 ? cudaSuccess : launch(scale_vectors<SCOAT_TYPE>, blocks, SCALING_THREADS, 0, stream, s);
}

template <>
int gate_sums<SCOAT_TYPE>(const GateSums& g, void* stream) {
  if (!has_gate_sums(g.below.channels)) return cudaErrorInvalidValue;
  const int64_t blocks = g.n * ((g.h * g.w + SUMMED - 1) / SUMMED);
  const int bytes = (SUMMED + SUMMED / int(g.below.channels / 8) * int(g.below.channels)) * 4;
  return blocks == 0 ? cudaSuccess : launch(sum_gated<SCOAT_TYPE>, blocks, SUMMED, bytes, stream, g);
}

template <>
int tap_sums<SCOAT_TYPE>(const TapSums& s, void* stream) {
  constexpr int ACROSS = SUMMED / SUMMED_ROWS;
  const int64_t blocks = s.n * ((s.h + SUMMED_ROWS - 1) / SUMMED_ROWS) * ((s.w + ACROSS - 1) / ACROSS);
  return blocks == 0 ? cudaSuccess : launch(sum_taps<SCOAT_TYPE>, blocks, SUMMED, 0, stream, s);
}

template <>
const char* why_not<SCOAT_TYPE>() {
  cudaFuncAttributes attributes;
  const cudaError_t error =
      cudaFuncGetAttributes(&attributes, convolve_tiles<Form<SCOAT_TYPE, 32, false, false, false>>);
  if (error == cudaSuccess) return "";
  cudaGetLastError();  // of ours; the next call must not see it
  static thread_local std::string reason;
  reason = std::string("cannot run on this GPU: ") + cudaGetErrorString(error);
  return reason.c_str();
}

}  // namespace hopper
}  // namespace scoat
