// The kernels as Python functions on raw addresses. The only file that knows Python; none knows torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <optional>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace py = pybind11;
using namespace scoat;

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
               const Tensor& gate, const Tensor& out, uintptr_t scale, uintptr_t shift, uintptr_t sums,
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
                                  reinterpret_cast<float*>(sums),
                                  sum_channels};
        launch(arguments, where);
      },
      py::arg("dtype"), py::arg("channels_last"), py::arg("shape"), py::arg("a"), py::arg("b") = Tensor(),
      py::arg("gate") = Tensor(), py::arg("out") = Tensor(), py::arg("scale") = 0, py::arg("shift") = 0,
      py::arg("sums") = 0, py::arg("sum_channels") = 0, py::arg("where"));
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
}
