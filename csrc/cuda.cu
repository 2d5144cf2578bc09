// The kernels in CUDA. A thread holds 16 bytes of each tensor: channels in channels-last, else columns; where sizes,
// steps or addresses do not allow that it holds one element (channels-last) or reads them one by one (columns).
#include <string>

#include "cuda_channels_last.h"
#include "cuda_contiguous.h"

namespace scoat {
namespace cuda {
namespace {

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
