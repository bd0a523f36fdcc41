// The launcher of shipped GPU kernels, as methods of clinfast._C.
#pragma once

#include <Python.h>

namespace clinfast {

extern PyMethodDef launch_methods[];

}  // namespace clinfast
