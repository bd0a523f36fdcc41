// A CUDA kernel on the CPU, from the same source: blocks one after the other, the threads of a block as fibers. Every
// warp operation waits until the 32 lanes have come and is then done for all of them; shared memory starts as 0xFF
// (NaN) in every block; a cp.async lands only when its group is waited for. A warp runs as far as it can before the
// next one does, from the first to the last or from the last to the first, so that many a missing barrier shows. What this
// checks is arithmetic, indexing and waits. It cannot see every race between warps, nor the memory model.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <deque>
#include <functional>
#include <limits>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __restrict__

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(16) uint4 { uint32_t x, y, z, w; };
struct alignas(8) uint2 { uint32_t x, y; };
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

namespace emulation {

struct Copy {
  void *to;
  const void *from;
  int bytes;  // of 16; the rest is zero
};

struct Fiber {
  jmp_buf where;
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  dim3 thread;
  int rank = 0;
  bool started = false, finished = true, waiting = false, after_earlier_grids = false;
  size_t shared_used = 0;
  std::vector<Copy> open;
  std::deque<std::vector<Copy>> groups;
};

struct Meeting {  // of the lanes of a warp, or of the threads of a block
  int arrived = 0;
  const char *what = nullptr;
  void *slots[32];
};

constexpr size_t kStack = 256 << 10, kShared = 256 << 10;

struct Machine {
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<Meeting> warps;
  Meeting block;
  jmp_buf main;
  std::function<void()> body;
  Fiber *current = nullptr;
  dim3 block_index, block_dim, grid_dim;
  int threads = 0;
  bool reverse = false;
  std::string error;
  std::unique_ptr<char[]> memory{new char[kShared + 1024]};
  char *shared = reinterpret_cast<char *>((reinterpret_cast<uintptr_t>(memory.get()) + 1023) / 1024 * 1024);
  size_t dynamic_bytes = 0;
};

inline Machine machine;

[[noreturn]] inline void fail(const std::string &what) {
  machine.error = what + " (block " + std::to_string(machine.block_index.x) + ", thread " +
                  std::to_string(machine.current->rank) + ")";
  _longjmp(machine.main, 1);
}

void enter();

inline void switch_to(Fiber *next) {
  Fiber *from = machine.current;
  machine.current = next;
  if (_setjmp(from->where)) return;
  if (next->started) _longjmp(next->where, 1);
  next->started = true;
  setcontext(&next->context);
}

// The next thread of ranks [first, first + count) that can run, in the machine's order, starting after the current.
inline Fiber *runnable(int first, int count) {
  Machine &m = machine;
  const int own = (m.current->rank - first + count) % count;
  for (int step = 1; step <= count; step++) {
    Fiber *next = m.fibers[first + (own + (m.reverse ? count - step : step)) % count].get();
    if (!next->finished && !next->waiting) return next;
  }
  return nullptr;
}

// A warp runs as far as it can before another one does; back to the caller of the block where all have finished.
inline void yield() {
  Machine &m = machine;
  Fiber *next = runnable(m.current->rank / 32 * 32, 32);
  if (!next) next = runnable(0, m.threads);
  if (next == m.current) return;
  if (next) return switch_to(next);
  for (int i = 0; i < m.threads; i++)
    if (!m.fibers[i]->finished) fail("deadlock: a barrier or warp operation is not reached by all of its threads");
  if (!_setjmp(m.current->where)) _longjmp(m.main, 2);
}

inline void enter() {
  for (;;) {
    machine.body();
    machine.current->finished = true;
    yield();
  }
}

template <typename Work> void meet(Meeting &meeting, int first, int size, const char *what, Work work) {
  Machine &m = machine;
  if (meeting.arrived == 0) meeting.what = what;
  if (meeting.what != what) fail(std::string("threads meet at different operations: ") + meeting.what + ", " + what);
  if (++meeting.arrived < size) {
    m.current->waiting = true;
    yield();
    return;
  }
  meeting.arrived = 0;
  work();
  for (int i = first; i < first + size; i++) m.fibers[i]->waiting = false;
}

// Each lane brings a slot; the last to come does the work for all.
template <typename Slot, typename Work> void collective(const char *what, Slot &mine, Work work) {
  int warp = machine.current->rank / 32;
  Meeting &meeting = machine.warps[warp];
  meeting.slots[machine.current->rank % 32] = &mine;
  meet(meeting, warp * 32, 32, what, [&] { work(reinterpret_cast<Slot **>(meeting.slots)); });
}

inline void land(const std::vector<Copy> &copies) {
  for (const Copy &copy : copies) {
    char bytes[16] = {};
    memcpy(bytes, copy.from, copy.bytes);
    memcpy(copy.to, bytes, 16);
  }
}

inline void prepare_fibers(int threads) {
  Machine &m = machine;
  while (int(m.fibers.size()) < threads) {
    auto fiber = std::make_unique<Fiber>();
    fiber->rank = int(m.fibers.size());
    fiber->stack.reset(new char[kStack]);
    m.fibers.push_back(std::move(fiber));
  }
  for (auto &fiber : m.fibers) {
    if (fiber->started) continue;
    getcontext(&fiber->context);
    fiber->context.uc_stack.ss_sp = fiber->stack.get();
    fiber->context.uc_stack.ss_size = kStack;
    fiber->context.uc_link = nullptr;
    makecontext(&fiber->context, enter, 0);
  }
}

inline void run_block(int threads, dim3 block) {
  Machine &m = machine;
  memset(m.shared, 0xFF, kShared);
  m.block = Meeting();
  m.warps.assign((threads + 31) / 32, Meeting());
  for (int i = 0; i < threads; i++) {
    Fiber &fiber = *m.fibers[i];
    fiber.thread = dim3(i % block.x, i / block.x % block.y, i / (block.x * block.y));
    fiber.finished = fiber.waiting = fiber.after_earlier_grids = false;
    fiber.shared_used = m.dynamic_bytes;
    fiber.open.clear();
    fiber.groups.clear();
  }
  int outcome = _setjmp(m.main);
  if (outcome == 0) {
    Fiber *first = m.fibers[m.reverse ? threads - 1 : 0].get();
    m.current = first;
    if (first->started) _longjmp(first->where, 1);
    first->started = true;
    setcontext(&first->context);
  }
  if (outcome == 2)
    for (int i = 0; i < threads; i++)
      if (!m.fibers[i]->after_earlier_grids)
        throw std::runtime_error("emulation: thread " + std::to_string(i) + " did not wait for earlier grids");
  if (outcome == 1) {
    for (auto &fiber : m.fibers) fiber->started = false, fiber->finished = true;
    throw std::runtime_error("emulation: " + m.error);
  }
}

template <typename Kernel, typename Args>
void run(Kernel kernel, dim3 grid, dim3 block, size_t dynamic_bytes, const Args &args) {
  Machine &m = machine;
  int threads = block.x * block.y * block.z;
  if (threads % 32 || threads > 1024) throw std::runtime_error("emulation: whole warps, at most 1,024 threads");
  m.threads = threads;
  m.grid_dim = grid;
  m.block_dim = block;
  m.dynamic_bytes = (dynamic_bytes + 127) / 128 * 128;
  m.body = [=] { kernel(args); };
  prepare_fibers(threads);
  for (unsigned z = 0; z < grid.z; z++)
    for (unsigned y = 0; y < grid.y; y++)
      for (unsigned x = 0; x < grid.x; x++) {
        m.block_index = dim3(x, y, z);
        run_block(threads, block);
      }
}

}  // namespace emulation

#define threadIdx (emulation::machine.current->thread)
#define blockIdx (emulation::machine.block_index)
#define blockDim (emulation::machine.block_dim)
#define gridDim (emulation::machine.grid_dim)

inline void __syncthreads() {
  emulation::Machine &m = emulation::machine;
  emulation::meet(m.block, 0, m.threads, "__syncthreads", [] {});
}

inline void __syncwarp() {
  int nothing = 0;
  emulation::collective("__syncwarp", nothing, [](int **) {});
}

namespace emulation {
template <typename T> struct Shuffle { T in, out; int source; };

template <typename T> T shuffle(const char *what, T value, int source) {
  Shuffle<T> mine{value, value, source & 31};
  collective(what, mine, [](Shuffle<T> **lanes) {
    for (int i = 0; i < 32; i++) lanes[i]->out = lanes[lanes[i]->source]->in;
  });
  return mine.out;
}
inline int lane() { return machine.current->rank % 32; }
}  // namespace emulation

template <typename T> T __shfl_sync(unsigned, T value, int source) { return emulation::shuffle("shfl", value, source); }
template <typename T> T __shfl_xor_sync(unsigned, T value, int mask) {
  return emulation::shuffle("shfl_xor", value, emulation::lane() ^ mask);
}
template <typename T> T __shfl_up_sync(unsigned, T value, int delta) {
  int from = emulation::lane() - delta;
  return emulation::shuffle("shfl_up", value, from < 0 ? emulation::lane() : from);
}
inline unsigned __ballot_sync(unsigned, bool predicate) {
  struct Vote { bool in; unsigned out; } mine{predicate, 0};
  emulation::collective("ballot", mine, [](Vote **lanes) {
    unsigned all = 0;
    for (int i = 0; i < 32; i++) all |= unsigned(lanes[i]->in) << i;
    for (int i = 0; i < 32; i++) lanes[i]->out = all;
  });
  return mine.out;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(unsigned x) { return __builtin_ffs(int(x)); }
inline float __uint_as_float(uint32_t x) { float y; memcpy(&y, &x, 4); return y; }
inline uint32_t __float_as_uint(float x) { uint32_t y; memcpy(&y, &x, 4); return y; }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __fdividef(float x, float y) { return x / y; }
using std::max;
using std::min;
