// The kernels of amx.cpp as Python functions on raw addresses, and whether they can run: compiled for any CPU.
#include <cpuid.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <optional>

#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "amx.h"

namespace py = pybind11;

namespace scoat {
namespace amx {
namespace {

// Why the kernels cannot run here, or None where they can. Asks the system for the matrix registers.
std::optional<std::string> why_not() {
  unsigned a = 0, b = 0, c = 0, d = 0, more = 0, unused = 0;
  const bool known =
      __get_cpuid_count(7, 0, &a, &b, &c, &d) && __get_cpuid_count(7, 1, &more, &unused, &unused, &unused);
  const bool tiles = known && (d >> 24 & 1) && (d >> 22 & 1) && (more >> 5 & 1);  // AMX-TILE, AMX-BF16, AVX512-BF16
  __builtin_cpu_init();
  if (!tiles || !__builtin_cpu_supports("avx512bw") || !__builtin_cpu_supports("avx512vl"))
    return "needs a CPU with AMX for bfloat16";
#ifdef __linux__
  constexpr long REQUEST = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  if (syscall(SYS_arch_prctl, REQUEST, TILE_DATA)) return "was not given the registers of AMX by the system";
  return std::nullopt;
#else
  return "asks for the registers of AMX on Linux only";
#endif
}

// Features as Python passes them: address, three steps and channels; None where there are none.
using Given = std::optional<std::array<int64_t, 5>>;
using Size = std::array<int64_t, 3>;      // slices, height and width
using Packed = std::array<uintptr_t, 2>;  // weights and bias

template <typename T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

Features features(const Given& given) {
  if (!given) return {nullptr, 0, 0, 0, 0};
  const auto& f = *given;
  return {reinterpret_cast<uint16_t*>(f[0]), f[1], f[2], f[3], f[4]};
}

Weights weights(const Packed& packed) { return {pointer<const uint16_t>(packed[0]), pointer<const float>(packed[1])}; }

Inputs inputs(const Size& size, const Given& first, const Given& second, bool below) {
  return {size[0], size[1], size[2], {features(first), features(second)}, below};
}

}  // namespace

void define(py::module_& parent) {
  using Release = py::call_guard<py::gil_scoped_release>;
  auto module = parent.def_submodule("amx", "Steps of the engine in bfloat16, for a CPU with AMX.");
  module.def("why_not", &why_not);
  module.def("parts", &parts);
  module.def(
      "convolve",
      [](const Size& size, const Given& first, const Given& second, bool below, int64_t taps, uintptr_t scale,
         const Packed& scaling, int64_t channels, uintptr_t scaled, int64_t scaled_step, const Packed& packed,
         const Given& out, bool relu, bool residual_before, bool residual_after, const Given& pooled, uintptr_t sums,
         int64_t sum_channels, const Packed& shortcut, const Given& shortcut_out, bool shortcut_relu, int threads) {
        convolve({inputs(size, first, second, below),
                  taps,
                  {pointer<const float>(scale), pointer<const float>(scaling[0]), pointer<const float>(scaling[1]),
                   channels, pointer<uint16_t>(scaled), scaled_step},
                  weights(packed),
                  features(out),
                  relu,
                  residual_before,
                  residual_after,
                  features(pooled),
                  pointer<float>(sums),
                  sum_channels,
                  weights(shortcut),
                  features(shortcut_out),
                  shortcut_relu},
                 threads);
      },
      py::kw_only(), py::arg("size"), py::arg("first"), py::arg("second"), py::arg("below"), py::arg("taps"),
      py::arg("scale"), py::arg("scaling"), py::arg("channels"), py::arg("scaled"), py::arg("scaled_step"),
      py::arg("packed"), py::arg("out"), py::arg("relu"), py::arg("residual_before"), py::arg("residual_after"),
      py::arg("pooled"), py::arg("sums"), py::arg("sum_channels"), py::arg("shortcut"), py::arg("shortcut_out"),
      py::arg("shortcut_relu"), py::arg("threads"), Release());
  module.def(
      "attend",
      [](const Size& size, const Given& row, const Given& below, const Packed& packed, uintptr_t psi, float bias,
         bool each, uintptr_t map, int threads) {
        attend({inputs(size, row, std::nullopt, false), features(below), weights(packed), pointer<const float>(psi),
                bias, each, pointer<uint16_t>(map)},
               threads);
      },
      py::kw_only(), py::arg("size"), py::arg("row"), py::arg("below"), py::arg("packed"), py::arg("psi"),
      py::arg("bias"), py::arg("each"), py::arg("map"), py::arg("threads"), Release());
  module.def(
      "output",
      [](const Size& size, const Given& source, int64_t classes, const Packed& packed, uintptr_t logits, uintptr_t mask,
         uintptr_t threshold, int threads) {
        output({inputs(size, source, std::nullopt, false), classes, weights(packed), pointer<float>(logits),
                pointer<uint8_t>(mask), pointer<const float>(threshold)},
               threads);
      },
      py::kw_only(), py::arg("size"), py::arg("source"), py::arg("classes"), py::arg("packed"), py::arg("logits"),
      py::arg("mask"), py::arg("threshold"), py::arg("threads"), Release());
}

}  // namespace amx
}  // namespace scoat
