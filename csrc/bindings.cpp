// The kernels as Python functions on raw addresses. Only this file and hopper_bindings.cpp know Python; none knows
// torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <optional>
#include <stdexcept>
#include <string>

#include "engine.h"
#include "kernels.h"

namespace py = pybind11;
using namespace scoat;

#ifdef SCOAT_HOPPER
namespace scoat::hopper {
void define(py::module_& module);
}
#endif

#ifdef SCOAT_AMX
namespace scoat::amx {
void define(py::module_& module);
}
#endif

namespace {

// A tensor as Python passes it: address and four steps in elements; None where there is none.
using Tensor = std::optional<std::array<int64_t, 5>>;

View view(const Tensor& tensor) {
  if (!tensor) return {nullptr, 0, 0, 0, 0};
  const auto& t = *tensor;
  return {reinterpret_cast<void*>(t[0]), t[1], t[2], t[3], t[4]};
}

template <typename Launch>
void define(py::module_& module, const char* name, Launch launch) {
  module.def(
      name,
      [launch](int dtype, bool channels_last, const std::array<int64_t, 4>& shape, const Tensor& a, const Tensor& b,
               const Tensor& gate, const Tensor& out, uintptr_t scale, uintptr_t shift, uintptr_t slope, uintptr_t sums,
               int64_t sum_channels, uintptr_t where) {
        const Arguments arguments{static_cast<DType>(dtype),
                                  channels_last,
                                  {shape[0], shape[1], shape[2], shape[3]},
                                  view(a),
                                  view(b),
                                  view(gate),
                                  view(out),
                                  reinterpret_cast<const float*>(scale),
                                  reinterpret_cast<const float*>(shift),
                                  reinterpret_cast<const float*>(slope),
                                  reinterpret_cast<float*>(sums),
                                  sum_channels};
        launch(arguments, where);
      },
      py::arg("dtype"), py::arg("channels_last"), py::arg("shape"), py::arg("a"), py::arg("b") = Tensor(),
      py::arg("gate") = Tensor(), py::arg("out") = Tensor(), py::arg("scale") = 0, py::arg("shift") = 0,
      py::arg("slope") = 0, py::arg("sums") = 0, py::arg("sum_channels") = 0, py::arg("where"));
}

// Features as Python passes them: address, three steps and channels; None where there are none.
Features features(const Tensor& tensor) {
  if (!tensor) return {nullptr, 0, 0, 0, 0};
  const auto& t = *tensor;
  return {reinterpret_cast<float*>(t[0]), t[1], t[2], t[3], t[4]};
}

template <typename T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

using Size = std::array<int64_t, 3>;      // slices, height and width
using Packed = std::array<uintptr_t, 2>;  // weights and bias

Panels panels(const Packed& packed) { return {pointer<const float>(packed[0]), pointer<const float>(packed[1])}; }

// The steps of the inference engine.
void define_steps(py::module_& module) {
  using Release = py::call_guard<py::gil_scoped_release>;
  module.def("panel", &cpu::panel);
  module.def(
      "convolve",
      [](const Size& size, int64_t tiles, const Tensor& first, const Tensor& second, uintptr_t scale,
         const Packed& packed, const Tensor& out, bool relu, bool residual_before, bool residual_after,
         const Tensor& pooled, uintptr_t sums, int64_t sum_channels, const Packed& shortcut, const Tensor& shortcut_out,
         bool shortcut_relu, bool shortcut_scaled, int threads) {
        cpu::convolve({size[0],
                       size[1],
                       size[2],
                       tiles,
                       {features(first), features(second)},
                       pointer<const float>(scale),
                       panels(packed),
                       features(out),
                       relu,
                       residual_before,
                       residual_after,
                       features(pooled),
                       pointer<float>(sums),
                       sum_channels,
                       panels(shortcut),
                       features(shortcut_out),
                       shortcut_relu,
                       shortcut_scaled},
                      threads);
      },
      py::kw_only(), py::arg("size"), py::arg("tiles"), py::arg("first"), py::arg("second"), py::arg("scale"),
      py::arg("packed"), py::arg("out"), py::arg("relu"), py::arg("residual_before"), py::arg("residual_after"),
      py::arg("pooled"), py::arg("sums"), py::arg("sum_channels"), py::arg("shortcut"), py::arg("shortcut_out"),
      py::arg("shortcut_relu"), py::arg("shortcut_scaled"), py::arg("threads"), Release());
  module.def(
      "project",
      [](const Size& size, const Tensor& source, const Packed& packed, const Tensor& out, int threads) {
        cpu::project({size[0], size[1], size[2], features(source), panels(packed), features(out)}, threads);
      },
      py::kw_only(), py::arg("size"), py::arg("source"), py::arg("packed"), py::arg("out"), py::arg("threads"),
      Release());
  module.def(
      "attend",
      [](const Size& size, const Tensor& row, const Tensor& below, const Packed& packed, uintptr_t psi, float bias,
         bool each, uintptr_t map, int threads) {
        cpu::attend({size[0], size[1], size[2], features(row), features(below), panels(packed),
                     pointer<const float>(psi), bias, each, pointer<float>(map)},
                    threads);
      },
      py::kw_only(), py::arg("size"), py::arg("row"), py::arg("below"), py::arg("packed"), py::arg("psi"),
      py::arg("bias"), py::arg("each"), py::arg("map"), py::arg("threads"), Release());
  module.def(
      "output",
      [](const Size& size, int64_t tiles, const Tensor& source, int64_t classes, const Packed& packed, uintptr_t logits,
         uintptr_t mask, uintptr_t threshold, int threads) {
        cpu::output({size[0], size[1], size[2], tiles, features(source), classes, panels(packed),
                     pointer<float>(logits), pointer<uint8_t>(mask), pointer<const float>(threshold)},
                    threads);
      },
      py::kw_only(), py::arg("size"), py::arg("tiles"), py::arg("source"), py::arg("classes"), py::arg("packed"),
      py::arg("logits"), py::arg("mask"), py::arg("threshold"), py::arg("threads"), Release());
  module.def(
      "weight_gradient",
      [](const Size& size, int64_t tiles, int64_t parts, const Tensor& source, const Tensor& gradient, uintptr_t sums,
         uintptr_t out, int threads) {
        cpu::weight_gradient({size[0], size[1], size[2], tiles, parts, features(source), features(gradient),
                              pointer<float>(sums), pointer<float>(out)},
                             threads);
      },
      py::kw_only(), py::arg("size"), py::arg("tiles"), py::arg("parts"), py::arg("source"), py::arg("gradient"),
      py::arg("sums"), py::arg("out"), py::arg("threads"), Release());
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "The fused kernels in C++: on the CPU with OpenMP, and in CUDA where they were built with nvcc.";
  auto on_cpu = module.def_submodule("cpu", "`where` is the number of threads.");
  on_cpu.def("tiles", &cpu::tiles);
  on_cpu.def("instruction_set", &cpu::instruction_set);
#define SCOAT_DEFINE(name)                                                  \
  define(on_cpu, #name, [](const Arguments& arguments, uintptr_t threads) { \
    py::gil_scoped_release release;                                         \
    cpu::name(arguments, int(threads));                                     \
  });
  SCOAT_KERNELS(SCOAT_DEFINE)
#undef SCOAT_DEFINE
  define_steps(on_cpu);
#ifdef SCOAT_AMX
  amx::define(module);
#endif
#ifdef SCOAT_CUDA
  auto on_cuda = module.def_submodule("cuda", "`where` is the stream.");
  on_cuda.def("tiles", &cuda::tiles);
  on_cuda.def("why_not", &cuda::why_not);
#define SCOAT_DEFINE(name)                                                                             \
  define(on_cuda, #name, [](const Arguments& arguments, uintptr_t stream) {                            \
    const int error = cuda::name(arguments, reinterpret_cast<void*>(stream));                          \
    if (error) throw std::runtime_error(std::string(#name ": CUDA error ") + cuda::error_name(error)); \
  });
  SCOAT_KERNELS(SCOAT_DEFINE)
#undef SCOAT_DEFINE
#endif
#ifdef SCOAT_HOPPER
  hopper::define(module);
#endif
}
