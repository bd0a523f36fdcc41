// The CUDA bindings as a Python module, with the kernels under the emulation.
#include "cuda_bindings.h"

#include "cuda_emulation.h"

PYBIND11_MODULE(clinfast_cuda_emulated, m) {
  clinfast::add_cuda(m);
  m.def("set_reverse", [](bool reverse) { emulation::machine.reverse = reverse; },
        "Run the threads of a block from the last to the first.");
}
