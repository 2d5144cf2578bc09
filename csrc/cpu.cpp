// The kernels on a CPU, with OpenMP. Compiled once for each instruction set (SCOAT_ISA names its namespace).
#include <algorithm>
#include <vector>

#ifdef SCOAT_X86
#include <immintrin.h>
#endif

#include "kernels.h"
#include "lanes.h"
#include "resample.h"

namespace scoat {
namespace cpu {
namespace SCOAT_ISA {

namespace {

constexpr int64_t GRAIN = 1 << 15;  // elements that a thread must have to be worth waking

int useful_threads(int threads, int64_t elements) {
  return int(std::max<int64_t>(1, std::min<int64_t>(threads, elements / GRAIN)));
}

template <typename T>
T* row_of(const View& view, int64_t n, int64_t c, int64_t h) {
  return static_cast<T*>(view.data) + n * view.n + c * view.c + h * view.h;
}

template <typename T>
inline void load(const T* __restrict from, Lanes& lanes) {
  float values[LANES];
  for (int i = 0; i < LANES; ++i) values[i] = to_float(from[i]);
  memcpy(&lanes, values, sizeof lanes);
}

template <typename T>
inline void store(const Lanes& lanes, T* __restrict to) {
  for (int i = 0; i < LANES; ++i) to[i] = from_float<T>(lanes[i]);
}

// The sums of channel c over tile `tile` go here.
float* sums_of(const Arguments& arguments, int64_t n, int64_t tile, int64_t tiles, int64_t c) {
  return arguments.sums + (n * tiles + tile) * arguments.sum_channels + c;
}

// An output larger than a core's share of any cache is written past the caches: a plain store would first read the line
// that it overwrites, half as much traffic again for a pass over one tensor. A few lines are computed at a time, no
// more than a core works on at once, so that their reading and writing overlap.
constexpr int64_t STREAMED = int64_t(32) << 20;  // bytes of the output
constexpr int64_t STAGED = 256;                  // bytes

template <typename T>
class Stage {
 public:
  // For an output of `size` values, of which `piece` lie together.
  Stage(int64_t size, int64_t piece) : streams_(SUPPORTED && size >= STREAMED / SIZE && piece >= VALUES) {}
  ~Stage() {
#ifdef SCOAT_X86
    if (streams_) _mm_sfence();  // what was streamed is there for other threads
#endif
  }
  // How many of `size` values to compute at a time.
  int64_t step(int64_t size) const { return streams_ ? VALUES : size; }
  // Where to compute what belongs at `out`.
  T* place(T* out) { return streams_ ? values_ : out; }
  // `count` values are computed.
  void put(T* out, int64_t count) {
    if (!streams_) return;
    if (count == VALUES && reinterpret_cast<uintptr_t>(out) % sizeof(Line) == 0)
      stream(out);
    else
      memcpy(out, values_, count * SIZE);
  }

 private:
  static constexpr int64_t SIZE = sizeof(T), VALUES = STAGED / SIZE;
#ifdef SCOAT_X86
  static constexpr bool SUPPORTED = true;
#ifdef __AVX__
  using Line = __m256i;
#else
  using Line = __m128i;
#endif
  static void stream_line(Line* to, const Line& line) {
#ifdef __AVX__
    _mm256_stream_si256(to, line);
#else
    _mm_stream_si128(to, line);
#endif
  }
  void stream(T* out) {
    const Line* from = reinterpret_cast<const Line*>(values_);
    for (size_t i = 0; i < STAGED / sizeof(Line); ++i) stream_line(reinterpret_cast<Line*>(out) + i, from[i]);
  }
#else
  static constexpr bool SUPPORTED = false;
  using Line = T;
  void stream(T*) {}
#endif

  alignas(64) T values_[VALUES];
  const bool streams_;
};

float value_or(const float* values, int64_t i, float otherwise) { return values ? values[i] : otherwise; }

// Column weights of the outputs 2k + 1 and 2k + 2 for every k: the same for all rows.
struct ColumnWeights {
  std::vector<float> odd_first, odd_second, even_first, even_second;

  explicit ColumnWeights(int64_t size) : odd_first(size), odd_second(size), even_first(size), even_second(size) {
    const float inverse = inverse_of(size);
    for (int64_t k = 0; k < size; ++k) {
      odd_first[k] = scoat::odd_first(k, size, inverse);
      odd_second[k] = scoat::odd_second(k, size, inverse);
      even_first[k] = scoat::even_first(k, size, inverse);
      even_second[k] = scoat::even_second(k, size, inverse);
    }
  }
};

// Calls use(column, value) for every output column of a row between the input rows y0 and y1.
template <typename T, typename Use>
inline void upsample_row(const T* __restrict y0, const T* __restrict y1, float row0, float row1, int64_t w,
                         const ColumnWeights& weights, const Use& use) {
  const float* __restrict odd0 = weights.odd_first.data(), * __restrict odd1 = weights.odd_second.data();
  const float* __restrict even0 = weights.even_first.data(), * __restrict even1 = weights.even_second.data();
  use(0, row0 * to_float(y0[0]) + row1 * to_float(y1[0]));
#pragma omp simd
  for (int64_t k = 0; k < w - 1; ++k) {
    const float left = row0 * to_float(y0[k]) + row1 * to_float(y1[k]);
    const float right = row0 * to_float(y0[k + 1]) + row1 * to_float(y1[k + 1]);
    use(2 * k + 1, odd0[k] * left + odd1[k] * right);
    use(2 * k + 2, even0[k] * left + even1[k] * right);
  }
  use(2 * w - 1, row0 * to_float(y0[w - 1]) + row1 * to_float(y1[w - 1]));
}

// Where a row is computed in float32, to be summed before it is rounded: in its own place where it is not rounded.
inline float* exact_row(float* out, std::vector<float>&) { return out; }
template <typename T>
float* exact_row(T*, std::vector<float>& buffer) {
  return buffer.data();
}

inline void round_row(const float*, float*, int64_t) {}
template <typename T>
void round_row(const float* __restrict row, T* __restrict out, int64_t size) {
#pragma omp simd
  for (int64_t x = 0; x < size; ++x) out[x] = from_float<T>(row[x]);
}

template <typename T>
void up_forward_contiguous(const Arguments& a, int threads) {
  const int64_t n = a.shape.n, c = a.shape.c, h = a.shape.h, w = a.shape.w;
  const ColumnWeights weights(w);
  const float inverse = inverse_of(h);
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> buffer(2 * w);
#pragma omp for schedule(static)
    for (int64_t item = 0; item < n * c * 2 * h; ++item) {
      const int64_t oy = item % (2 * h), ic = item / (2 * h) % c, in = item / (2 * h) / c;
      const Source rows = source_of(oy, h, inverse);
      const T *y0 = row_of<T>(a.a, in, ic, rows.first), *y1 = row_of<T>(a.a, in, ic, rows.second);
      T* __restrict out = row_of<T>(a.out, in, ic, oy);
      float* __restrict row = exact_row(out, buffer);
      if (a.gate.data) {
        const T* __restrict gate = row_of<T>(a.gate, in, 0, oy);
        upsample_row(y0, y1, rows.first_weight, rows.second_weight, w, weights,
                     [=](int64_t x, float value) { row[x] = (1 + to_float(gate[x])) * value; });
      } else {
        upsample_row(y0, y1, rows.first_weight, rows.second_weight, w, weights,
                     [=](int64_t x, float value) { row[x] = value; });
      }
      if (a.sums) {
        float total = 0;
#pragma omp simd reduction(+ : total)
        for (int64_t x = 0; x < 2 * w; ++x) total += row[x];
        *sums_of(a, in, oy, 2 * h, ic) = total;
      }
      round_row(row, out, 2 * w);
    }
  }
}

template <typename T>
void up_forward_channels_last(const Arguments& a, int threads) {
  const int64_t n = a.shape.n, c = a.shape.c, h = a.shape.h, w = a.shape.w;
  const float inverse_h = inverse_of(h), inverse_w = inverse_of(w);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t item = 0; item < n * 2 * h; ++item) {
    const int64_t oy = item % (2 * h), in = item / (2 * h);
    const Source rows = source_of(oy, h, inverse_h);
    const T *y0 = row_of<T>(a.a, in, 0, rows.first), *y1 = row_of<T>(a.a, in, 0, rows.second);
    T* row = row_of<T>(a.out, in, 0, oy);
    const T* gate = a.gate.data ? row_of<T>(a.gate, in, 0, oy) : nullptr;
    float* __restrict sums = a.sums ? sums_of(a, in, oy, 2 * h, 0) : nullptr;
    if (sums) std::fill(sums, sums + c, 0.0f);
    for (int64_t ox = 0; ox < 2 * w; ++ox) {
      const Source columns = source_of(ox, w, inverse_w);
      const float factor = gate ? 1 + to_float(gate[ox]) : 1.0f;
      const float column0 = factor * columns.first_weight, column1 = factor * columns.second_weight;
      const float row0 = rows.first_weight, row1 = rows.second_weight;
      const T* __restrict y00 = y0 + columns.first * a.a.w, * __restrict y01 = y0 + columns.second * a.a.w;
      const T* __restrict y10 = y1 + columns.first * a.a.w, * __restrict y11 = y1 + columns.second * a.a.w;
      T* __restrict out = row + ox * a.out.w;
      const auto value = [=](int64_t ic) {
        return interpolate(to_float(y00[ic]), to_float(y01[ic]), to_float(y10[ic]), to_float(y11[ic]), row0, row1,
                           column0, column1);
      };
      if (sums) {
#pragma omp simd
        for (int64_t ic = 0; ic < c; ++ic) {
          const float exact = value(ic);
          out[ic] = from_float<T>(exact);
          sums[ic] += exact;
        }
      } else {
#pragma omp simd
        for (int64_t ic = 0; ic < c; ++ic) out[ic] = from_float<T>(value(ic));
      }
    }
  }
}

template <typename T>
void up_backward_contiguous(const Arguments& a, int threads) {
  const int64_t n = a.shape.n, c = a.shape.c, h = a.shape.h, w = a.shape.w;
  const float inverse_h = inverse_of(h), inverse_w = inverse_of(w);
  std::vector<float> weights(4 * w);
  for (int64_t k = 0; k < w; ++k) {
    const Targets columns = targets_of(k, w, inverse_w);
    for (int j = 0; j < 4; ++j) weights[j * w + k] = columns.weight[j];
  }
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> buffer(2 * w + 2,
                              0.0f);  // the rows' weighted sum; a zero before and after, for 2k - 1 and 2k + 2
    float* __restrict joined = buffer.data() + 1;
#pragma omp for schedule(static)
    for (int64_t item = 0; item < n * c * h; ++item) {
      const int64_t ky = item % h, ic = item / h % c, in = item / h / c;
      const Targets rows = targets_of(ky, h, inverse_h);
      const float shift = value_or(a.shift, in * c + ic, 0.0f);
      std::fill(joined, joined + 2 * w, 0.0f);
      for (int i = 0; i < 4; ++i) {
        const int64_t oy = 2 * ky - 1 + i;
        if (oy < 0 || oy >= 2 * h) continue;
        const T* __restrict dout = row_of<T>(a.a, in, ic, oy);
        const float weight = rows.weight[i];
        if (a.gate.data) {
          const T* __restrict gate = row_of<T>(a.gate, in, 0, oy);
#pragma omp simd
          for (int64_t x = 0; x < 2 * w; ++x)
            joined[x] += weight * (1 + to_float(gate[x])) * (to_float(dout[x]) + shift);
        } else {
#pragma omp simd
          for (int64_t x = 0; x < 2 * w; ++x) joined[x] += weight * (to_float(dout[x]) + shift);
        }
      }
      T* __restrict dy = row_of<T>(a.out, in, ic, ky);
      const float* __restrict column = weights.data();
#pragma omp simd
      for (int64_t k = 0; k < w; ++k)
        dy[k] = from_float<T>(column[k] * joined[2 * k - 1] + column[w + k] * joined[2 * k] +
                              column[2 * w + k] * joined[2 * k + 1] + column[3 * w + k] * joined[2 * k + 2]);
    }
  }
}

// One input of the gathering backward pass: the outputs that it goes to, with their weights.
template <typename T>
struct Taps {
  const T* data[16];
  float weight[16];
  int count = 0;
  float total = 0;  // of the weights: what a constant adds
};

// GROUPS * LANES channels of one input; the compiler keeps the sums in registers.
template <int GROUPS, typename T>
inline void gather_channels(const Taps<T>& taps, const float* shift, int64_t first, T* __restrict dy) {
  Lanes sum[GROUPS], value;
#pragma GCC unroll 4
  for (int g = 0; g < GROUPS; ++g) {
    sum[g] = Lanes{};
    if (shift) {
      load(shift + first + g * LANES, value);
      sum[g] = taps.total * value;
    }
  }
  for (int t = 0; t < taps.count; ++t) {
#pragma GCC unroll 4
    for (int g = 0; g < GROUPS; ++g) {
      load(taps.data[t] + first + g * LANES, value);
      sum[g] += taps.weight[t] * value;
    }
  }
#pragma GCC unroll 4
  for (int g = 0; g < GROUPS; ++g) store(sum[g], dy + first + g * LANES);
}

template <typename T>
inline void gather_channel(const Taps<T>& taps, const float* shift, int64_t c, T* dy) {
  float sum = shift ? taps.total * shift[c] : 0.0f;
  for (int t = 0; t < taps.count; ++t) sum += taps.weight[t] * to_float(taps.data[t][c]);
  dy[c] = from_float<T>(sum);
}

template <typename T>
void up_backward_channels_last(const Arguments& a, int threads) {
  const int64_t n = a.shape.n, c = a.shape.c, h = a.shape.h, w = a.shape.w;
  const float inverse_h = inverse_of(h), inverse_w = inverse_of(w);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t item = 0; item < n * h; ++item) {
    const int64_t ky = item % h, in = item / h;
    const Targets rows = targets_of(ky, h, inverse_h);
    const float* shift = a.shift ? a.shift + in * c : nullptr;
    for (int64_t kx = 0; kx < w; ++kx) {
      const Targets columns = targets_of(kx, w, inverse_w);
      Taps<T> taps;
      for (int i = 0; i < 4; ++i)
        for (int j = 0; j < 4; ++j) {
          const int64_t oy = 2 * ky - 1 + i, ox = 2 * kx - 1 + j;
          if (oy < 0 || oy >= 2 * h || ox < 0 || ox >= 2 * w) continue;
          const float gate = a.gate.data ? 1 + to_float(row_of<T>(a.gate, in, 0, oy)[ox]) : 1.0f;
          taps.data[taps.count] = row_of<T>(a.a, in, 0, oy) + ox * a.a.w;
          taps.total += taps.weight[taps.count++] = rows.weight[i] * columns.weight[j] * gate;
        }
      T* dy = row_of<T>(a.out, in, 0, ky) + kx * a.out.w;
      int64_t first = 0;
      for (; first + 4 * LANES <= c; first += 4 * LANES) gather_channels<4>(taps, shift, first, dy);
      for (; first + LANES <= c; first += LANES) gather_channels<1>(taps, shift, first, dy);
      for (; first < c; ++first) gather_channel(taps, shift, first, dy);
    }
  }
}

template <typename T>
void gate_backward_contiguous(const Arguments& a, int threads) {
  const int64_t n = a.shape.n, c = a.shape.c, h = a.shape.h, w = a.shape.w;
  const ColumnWeights weights(w);
  const float inverse = inverse_of(h);
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> buffer(2 * w);
    float* __restrict sum = buffer.data();
#pragma omp for schedule(static)
    for (int64_t item = 0; item < n * 2 * h; ++item) {
      const int64_t oy = item % (2 * h), in = item / (2 * h);
      const Source rows = source_of(oy, h, inverse);
      std::fill(sum, sum + 2 * w, 0.0f);
      for (int64_t ic = 0; ic < c; ++ic) {
        const float shift = value_or(a.shift, in * c + ic, 0.0f);
        const T* __restrict dout = row_of<T>(a.a, in, ic, oy);
        upsample_row(row_of<T>(a.b, in, ic, rows.first), row_of<T>(a.b, in, ic, rows.second), rows.first_weight,
                     rows.second_weight, w, weights,
                     [=](int64_t x, float value) { sum[x] += (to_float(dout[x]) + shift) * value; });
      }
      T* __restrict out = row_of<T>(a.out, in, 0, oy);
      for (int64_t x = 0; x < 2 * w; ++x) out[x] = from_float<T>(sum[x]);
    }
  }
}

template <typename T>
void gate_backward_channels_last(const Arguments& a, int threads) {
  const int64_t n = a.shape.n, c = a.shape.c, h = a.shape.h, w = a.shape.w;
  const float inverse_h = inverse_of(h), inverse_w = inverse_of(w);
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> none(c, 0.0f);
#pragma omp for schedule(static)
    for (int64_t item = 0; item < n * 2 * h; ++item) {
      const int64_t oy = item % (2 * h), in = item / (2 * h);
      const Source rows = source_of(oy, h, inverse_h);
      const T *y0 = row_of<T>(a.b, in, 0, rows.first), *y1 = row_of<T>(a.b, in, 0, rows.second);
      const T* dout_row = row_of<T>(a.a, in, 0, oy);
      const float* __restrict shift = a.shift ? a.shift + in * c : none.data();
      T* out = row_of<T>(a.out, in, 0, oy);
      for (int64_t ox = 0; ox < 2 * w; ++ox) {
        const Source columns = source_of(ox, w, inverse_w);
        const float column0 = columns.first_weight, column1 = columns.second_weight;
        const float row0 = rows.first_weight, row1 = rows.second_weight;
        const T* __restrict y00 = y0 + columns.first * a.b.w, * __restrict y01 = y0 + columns.second * a.b.w;
        const T* __restrict y10 = y1 + columns.first * a.b.w, * __restrict y11 = y1 + columns.second * a.b.w;
        const T* __restrict dout = dout_row + ox * a.a.w;
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t ic = 0; ic < c; ++ic)
          sum += (to_float(dout[ic]) + shift[ic]) * interpolate(to_float(y00[ic]), to_float(y01[ic]), to_float(y10[ic]),
                                                                to_float(y11[ic]), row0, row1, column0, column1);
        out[ox * a.out.w] = from_float<T>(sum);
      }
    }
  }
}

// A plane [h, w] as one row where it has no gaps: short rows cost more than their elements.
bool without_gaps(const View& view, int64_t w) { return !view.data || view.h == w; }

template <typename T>
void affine_contiguous(const Arguments& a, int threads) {
  const bool dense = !a.sums && without_gaps(a.a, a.shape.w) && without_gaps(a.out, a.shape.w);
  const int64_t n = a.shape.n, c = a.shape.c, h = dense ? 1 : a.shape.h, w = dense ? a.shape.h * a.shape.w : a.shape.w;
#pragma omp parallel num_threads(threads)
  {
    Stage<T> stage(n * c * h * w, w);
#pragma omp for schedule(static)
    for (int64_t item = 0; item < n * c; ++item) {
      const int64_t plane = n * c - 1 - item;  // the last first: whoever summed them read these last
      const float scale = value_or(a.scale, plane, 1.0f), shift = value_or(a.shift, plane, 0.0f);
      for (int64_t iy = 0; iy < h; ++iy) {
        const T* x = row_of<T>(a.a, plane / c, plane % c, iy);
        T* out = row_of<T>(a.out, plane / c, plane % c, iy);
        for (int64_t first = 0; first < w; first += stage.step(w)) {
          const int64_t count = std::min(stage.step(w), w - first);
          const T* __restrict from = x + first;
          T* __restrict to = stage.place(out + first);
#pragma omp simd
          for (int64_t i = 0; i < count; ++i) to[i] = from_float<T>(to_float(from[i]) * scale + shift);
          stage.put(out + first, count);
        }
        if (a.sums) {
          float total = 0;
#pragma omp simd reduction(+ : total)
          for (int64_t ix = 0; ix < w; ++ix) total += to_float(x[ix]) * scale + shift;
          *sums_of(a, plane / c, iy, h, plane % c) = total;
        }
      }
    }
  }
}

template <typename T>
void affine_channels_last(const Arguments& a, int threads) {
  const int64_t n = a.shape.n, c = a.shape.c, h = a.shape.h, w = a.shape.w;
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> one(c, 1.0f), none(c, 0.0f);
    Stage<T> stage(n * c * h * w, c);
#pragma omp for schedule(static)
    for (int64_t item = 0; item < n * h; ++item) {
      const int64_t iy = item % h, in = item / h;
      const float* __restrict scale = a.scale ? a.scale + in * c : one.data();
      const float* __restrict shift = a.shift ? a.shift + in * c : none.data();
      float* __restrict sums = a.sums ? sums_of(a, in, iy, h, 0) : nullptr;
      if (sums) std::fill(sums, sums + c, 0.0f);
      for (int64_t ix = 0; ix < w; ++ix) {
        const T* __restrict x = row_of<T>(a.a, in, 0, iy) + ix * a.a.w;
        for (int64_t first = 0; first < c; first += stage.step(c)) {
          const int64_t last = std::min(first + stage.step(c), c);
          T* out = row_of<T>(a.out, in, 0, iy) + ix * a.out.w + first;
          T* __restrict to = stage.place(out);
#pragma omp simd
          for (int64_t ic = first; ic < last; ++ic)
            to[ic - first] = from_float<T>(to_float(x[ic]) * scale[ic] + shift[ic]);
          stage.put(out, last - first);
        }
        if (sums) {
#pragma omp simd
          for (int64_t ic = 0; ic < c; ++ic) sums[ic] += to_float(x[ic]) * scale[ic] + shift[ic];
        }
      }
    }
  }
}

template <typename T>
void dot_contiguous(const Arguments& a, int threads) {
  const int64_t n = a.shape.n, c = a.shape.c, h = a.shape.h, w = a.shape.w;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t plane = 0; plane < n * c; ++plane) {
    for (int64_t iy = 0; iy < h; ++iy) {
      const T* __restrict x = row_of<T>(a.a, plane / c, plane % c, iy);
      float total = 0;
      if (a.b.data) {
        const T* __restrict y = row_of<T>(a.b, plane / c, plane % c, iy);
#pragma omp simd reduction(+ : total)
        for (int64_t ix = 0; ix < w; ++ix) total += to_float(x[ix]) * to_float(y[ix]);
      } else {
#pragma omp simd reduction(+ : total)
        for (int64_t ix = 0; ix < w; ++ix) total += to_float(x[ix]);
      }
      *sums_of(a, plane / c, iy, h, plane % c) = total;
    }
  }
}

template <typename T>
void dot_channels_last(const Arguments& a, int threads) {
  const int64_t n = a.shape.n, c = a.shape.c, h = a.shape.h, w = a.shape.w;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t item = 0; item < n * h; ++item) {
    const int64_t iy = item % h, in = item / h;
    float* __restrict sums = sums_of(a, in, iy, h, 0);
    std::fill(sums, sums + c, 0.0f);
    for (int64_t ix = 0; ix < w; ++ix) {
      const T* __restrict x = row_of<T>(a.a, in, 0, iy) + ix * a.a.w;
      if (a.b.data) {
        const T* __restrict y = row_of<T>(a.b, in, 0, iy) + ix * a.b.w;
#pragma omp simd
        for (int64_t ic = 0; ic < c; ++ic) sums[ic] += to_float(x[ic]) * to_float(y[ic]);
      } else {
#pragma omp simd
        for (int64_t ic = 0; ic < c; ++ic) sums[ic] += to_float(x[ic]);
      }
    }
  }
}

// The kernels of a normalisation read up to three tensors side by side: OPTION says whether the one that may be lacking
// is there.
enum class Pass { moments, norm, norm_sums, norm_backward };

struct Pixel {
  float a, b, x, scale, shift, slope;
};

template <Pass P, bool OPTION>
inline float passed(const Pixel& p) {
  if (P == Pass::moments) return p.a - p.shift;
  if (P == Pass::norm) return relu(p.a * p.scale + p.shift + (OPTION ? p.b : 0.0f));
  const float g = P == Pass::norm_sums || OPTION ? (p.b <= 0.0f ? 0.0f : p.a) : p.a;
  return P == Pass::norm_sums ? g : g * p.scale + p.x * p.slope + p.shift;
}

template <Pass P, bool OPTION, typename T>
void pass_contiguous(const Arguments& a, int threads) {
  constexpr bool SUMS = P == Pass::moments || P == Pass::norm_sums,
                 B = P == Pass::norm_sums || (P != Pass::moments && OPTION);
  constexpr bool X = P == Pass::norm_sums || P == Pass::norm_backward,
                 OUT = P != Pass::moments && (P != Pass::norm_sums || OPTION);
  const bool dense = !SUMS && without_gaps(a.a, a.shape.w) && without_gaps(a.b, a.shape.w) &&
                     without_gaps(a.gate, a.shape.w) && without_gaps(a.out, a.shape.w);
  const int64_t n = a.shape.n, c = a.shape.c, h = dense ? 1 : a.shape.h, w = dense ? a.shape.h * a.shape.w : a.shape.w;
#pragma omp parallel num_threads(threads)
  {
    Stage<T> stage(OUT ? n * c * h * w : 0, w);
#pragma omp for schedule(static)
    for (int64_t plane = 0; plane < n * c; ++plane) {
      const int64_t in = plane / c, ic = plane % c;
      const float scale = value_or(a.scale, plane, 1.0f), shift = value_or(a.shift, plane, 0.0f);
      const float slope = value_or(a.slope, plane, 0.0f);
      for (int64_t iy = 0; iy < h; ++iy) {
        float first = 0, second = 0;
        for (int64_t begin = 0; begin < w; begin += stage.step(w)) {
          const int64_t count = std::min(stage.step(w), w - begin);
          const T* __restrict pa = row_of<T>(a.a, in, ic, iy) + begin;
          const T* __restrict pb = B ? row_of<T>(a.b, in, ic, iy) + begin : nullptr;
          const T* __restrict px = X ? row_of<T>(a.gate, in, ic, iy) + begin : nullptr;
          T* out = OUT ? row_of<T>(a.out, in, ic, iy) + begin : nullptr;
          T* __restrict to = OUT ? stage.place(out) : nullptr;
#pragma omp simd reduction(+ : first, second)
          for (int64_t i = 0; i < count; ++i) {
            const Pixel p{to_float(pa[i]), B ? to_float(pb[i]) : 0.0f, X ? to_float(px[i]) : 0.0f, scale, shift, slope};
            const float value = passed<P, OPTION>(p);
            if (OUT) to[i] = from_float<T>(value);
            if (SUMS) {
              first += value;
              second += value * (X ? p.x - shift : value);
            }
          }
          if (OUT) stage.put(out, count);
        }
        if (SUMS) {
          float* sums = sums_of(a, in, iy, h, ic);
          sums[0] = first;
          sums[c] = second;
        }
      }
    }
  }
}

template <Pass P, bool OPTION, typename T>
void pass_channels_last(const Arguments& a, int threads) {
  constexpr bool SUMS = P == Pass::moments || P == Pass::norm_sums,
                 B = P == Pass::norm_sums || (P != Pass::moments && OPTION);
  constexpr bool X = P == Pass::norm_sums || P == Pass::norm_backward,
                 OUT = P != Pass::moments && (P != Pass::norm_sums || OPTION);
  const int64_t n = a.shape.n, c = a.shape.c, h = a.shape.h, w = a.shape.w;
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> none(c, 0.0f);
#pragma omp for schedule(static)
    for (int64_t item = 0; item < n * h; ++item) {
      const int64_t iy = item % h, in = item / h;
      const float* __restrict scale = a.scale ? a.scale + in * c : none.data();
      const float* __restrict shift = a.shift ? a.shift + in * c : none.data();
      const float* __restrict slope = a.slope ? a.slope + in * c : none.data();
      float* __restrict first = SUMS ? sums_of(a, in, iy, h, 0) : nullptr;
      float* __restrict second = SUMS ? first + c : nullptr;
      if (SUMS) std::fill(first, first + 2 * c, 0.0f);
      for (int64_t ix = 0; ix < w; ++ix) {
        const T* __restrict pa = row_of<T>(a.a, in, 0, iy) + ix * a.a.w;
        const T* __restrict pb = B ? row_of<T>(a.b, in, 0, iy) + ix * a.b.w : nullptr;
        const T* __restrict px = X ? row_of<T>(a.gate, in, 0, iy) + ix * a.gate.w : nullptr;
        T* __restrict out = OUT ? row_of<T>(a.out, in, 0, iy) + ix * a.out.w : nullptr;
#pragma omp simd
        for (int64_t i = 0; i < c; ++i) {
          const Pixel p{to_float(pa[i]), B ? to_float(pb[i]) : 0.0f, X ? to_float(px[i]) : 0.0f, scale[i], shift[i],
                        slope[i]};
          const float value = passed<P, OPTION>(p);
          if (OUT) out[i] = from_float<T>(value);
          if (SUMS) {
            first[i] += value;
            second[i] += value * (X ? p.x - shift[i] : value);
          }
        }
      }
    }
  }
}

#define SCOAT_PASS(name, option)                                          \
  template <typename T>                                                   \
  void name##_contiguous(const Arguments& a, int threads) {               \
    return option ? pass_contiguous<Pass::name, true, T>(a, threads)      \
                  : pass_contiguous<Pass::name, false, T>(a, threads);    \
  }                                                                       \
  template <typename T>                                                   \
  void name##_channels_last(const Arguments& a, int threads) {            \
    return option ? pass_channels_last<Pass::name, true, T>(a, threads)   \
                  : pass_channels_last<Pass::name, false, T>(a, threads); \
  }
SCOAT_PASS(moments, false)
SCOAT_PASS(norm, a.b.data)
SCOAT_PASS(norm_sums, a.out.data)
SCOAT_PASS(norm_backward, a.b.data)
#undef SCOAT_PASS

}  // namespace

#define SCOAT_DEFINE(name)                                                                                         \
  void name(const Arguments& a, int threads) {                                                                     \
    threads = useful_threads(threads, a.shape.n * a.shape.c * a.shape.h * a.shape.w);                              \
    switch (a.dtype) {                                                                                             \
      case DType::float32:                                                                                         \
        return a.channels_last ? name##_channels_last<float>(a, threads) : name##_contiguous<float>(a, threads);   \
      case DType::float16:                                                                                         \
        return a.channels_last ? name##_channels_last<Half>(a, threads) : name##_contiguous<Half>(a, threads);     \
      case DType::bfloat16:                                                                                        \
        return a.channels_last ? name##_channels_last<BFloat>(a, threads) : name##_contiguous<BFloat>(a, threads); \
    }                                                                                                              \
  }
SCOAT_KERNELS(SCOAT_DEFINE)
#undef SCOAT_DEFINE

}  // namespace SCOAT_ISA
}  // namespace cpu
}  // namespace scoat
