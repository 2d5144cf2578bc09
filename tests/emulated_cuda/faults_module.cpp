// emulated_cuda/faults.cpp as a module.
#include <pybind11/pybind11.h>

#include <string>

void run_without(const std::string& what, int blocks);

PYBIND11_MODULE(_faults, module) { module.def("run_without", run_without); }
