// Adds the CUDA kernels to a Python module.
#pragma once

#include <pybind11/pybind11.h>

namespace clinfast {

void add_cuda(pybind11::module_ m);

}  // namespace clinfast
