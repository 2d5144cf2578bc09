// Convolutions on the matrix registers of a CPU. A tile register holds 16 rows of 64 bytes; an instruction adds the
// product of one with 16 pixels of 32 channels and one with 32 channels of 16 outputs to one with 16x16 sums.
//
// A work item is a block of ROWS x COLUMNS pixels. It copies their inputs, with the pixels around them, into scratch
// memory of its own, where 64 bytes are a pixel's next 32 channels: so any sources are read with the same addresses,
// and there is nothing to ask about edges afterwards. Where 16 channels are left or fewer, 64 bytes are two pixels that
// lie side by side, and so two taps of a row: then a row of three taps takes two products and not three.
//
// Weights are in tiles of [16 pairs of channels][16 outputs][2], in the order in which they are used:
// [block of 32 outputs][chunk of channels][row of taps][product in the row][16 outputs of the block].
#include "amx.h"

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <optional>
#include <utility>
#include <vector>

#include "resample.h"

namespace scoat {
namespace amx {
namespace {

constexpr int ROWS = 16, COLUMNS = 32;  // of a work item: pairs of rows, since they get pooled
constexpr int EDGE = 16;                // rows of a tile, and its columns of sums
constexpr int BLOCK = 2 * EDGE;         // outputs of which the sums are in registers at once
constexpr int GROUP = 4 * BLOCK;        // outputs of a work item
constexpr int WIDE = 32, NARROW = 16;   // channels of a chunk
constexpr int TILE = EDGE * WIDE;       // numbers in a tile of inputs or weights
constexpr int PATCH = 4 * EDGE * EDGE;  // sums in registers at once
constexpr int AHEAD = 5;                // products that are under way while the sums before them are stored

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline __m512 load(__mmask16 some, const uint16_t* from) {
  const __m512i bits = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, from));
  return _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
}
inline __m256i narrow(__m512 value) { return __m256i(_mm512_cvtneps_pbh(value)); }
inline void store(__m512 value, uint16_t* to) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), narrow(value)); }
inline void store(__m512 value, __mmask16 some, uint16_t* to) { _mm256_mask_storeu_epi16(to, some, narrow(value)); }
inline __mmask16 first_of(int64_t count) { return count >= EDGE ? 0xffff : count > 0 ? (1u << count) - 1 : 0; }

// NaN stays NaN, as in torch.
inline __m512 positive(__m512 x) {
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_NLT_UQ), x);
}
inline __m512 larger(__m512 a, __m512 b) {
  const __mmask16 first = _mm512_cmp_ps_mask(a, b, _CMP_NLE_UQ) & ~_mm512_cmp_ps_mask(b, b, _CMP_UNORD_Q);
  return _mm512_mask_mov_ps(b, first, a);
}

// Bilinear upsampling to h x w pixels: a row is first interpolated from the two around it, then its pixels from two of
// that.
class Upsampling {
 public:
  Upsampling(int64_t h, int64_t w) : h_(h / 2), inverse_(inverse_of(h / 2)) {
    const float inverse = inverse_of(w / 2);
    for (int64_t x = 0; x < w; ++x) columns_.push_back(source_of(x, w / 2, inverse));
  }

  // Calls use(pixel, 16 channels) for `pixels` of row y from x on, of which channels from c on are wanted.
  template <typename Use>
  void each(const Features& f, int64_t n, int64_t y, int64_t x, int64_t pixels, int64_t c, __mmask16 some, float* row,
            const Use& use) const {
    const Source rows = source_of(y, h_, inverse_);
    const int64_t first = columns_[x].first, last = columns_[x + pixels - 1].second;
    const uint16_t *upper = f.data + n * f.n + rows.first * f.h + c, *lower = f.data + n * f.n + rows.second * f.h + c;
    const __m512 of_upper = _mm512_set1_ps(rows.first_weight), of_lower = _mm512_set1_ps(rows.second_weight);
    for (int64_t k = first; k <= last; ++k)
      _mm512_store_ps(row + (k - first) * EDGE, _mm512_fmadd_ps(of_upper, load(some, upper + k * f.w),
                                                                _mm512_mul_ps(of_lower, load(some, lower + k * f.w))));
    for (int64_t p = 0; p < pixels; ++p) {
      const Source& columns = columns_[x + p];
      const __m512 right =
          _mm512_mul_ps(_mm512_set1_ps(columns.second_weight), _mm512_load_ps(row + (columns.second - first) * EDGE));
      use(p, _mm512_fmadd_ps(_mm512_set1_ps(columns.first_weight), _mm512_load_ps(row + (columns.first - first) * EDGE),
                             right));
    }
  }

 private:
  int64_t h_;
  float inverse_;
  std::vector<Source> columns_;
};

// Input channels that are multiplied together: some of one source.
struct Chunk {
  int source;
  int64_t first, channel, count;  // of its channels: the first within the source, and among all; how many there are
  int64_t room;                   // channels that a pixel has in scratch memory
  int64_t at;                     // where it begins there
};

// The inputs of a work item in scratch memory.
class Block {
 public:
  Block(const Inputs& inputs, int halo) : inputs_(inputs), halo_(halo), up_(inputs.h, inputs.below ? inputs.w : 0) {
    int64_t channel = 0;
    for (int s = 0; s < 2; ++s)
      for (int64_t first = 0; first < inputs.sources[s].channels; first += WIDE) {
        const int64_t count = std::min<int64_t>(WIDE, inputs.sources[s].channels - first);
        const int64_t room = count <= NARROW ? NARROW : WIDE;
        chunks_.push_back({s, first, channel, count, room, size_});
        size_ += (ROWS + 2 * halo) * step() * room;
        channel += count;
      }
  }

  const std::vector<Chunk>& chunks() const { return chunks_; }
  int64_t size() const { return size_; }
  int64_t step() const { return COLUMNS + 2 * halo_ + 1; }  // pixels of a row, with one more, which products read
  static int64_t products(const Chunk& chunk, int taps) { return taps == 1 ? 1 : 3 * (chunk.room == WIDE ? 3 : 2); }
  int64_t products(int taps) const {
    int64_t count = 0;
    for (const Chunk& chunk : chunks_) count += products(chunk, taps);
    return count;
  }

  // Copies the inputs around pixel (y0, x0). What lies outside of the image is zero; what no output needs is left.
  void copy(int64_t n, int64_t y0, int64_t x0, uint16_t* scratch, float* row) const {
    const int64_t begin = std::max<int64_t>(x0 - halo_, 0), end = std::min(x0 + COLUMNS + halo_, inputs_.w);
    const int64_t last = std::min(x0 + COLUMNS, inputs_.w) + halo_ + 1;  // with the one that only products read
    for (int64_t y = y0 - halo_; y < std::min(y0 + ROWS, inputs_.h) + halo_; ++y)
      for (const Chunk& chunk : chunks_) {
        uint16_t* to = scratch + chunk.at + (y - y0 + halo_) * step() * chunk.room;
        const int64_t before = begin - (x0 - halo_), pixels = y < 0 || y >= inputs_.h ? 0 : end - begin;
        memset(to, 0, before * chunk.room * sizeof *to);
        uint16_t* inside = to + before * chunk.room;
        if (pixels) {
          if (inputs_.below && chunk.source == 1)
            upsample(chunk, n, y, begin, pixels, inside, row);
          else
            gather(chunk, n, y, begin, pixels, inside);
        }
        memset(inside + pixels * chunk.room, 0, (last - begin - pixels) * chunk.room * sizeof *to);
      }
  }

 private:
  void gather(const Chunk& chunk, int64_t n, int64_t y, int64_t x, int64_t pixels, uint16_t* to) const {
    const Features& f = inputs_.sources[chunk.source];
    const uint16_t* from = f.data + n * f.n + y * f.h + x * f.w + chunk.first;
    const __mmask32 some = uint32_t(~0u) >> (WIDE - chunk.count);
    if (chunk.room == WIDE)
      for (; pixels; --pixels, from += f.w, to += WIDE) _mm512_storeu_si512(to, _mm512_maskz_loadu_epi16(some, from));
    else
      for (; pixels; --pixels, from += f.w, to += NARROW)
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_maskz_loadu_epi16(__mmask16(some), from));
  }

  void upsample(const Chunk& chunk, int64_t n, int64_t y, int64_t x, int64_t pixels, uint16_t* to, float* row) const {
    for (int64_t c = 0; c < chunk.room; c += EDGE)
      up_.each(inputs_.sources[1], n, y, x, pixels, chunk.first + c, first_of(chunk.count - c), row,
               [&](int64_t p, __m512 value) { store(value, to + p * chunk.room + c); });
  }

  Inputs inputs_;
  int halo_;
  Upsampling up_;
  std::vector<Chunk> chunks_;
  int64_t size_ = 0;
};

// All eight tiles with 16 rows of 64 bytes, as long as this lives in a thread.
class Registers {
 public:
  Registers() {
    alignas(64) uint8_t form[64] = {1};  // palette; then bytes of a row from 16 on, and rows from 48 on
    for (int tile = 0; tile < 8; ++tile) form[16 + 2 * tile] = 64, form[48 + tile] = EDGE;
    _tile_loadconfig(form);
  }
  ~Registers() { _tile_release(); }
};

// The compiler's instructions for tiles do not say that they read memory.
inline void settle() { __asm__ volatile("" ::: "memory"); }

// Sums [2 rows][2][16 pixels][16 outputs], for two tiles of outputs and one of pixels, or for one and two. The first
// tap of the first pixel is at `pixel` of the block. Calls between() while the first products are under way.
template <int OUTPUTS, typename Between>
void multiply(const Block& block, const uint16_t* scratch, int64_t pixel, int taps, const uint16_t* weights,
              float* sums, const Between& between) {
  int left = AHEAD;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (const Chunk& chunk : block.chunks()) {
    const int64_t step = 2 * chunk.room, row = block.step() * step;  // in bytes
    const int products = taps == 1 ? 1 : chunk.room == WIDE ? 3 : 2;
    const char* from = reinterpret_cast<const char*>(scratch + chunk.at + pixel * chunk.room);
    for (int dy = 0; dy < taps; ++dy, from += row)
      for (int k = 0; k < products; ++k, weights += OUTPUTS * TILE) {
        const char* a = from + 2 * TILE / EDGE * k;
        _tile_loadd(4, a, step);
        _tile_loadd(6, weights, 64);
        if constexpr (OUTPUTS == 2) {
          _tile_loadd(7, weights + TILE, 64);
          _tile_loadd(5, a + row, step);
          _tile_dpbf16ps(0, 4, 6);
          _tile_dpbf16ps(1, 4, 7);
          _tile_dpbf16ps(2, 5, 6);
          _tile_dpbf16ps(3, 5, 7);
        } else {
          _tile_loadd(5, a + EDGE * step, step);
          _tile_dpbf16ps(0, 4, 6);
          _tile_loadd(7, a + row, step);
          _tile_dpbf16ps(1, 5, 6);
          _tile_loadd(4, a + row + EDGE * step, step);
          _tile_dpbf16ps(2, 7, 6);
          _tile_dpbf16ps(3, 4, 6);
        }
        if (--left == 0) between();
      }
  }
  if (left > 0) between();
  _tile_stored(0, sums, 64);
  _tile_stored(1, sums + 256, 64);
  _tile_stored(2, sums + 512, 64);
  _tile_stored(3, sums + 768, 64);
}

// Sums of 2 rows of `pixels` pixels from (y, x) on, for 16 outputs from `out` on or for 32, and which of them exist.
struct Patch {
  float* sums;
  int64_t y, x, out, pixels, outputs;

  float* at(int64_t row, int64_t pixel, int64_t output) const {
    return sums + (2 * row + output / EDGE) * 256 + pixel * EDGE;
  }
};

// The image and the outputs of a work item.
struct Item {
  int64_t n, part, y, x, out, end;
};

// Calls use(row, pixel, first of 16 outputs) over a patch.
template <typename Use>
inline void each_pixel(const Patch& patch, int64_t h, const Use& use) {
  for (int64_t k = 0; k < patch.outputs; k += EDGE)
    for (int64_t row = 0; row < std::min<int64_t>(2, h - patch.y); ++row)
      for (int64_t p = 0; p < patch.pixels; ++p) use(row, p, k);
}

// Memory of this thread, in cache lines, with what the thread has left in it: new pages would cost more than a small
// convolution.
struct Memory {
  char* data = nullptr;
  int64_t size = 0;

  ~Memory() { delete[] data; }

  char* of(int64_t bytes) {
    if (bytes > size) {
      delete[] std::exchange(data, nullptr);
      size = 0;
      data = new char[bytes + 64]();
      size = bytes;
    }
    return reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(data) + 63) & ~uintptr_t(63));
  }
};

thread_local Memory memory;

inline int64_t padded(int64_t bytes) { return ceil_div(bytes, 64) * 64; }

// What a work item needs beside the inputs: the sums of a patch, a row on its way to be upsampled, and `numbers` more.
struct Room {
  Room(const Block& block, int64_t numbers)
      : inputs(reinterpret_cast<uint16_t*>(
            memory.of(padded(2 * block.size()) + sizeof(float) * (2 * PATCH + COLUMNS * EDGE + numbers)))),
        sums(reinterpret_cast<float*>(inputs) + padded(2 * block.size()) / sizeof(float)),
        row(sums + 2 * PATCH),
        more(row + COLUMNS * EDGE) {}
  uint16_t* inputs;
  float *sums, *row, *more;
};

// Calls use(patch) for all pixels and outputs of a work item; the first tap of its first pixel is at `shift` of the
// block.
template <typename Use>
void multiply_all(const Block& block, const Room& room, int64_t shift, int taps, const uint16_t* weights,
                  const Item& item, int64_t h, int64_t w, const Use& use) {
  const int64_t products = block.products(taps);
  std::optional<Patch> before;  // whose sums are stored while the next ones are multiplied
  float* sums = room.sums;
  const auto use_before = [&] {
    if (before) use(*before);
  };
  for (int64_t out = item.out; out < item.end; out += BLOCK) {
    const uint16_t* own = weights + out / BLOCK * products * 2 * TILE;
    const bool two = item.end - out > EDGE;
    for (int64_t y = 0; y < std::min<int64_t>(ROWS, h - item.y); y += 2)
      for (int64_t x = 0; x < std::min<int64_t>(COLUMNS, w - item.x); x += two ? EDGE : 2 * EDGE) {
        const int64_t pixel = y * block.step() + x + shift;
        if (two)
          multiply<2>(block, room.inputs, pixel, taps, own, sums, use_before);
        else
          multiply<1>(block, room.inputs, pixel, taps, own, sums, use_before);
        settle();
        const int64_t pixels = std::min<int64_t>(two ? EDGE : 2 * EDGE, w - item.x - x);
        before = Patch{sums, item.y + y, item.x + x, out, pixels, two ? BLOCK : EDGE};
        sums = sums == room.sums ? sums + PATCH : room.sums;
      }
  }
  use_before();
}

// Calls use(item, room) for every work item, in several threads, with the inputs copied.
template <typename Use>
void each_item(const Inputs& a, const Block& block, int64_t outputs, int64_t group, int64_t numbers, const Use& use) {
  const int64_t across = ceil_div(a.w, COLUMNS), count = parts(a.h, a.w), groups = ceil_div(outputs, group);
  const Room room(block, numbers);
  const Registers registers;
#pragma omp for schedule(dynamic)
  for (int64_t k = 0; k < a.n * count * groups; ++k) {
    const int64_t part = k / groups % count, first = k % groups * group;
    const Item item{k / groups / count,      part,  part / across * ROWS,
                    part % across * COLUMNS, first, std::min(outputs, first + group)};
    block.copy(item.n, item.y, item.x, room.inputs, room.row);
    settle();
    use(item, room);
  }
}

// Multiplies a tile of weights by the scale of each input channel.
inline void scale_tile(const float* from, const float* scale, const Chunk& chunk, uint16_t* to) {
  for (int64_t pair = 0; pair < EDGE; ++pair, from += WIDE, to += WIDE) {
    const int64_t c = 2 * pair % chunk.room;
    const float even = c < chunk.count ? scale[chunk.channel + c] : 0.0f;
    const float odd = c + 1 < chunk.count ? scale[chunk.channel + c + 1] : 0.0f;
    const __m512 both =
        _mm512_castsi512_ps(_mm512_set1_epi64(int64_t(uint64_t(bits_of_float(odd)) << 32 | bits_of_float(even))));
    store(_mm512_mul_ps(_mm512_loadu_ps(from), both), to);
    store(_mm512_mul_ps(_mm512_loadu_ps(from + EDGE), both), to + EDGE);
  }
}

// Each slice's own weights of a convolution with `taps` taps in a row and a column, from `at` on of its room.
void scale_weights(const Block& block, const Convolution& a, const float* from, int taps, int64_t at) {
  std::vector<const Chunk*> chunks;  // of each product
  for (const Chunk& chunk : block.chunks()) chunks.insert(chunks.end(), block.products(chunk, taps), &chunk);
  const int64_t products = chunks.size(), tiles = ceil_div(a.out.channels, EDGE);
#pragma omp for schedule(static)
  for (int64_t k = 0; k < a.inputs.n * tiles * products; ++k) {
    const int64_t n = k / (tiles * products), tile = k % (tiles * products), first = tile / (2 * products) * 2;
    const int64_t product = (tile - first * products) / std::min<int64_t>(2, tiles - first);
    scale_tile(from + tile * TILE, a.scaling.scale + n * a.scaling.channels, *chunks[product],
               a.scaling.scaled + n * a.scaling.scaled_step + at + tile * TILE);
  }
}

inline uint16_t* pixel(const Features& f, int64_t n, int64_t y, int64_t x) {
  return f.data + n * f.n + y * f.h + x * f.w;
}

enum class Residual { none, before, after };  // the ReLU

// Stores a patch of a convolution, adds it to `totals` of the item's outputs, and pools it.
template <Residual RESIDUAL>
void finish(const Convolution& a, const Item& item, const Patch& patch, float* totals) {
  const int64_t high = std::min<int64_t>(2, a.inputs.h - patch.y), step = a.out.w;
  const bool relu = a.relu, pooled = a.pooled.data != nullptr;
  for (int64_t k = 0; k < patch.outputs; k += EDGE) {
    const int64_t c = patch.out + k;
    const __mmask16 some = first_of(a.out.channels - c);
    const __m512 bias = _mm512_loadu_ps(a.weights.bias + c);
    __m512 total = _mm512_setzero_ps();
    for (int64_t row = 0; row < high; ++row) {
      uint16_t* to = pixel(a.out, item.n, patch.y + row, patch.x) + c;
      float* sums = patch.at(row, 0, k);
      for (int64_t p = 0; p < patch.pixels; ++p, to += step, sums += EDGE) {
        __m512 value = _mm512_add_ps(_mm512_load_ps(sums), bias);
        if (RESIDUAL == Residual::before) value = _mm512_add_ps(value, load(some, to));
        if (relu) value = positive(value);
        if (RESIDUAL == Residual::after) value = _mm512_add_ps(value, load(some, to));
        store(value, some, to);
        total = _mm512_add_ps(total, value);
        if (pooled) _mm512_store_ps(sums, value);
      }
    }
    float* sum = totals + c - item.out;
    _mm512_storeu_ps(sum, _mm512_add_ps(_mm512_loadu_ps(sum), total));
    if (pooled && high == 2)
      for (int64_t p = 0; p + 1 < patch.pixels; p += 2) {
        const __m512 upper = larger(_mm512_load_ps(patch.at(0, p, k)), _mm512_load_ps(patch.at(0, p + 1, k)));
        const __m512 lower = larger(_mm512_load_ps(patch.at(1, p, k)), _mm512_load_ps(patch.at(1, p + 1, k)));
        store(larger(upper, lower), some, pixel(a.pooled, item.n, patch.y / 2, (patch.x + p) / 2) + c);
      }
  }
}

}  // namespace

int64_t parts(int64_t h, int64_t w) { return ceil_div(h, ROWS) * ceil_div(w, COLUMNS); }

void convolve(const Convolution& a, int threads) {
  const auto store_patch = a.residual_before  ? finish<Residual::before>
                           : a.residual_after ? finish<Residual::after>
                                              : finish<Residual::none>;
  const int taps = int(a.size);
  const Block block(a.inputs, taps / 2);
  const int64_t h = a.inputs.h, w = a.inputs.w, outputs = a.out.channels, tiles = ceil_div(outputs, EDGE);
  const int64_t beside = tiles * block.products(taps) * TILE;  // where a shortcut's scaled weights lie
#pragma omp parallel num_threads(threads)
  {
    if (a.scaling.scale) scale_weights(block, a, a.scaling.tiles, taps, 0);
    if (a.scaling.shortcut) scale_weights(block, a, a.scaling.shortcut, 1, beside);
    each_item(a.inputs, block, outputs, GROUP, GROUP, [&](const Item& item, const Room& room) {
      const uint16_t* scaled = a.scaling.scaled + item.n * a.scaling.scaled_step;
      std::fill(room.more, room.more + GROUP, 0.0f);
      multiply_all(block, room, 0, taps, a.scaling.scale ? scaled : a.weights.tiles, item, h, w,
                   [&](const Patch& patch) { store_patch(a, item, patch, room.more); });
      if (a.sums)
        std::copy(room.more, room.more + item.end - item.out,
                  a.sums + (item.n * parts(h, w) + item.part) * a.sum_channels + item.out);
      if (a.shortcut.bias)
        multiply_all(block, room, taps / 2 * (block.step() + 1), 1,
                     a.scaling.shortcut ? scaled + beside : a.shortcut.tiles, item, h, w, [&](const Patch& patch) {
                       each_pixel(patch, h, [&](int64_t row, int64_t p, int64_t k) {
                         const int64_t c = patch.out + k;
                         const __m512 sum = _mm512_load_ps(patch.at(row, p, k));
                         const __m512 value = _mm512_add_ps(sum, _mm512_loadu_ps(a.shortcut.bias + c));
                         store(a.shortcut_relu ? positive(value) : value, first_of(outputs - c),
                               pixel(a.shortcut_out, item.n, patch.y + row, patch.x + p) + c);
                       });
                     });
    });
  }
}

void attend(const Attention& a, int threads) {
  const Block block(a.row, 0);
  const Upsampling up(a.row.h, a.row.w);
  const int64_t h = a.row.h, w = a.row.w, outputs = a.below.channels;
#pragma omp parallel num_threads(threads)
  each_item(a.row, block, outputs, outputs, ROWS * COLUMNS, [&](const Item& item, const Room& room) {
    float* logits = room.more;
    std::fill(logits, logits + ROWS * COLUMNS, a.bias);
    multiply_all(block, room, 0, 1, a.weights.tiles, item, h, w, [&](const Patch& patch) {
      for (int64_t k = 0; k < patch.outputs; k += EDGE)
        for (int64_t row = 0; row < std::min<int64_t>(2, h - patch.y); ++row) {
          const int64_t c = patch.out + k;
          const __m512 bias = _mm512_loadu_ps(a.weights.bias + c), psi = _mm512_loadu_ps(a.psi + c);
          float* sums = logits + (patch.y + row - item.y) * COLUMNS + patch.x - item.x;
          up.each(a.below, item.n, patch.y + row, patch.x, patch.pixels, c, first_of(outputs - c), room.row,
                  [&](int64_t p, __m512 below) {
                    const __m512 own = _mm512_add_ps(_mm512_load_ps(patch.at(row, p, k)), bias);
                    const __m512 joined =
                        a.each ? _mm512_add_ps(positive(own), positive(below)) : positive(_mm512_add_ps(own, below));
                    sums[p] += _mm512_reduce_add_ps(_mm512_mul_ps(joined, psi));
                  });
        }
    });
    for (int64_t y = item.y; y < std::min(item.y + ROWS, h); ++y)
      for (int64_t x = item.x; x < std::min(item.x + COLUMNS, w); ++x) {
        const float logit = logits[(y - item.y) * COLUMNS + x - item.x];
        a.map[(item.n * h + y) * w + x] = from_float<BFloat>(1.0f / (1.0f + std::exp(-logit))).bits;
      }
  });
}

void output(const Output& a, int threads) {
  const Block block(a.source, 1);
  const int64_t h = a.source.h, w = a.source.w;
#pragma omp parallel num_threads(threads)
  each_item(a.source, block, a.classes, a.classes, 0, [&](const Item& item, const Room& room) {
    multiply_all(block, room, 0, 3, a.weights.tiles, item, h, w, [&](const Patch& patch) {
      each_pixel(patch, h, [&](int64_t row, int64_t p, int64_t k) {
        for (int64_t c = patch.out + k; c < std::min<int64_t>(patch.out + k + EDGE, a.classes); ++c) {
          const int64_t at = ((item.n * a.classes + c) * h + patch.y + row) * w + patch.x + p;
          const float logit = patch.at(row, p, k)[c - patch.out - k] + a.weights.bias[c];
          if (a.mask)
            a.mask[at] = !(logit <= *a.threshold);  // NaN is no clean zero
          else
            a.logits[at] = logit;
        }
      });
    });
  });
}

}  // namespace amx
}  // namespace scoat
