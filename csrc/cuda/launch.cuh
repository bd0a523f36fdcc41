// Launches by kernel, and the list of all kernels that are ever launched.
#pragma once

#include <cstddef>

#include "cuda/device.cuh"
#include "cuda/kernels.h"

namespace clinfast {
namespace cuda {

// Adds to the list that prepare() walks. `shared_bytes` is the dynamic shared memory of its largest launch.
bool add_kernel(const void *kernel, size_t shared_bytes);

// Major and minor compute capability of the current device, as 90 for 9.0.
int capability();

// Programmatic dependent launch (CUDA C++ Programming Guide, "Programmatic Dependent Launch and Synchronization"): the
// blocks of a kernel are set up while the kernel before it in the stream ends. Every kernel here begins with
// after_earlier_grids(), which returns once all earlier grids are through and their writes are seen. So none touches
// memory that an earlier one reads or writes, and, since each waits, the end of one is the end of all before it.
bool programmatic_launch();

template <auto kernel, size_t SharedBytes> struct Registration {
  static const bool done;
};
template <auto kernel, size_t SharedBytes>
const bool Registration<kernel, SharedBytes>::done =
    add_kernel(reinterpret_cast<const void *>(kernel), SharedBytes);

// `after_kernel`: what comes before in the stream is no copy or fill of this very call.
template <auto kernel, size_t SharedBytes = 0, bool after_kernel = true, typename Args>
int launch(dim3 grid, dim3 block, Stream stream, const Args &args) {
  (void)Registration<kernel, SharedBytes>::done;
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return 0;
#if defined(__CUDACC__)
  void *parameters[] = {const_cast<Args *>(&args)};
  if (after_kernel && programmatic_launch()) {
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = grid, config.blockDim = block, config.dynamicSmemBytes = SharedBytes;
    config.stream = static_cast<cudaStream_t>(stream), config.attrs = &attribute, config.numAttrs = 1;
    return int(cudaLaunchKernelExC(&config, reinterpret_cast<const void *>(kernel), parameters));
  }
  return int(cudaLaunchKernel(reinterpret_cast<const void *>(kernel), grid, block, parameters, SharedBytes,
                              static_cast<cudaStream_t>(stream)));
#else
  (void)stream;
  emulation::run(kernel, grid, block, SharedBytes, args);
  return 0;
#endif
}

inline bool on_16_bytes(const void *pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

// Elementwise kernels count their 16-byte vectors in 32 bits: 64 GB, far above any batch.
constexpr int64_t kMostVectors = 0xFFFF0000;
constexpr int kTooLarge = 1;  // cudaErrorInvalidValue

inline unsigned blocks(int64_t work, int64_t a_block) { return unsigned((work + a_block - 1) / a_block); }

}  // namespace cuda
}  // namespace clinfast
