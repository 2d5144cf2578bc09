// The engine's convolutions on Hopper as Python functions on raw addresses.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>

#include "hopper.h"

namespace py = pybind11;

namespace scoat {
namespace hopper {
namespace {

using Tensor = std::optional<std::array<int64_t, 5>>;  // address, steps from slice, row and pixel to the next, channels
using Matrix = std::tuple<uintptr_t, int64_t, uintptr_t, float>;  // as `Weights`
using Size = std::array<int64_t, 3>;                              // slices, height and width

template <typename T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

Features features(const Tensor& tensor) {
  if (!tensor) return {nullptr, 0, 0, 0, 0};
  const auto& t = *tensor;
  return {reinterpret_cast<void*>(t[0]), t[1], t[2], t[3], t[4]};
}

Weights weights_of(const Matrix& m) {
  const auto& [weights, step, bias, unit] = m;
  return {pointer<const void>(weights), step, pointer<const float>(bias), unit};
}

void check(const char* name, int error) {
  if (error) throw std::runtime_error(std::string(name) + ": CUDA error " + std::to_string(error));
}

template <typename T>
void define_for(py::module_& module) {
  module.def(
      "convolve",
      [](bool planes, bool wide, const Size& size, const Tensor& first, const Tensor& second, const Tensor& below,
         uintptr_t attention, const Matrix& weights, int channels, const Tensor& out, bool relu, const Tensor& residual,
         bool after, const Tensor& pooled, uintptr_t sums, int64_t sum_channels, const Matrix& shortcut,
         const Tensor& shortcut_out, bool shortcut_relu, const Tensor& taps, uintptr_t tap_weights, uintptr_t stream) {
        const Convolution convolution{planes,
                                      wide,
                                      size[0],
                                      size[1],
                                      size[2],
                                      {features(first), features(second)},
                                      features(below),
                                      pointer<const void>(attention),
                                      weights_of(weights),
                                      channels,
                                      features(out),
                                      relu,
                                      features(residual),
                                      after,
                                      features(pooled),
                                      pointer<float>(sums),
                                      sum_channels,
                                      weights_of(shortcut),
                                      features(shortcut_out),
                                      shortcut_relu,
                                      features(taps),
                                      pointer<const void>(tap_weights)};
        check("convolve", convolve<T>(convolution, pointer<void>(stream)));
      },
      py::kw_only(), py::arg("planes"), py::arg("wide"), py::arg("size"), py::arg("first"), py::arg("second"),
      py::arg("below"), py::arg("attention"), py::arg("weights"), py::arg("channels"), py::arg("out"), py::arg("relu"),
      py::arg("residual"), py::arg("after"), py::arg("pooled"), py::arg("sums"), py::arg("sum_channels"),
      py::arg("shortcut"), py::arg("shortcut_out"), py::arg("shortcut_relu"), py::arg("taps"), py::arg("tap_weights"),
      py::arg("stream"));
  module.def(
      "scale",
      [](int64_t n, uintptr_t weights, int64_t vectors, int64_t inner, int64_t taps, int64_t pieces, int64_t chunks,
         uintptr_t factors, int64_t factors_step, uintptr_t out, int64_t out_step, uintptr_t stream) {
        const Scaling scaling{n,
                              pointer<const float>(weights),
                              vectors,
                              inner,
                              taps,
                              pieces,
                              chunks,
                              pointer<const float>(factors),
                              factors_step,
                              pointer<void>(out),
                              out_step};
        check("scale", scale<T>(scaling, pointer<void>(stream)));
      },
      py::kw_only(), py::arg("n"), py::arg("weights"), py::arg("vectors"), py::arg("inner"), py::arg("taps"),
      py::arg("pieces"), py::arg("chunks"), py::arg("factors"), py::arg("factors_step"), py::arg("out"),
      py::arg("out_step"), py::arg("stream"));
  module.def(
      "gate_sums",
      [](const Size& size, const Tensor& below, uintptr_t attention, uintptr_t sums, int64_t sum_channels,
         uintptr_t stream) {
        const GateSums gate{
            size[0],     size[1], size[2], features(below), pointer<const void>(attention), pointer<float>(sums),
            sum_channels};
        check("gate_sums", gate_sums<T>(gate, pointer<void>(stream)));
      },
      py::kw_only(), py::arg("size"), py::arg("below"), py::arg("attention"), py::arg("sums"), py::arg("sum_channels"),
      py::arg("stream"));
  module.def(
      "tap_sums",
      [](const Size& size, uintptr_t taps, uintptr_t bias, uintptr_t threshold, uintptr_t logits, uintptr_t mask,
         uintptr_t stream) {
        const TapSums s{size[0],
                        size[1],
                        size[2],
                        pointer<const void>(taps),
                        pointer<const float>(bias),
                        pointer<const float>(threshold),
                        pointer<float>(logits),
                        pointer<uint8_t>(mask)};
        check("tap_sums", tap_sums<T>(s, pointer<void>(stream)));
      },
      py::kw_only(), py::arg("size"), py::arg("taps"), py::arg("bias"), py::arg("threshold"), py::arg("logits"),
      py::arg("mask"), py::arg("stream"));
}

}  // namespace

// `hopper`, a submodule with one for each dtype.
void define(py::module_& module) {
  auto all = module.def_submodule("hopper", "The engine's convolutions on Hopper's tensor cores.");
  all.def("why_not", &why_not<BFloat>);
  all.def("has_kernel", &has_kernel);
  all.def("has_taps", &has_taps);
  all.def("has_gate_sums", &has_gate_sums);
  all.def("cut", [](int channels, bool shortcut) {
    const Cut cut = cut_of(channels, shortcut);
    return std::array<int, 6>{cut.outputs, cut.height, cut.width, cut.depth, cut.slots, cut.zeros};
  });
  all.attr("SUMMED") = SUMMED;
  all.attr("GROUPS") = GROUPS;
  auto half = all.def_submodule("float16"), bfloat = all.def_submodule("bfloat16");
  auto eight = all.def_submodule("float8_e4m3fn");
  define_for<Half>(half);
  define_for<BFloat>(bfloat);
  define_for<E4M3>(eight);
}

}  // namespace hopper
}  // namespace scoat
