// csrc/hopper.cu as a module by itself.
#include <pybind11/pybind11.h>

namespace scoat::hopper {
void define(pybind11::module_& module);
}

PYBIND11_MODULE(_hopper, module) { scoat::hopper::define(module); }
