// Versions, devices, and the list of kernels.
#include <atomic>
#include <vector>

#include "cuda/launch.cuh"

namespace clinfast {
namespace cuda {
namespace {

struct Kernel {
  const void *function;
  size_t shared_bytes;
};

std::atomic<bool> programmatic{false};

std::vector<Kernel> &kernels() {
  static std::vector<Kernel> list;
  return list;
}

}  // namespace

bool add_kernel(const void *kernel, size_t shared_bytes) {
  kernels().push_back({kernel, shared_bytes});
  return true;
}

void set_programmatic_launch(bool on) { programmatic = on; }

#if defined(__CUDACC__)

int capability() {
  static std::atomic<int> known[64];
  int device = 0, major = 0, minor = 0;
  if (cudaGetDevice(&device)) return 0;
  if (device < 64 && known[device]) return known[device];
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  if (device < 64) known[device] = 10 * major + minor;
  return 10 * major + minor;
}

bool programmatic_launch() { return programmatic && capability() >= 90; }

Versions versions() {
  Versions found{};
  cudaDriverGetVersion(&found.driver);
  cudaRuntimeGetVersion(&found.runtime);
  found.error = int(cudaGetDeviceCount(&found.devices));
  cudaGetLastError();
  return found;
}

const char *error_text(int code) { return cudaGetErrorString(cudaError_t(code)); }

int prepare() {
  int device, limit;
  cudaError_t error = cudaGetDevice(&device);
  if (!error) error = cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  for (const Kernel &kernel : kernels()) {
    cudaFuncAttributes loaded;
    if (!error) error = cudaFuncGetAttributes(&loaded, kernel.function);
    // What the card has no room for is never launched on it.
    if (!error && kernel.shared_bytes > 48 << 10 && int(kernel.shared_bytes) <= limit)
      error = cudaFuncSetAttribute(kernel.function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   int(kernel.shared_bytes));
  }
  return int(error);
}

int exchange_device(int device, int &before) {
  cudaError_t error = cudaGetDevice(&before);
  if (!error && before != device) error = cudaSetDevice(device);
  return int(error);
}

#else

int capability() { return 80; }
bool programmatic_launch() { return programmatic; }
Versions versions() { return {0, 0, 1, 0}; }
const char *error_text(int) { return "an error of the emulation"; }
int prepare() { return 0; }
int exchange_device(int device, int &before) {
  before = device;
  return 0;
}

#endif

}  // namespace cuda
}  // namespace clinfast
