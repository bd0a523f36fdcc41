// Small kernels, right and with a fault that the emulation must show. Returns 0, or 1 where the emulation stopped.
#include "cuda/launch.cuh"

namespace clinfast {
namespace cuda {

bool add_kernel(const void *, size_t) { return true; }
bool programmatic_launch() { return false; }

namespace {

enum Fault { none, no_wait, no_barrier, no_barrier_after, some_threads, two_operations, no_grid_wait };

struct Args {
  const float *x;
  float *y;
  int fault;
};

// y[i] = the sum of x[i ^ 32] over two rounds, through shared memory by cp.async.
__global__ void exchange(const Args args) {
  if (args.fault != no_grid_wait || threadIdx.x < 32) after_earlier_grids();
  CLINFAST_SHARED(float, tile, 64);
  const int i = threadIdx.x;
  float sum = 0;
  for (int round = 0; round < 2; round++) {
    if (i % 4 == 0) cp_async_16(tile + i, args.x + 64 * round + i, true);
    cp_async_commit();
    if (args.fault != no_wait) cp_async_wait<0>();
    if (args.fault == some_threads ? i < 40 : args.fault != no_barrier) __syncthreads();
    sum += tile[i ^ 32];
    if (args.fault != no_barrier_after) __syncthreads();
  }
  if (args.fault == two_operations && i % 2)
    __syncwarp();
  else if (args.fault == two_operations)
    sum += __shfl_xor_sync(0xFFFFFFFFu, sum, 0);
  args.y[i] = sum;
}

}  // namespace
}  // namespace cuda
}  // namespace clinfast

using namespace clinfast::cuda;

extern "C" int run_exchange(const float *x, float *y, int fault, int reverse) {
  emulation::machine.reverse = reverse;
  try {
    return launch<&exchange>(dim3(1), dim3(64), nullptr, Args{x, y, fault});
  } catch (const std::runtime_error &) {
    return 1;
  }
}

// c = a b^T for 16-bit a[16, 16] and b[8, 16], by ldmatrix and mma.
struct Product {
  const bfloat16 *a, *b;
  float *c;
};

__global__ void multiply(const Product args) {
  after_earlier_grids();
  CLINFAST_SHARED(bfloat16, a, 256);
  CLINFAST_SHARED(bfloat16, b, 256);
  const int lane = threadIdx.x;
  for (int i = lane; i < 256; i += 32) a[i] = args.a[i], b[i] = args.b[i % 128];
  __syncwarp();
  uint32_t left[4], right[4];
  load_matrices<false>(left, a + lane % 16 * 16 + lane / 16 * 8);
  load_matrices<false>(right, b + lane % 8 * 16 + lane / 8 % 2 * 8);
  float c[4] = {};
  const uint32_t pair[2] = {right[0], right[1]};
  mma<bfloat16>(c, left, pair);
  for (int i = 0; i < 4; i++) args.c[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = c[i];
}

extern "C" void run_multiply(const void *a, const void *b, float *c) {
  launch<&multiply>(dim3(1), dim3(32), nullptr,
                    Product{static_cast<const bfloat16 *>(a), static_cast<const bfloat16 *>(b), c});
}
