// Runs kernels on the host, for tests: what of CUDA they use, in plain C++.
//
// The blocks of a launch run one after the other. The threads of a block are fibers; one runs until it waits, at a barrier
// or for its warp, and then any other that can, drawn at random, some warps ahead of others: a barrier that is missing shows.
// Shared memory is filled with NaN before each block.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <csetjmp>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

using std::max;
using std::min;

struct uint3 {
  unsigned x, y, z;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

inline float __uint_as_float(unsigned bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
inline unsigned __float_as_uint(float x) {
  unsigned bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};
inline float __bfloat162float(bf16 x) { return __uint_as_float(static_cast<unsigned>(x.bits) << 16); }
inline bf16 __float2bfloat16_rn(float x) {
  const unsigned bits = __float_as_uint(x);
  if (std::isnan(x)) return {static_cast<uint16_t>(bits >> 16 | 0x40)};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
inline unsigned short __bfloat16_as_ushort(bf16 x) { return x.bits; }
inline float __half2float(f16 x) {
  const int exponent = x.bits >> 10 & 31, fraction = x.bits & 1023;
  const float sign = x.bits >> 15 ? -1.0f : 1.0f;
  if (exponent == 31) return fraction ? NAN : sign * INFINITY;
  return sign * (exponent ? std::ldexp(1024.0f + fraction, exponent - 25) : std::ldexp(float(fraction), -24));
}
inline f16 __float2half_rn(float x) {
  const uint16_t sign = std::signbit(x) << 15;
  if (std::isnan(x)) return {static_cast<uint16_t>(sign | 0x7e00)};
  const float size = std::fabs(x);
  if (size >= 65520.0f) return {static_cast<uint16_t>(sign | 0x7c00)};
  // To the nearest multiple of the spacing there, the even one of two.
  const int exponent = size < std::ldexp(1.0f, -14) ? -14 : std::ilogb(size);
  const unsigned steps = static_cast<unsigned>(std::nearbyint(std::ldexp(size, 10 - exponent)));
  return {static_cast<uint16_t>(sign | (steps + (static_cast<unsigned>(exponent + 14) << 10)))};
}

namespace emulator {

struct Fiber {
  // Where it begins, and then where it went on waiting: a jump is much cheaper than a change of contexts.
  ucontext_t context;
  jmp_buf place;
  std::unique_ptr<char[]> stack;
  unsigned thread;
  bool begun;
  // What it waits for: a turn of the barrier or of its warp to be over.
  const unsigned* turns;
  unsigned turn;
  bool done;
  // Shared memory that it has declared so far.
  size_t shared;
};

// Values that the lanes of a warp hand each other, in turns: those of one turn are read while the next ones are written.
struct Warp {
  unsigned arrived, turns;
  uint32_t values[2][32][8];
};

struct Machine {
  static constexpr size_t STACK = 128 << 10, SHARED = 256 << 10;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  unsigned threads, arrived, turns;
  Fiber* running;
  jmp_buf scheduler;
  std::vector<unsigned char> shared = std::vector<unsigned char>(SHARED);
  uint64_t random;
  const char* error;
  void (*body)(void**);
  void** arguments;
};

inline Machine machine;
inline uint3 block_index, thread_index;

inline void wait(const unsigned* turns, unsigned turn) {
  Fiber* self = machine.running;
  self->turns = turns, self->turn = turn;
  while (*turns == turn)
    if (_setjmp(self->place) == 0) _longjmp(machine.scheduler, 1);
  self->turns = nullptr;
}

// Hands `values` to the warp and returns those of all its lanes.
inline const uint32_t (*exchange(const uint32_t* values, unsigned count))[8] {
  Warp& warp = machine.warps[thread_index.x / 32];
  const unsigned turn = warp.turns;
  std::memcpy(warp.values[turn % 2][thread_index.x % 32], values, count * sizeof *values);
  if (++warp.arrived == 32)
    warp.arrived = 0, warp.turns++;
  else
    wait(&warp.turns, turn);
  return warp.values[turn % 2];
}

inline void* declare_shared(size_t bytes) {
  size_t& used = machine.running->shared;
  void* place = machine.shared.data() + used;
  used += (bytes + 15) / 16 * 16;
  if (used > Machine::SHARED) machine.error = "too much shared memory";
  return place;
}

inline void start() {
  machine.body(machine.arguments);
  machine.running->done = true;
  _longjmp(machine.scheduler, 1);
}

// Lets a fiber run until it waits or ends.
__attribute__((noinline)) inline void resume(Fiber* fiber) {
  machine.running = fiber;
  thread_index = {fiber->thread, 0, 0};
  if (_setjmp(machine.scheduler) != 0) return;
  if (fiber->begun) _longjmp(fiber->place, 1);
  fiber->begun = true;
  setcontext(&fiber->context);
}

// Runs a block; false where threads wait for each other in vain.
inline bool run_block() {
  std::memset(machine.shared.data(), 0xff, machine.shared.size());
  machine.arrived = machine.turns = 0;
  for (Warp& warp : machine.warps) warp.arrived = warp.turns = 0;
  for (unsigned i = 0; i < machine.threads; i++) {
    Fiber& fiber = machine.fibers[i];
    fiber.thread = i, fiber.turns = nullptr, fiber.begun = fiber.done = false, fiber.shared = 0;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = Machine::STACK;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, start, 0);
  }
  static std::vector<unsigned> ready, late;
  const auto next_random = [] {
    machine.random = machine.random * 6364136223846793005u + 1442695040888963407u;
    return machine.random >> 32;
  };
  uint64_t stalled = next_random();
  for (;;) {
    ready.clear(), late.clear();
    unsigned done = 0;
    // Half of the warps get a turn only when the others wait for them, for some turns.
    if (next_random() % 32 == 0) stalled = next_random();
    for (unsigned i = 0; i < machine.threads; i++) {
      const Fiber& fiber = machine.fibers[i];
      done += fiber.done;
      if (!fiber.done && !(fiber.turns && *fiber.turns == fiber.turn)) (stalled >> i / 32 & 1 ? late : ready).push_back(i);
    }
    if (done == machine.threads) return true;
    if (ready.empty()) ready.swap(late);
    if (ready.empty()) {
      machine.error = "threads wait for threads that have ended or wait elsewhere";
      return false;
    }
    // Those that can run now, in any order: each until it waits or ends.
    while (!ready.empty()) {
      std::swap(ready[next_random() % ready.size()], ready.back());
      Fiber* fiber = &machine.fibers[ready.back()];
      ready.pop_back();
      resume(fiber);
    }
  }
}

template <class... A, size_t... I>
void call(void (*kernel)(A...), void** arguments, std::index_sequence<I...>) {
  kernel(*static_cast<A*>(arguments[I])...);
}

struct Kernel {
  void (*body)(void**);
  unsigned threads;
};

inline std::map<std::string, Kernel>& kernels() {
  static std::map<std::string, Kernel> all;
  return all;
}

}  // namespace emulator

#define __device__
#define __global__
#define __forceinline__ inline
#define threadIdx emulator::thread_index
#define blockIdx emulator::block_index
#define SHARED(type, name, count) type* name = static_cast<type*>(emulator::declare_shared(sizeof(type) * (count)))
#define KERNEL(name, threads, parameters, body)                                                                  \
  static void name parameters { body; }                                                                          \
  template <class... A> static void name##_called(void** arguments, void (*kernel)(A...)) {                      \
    emulator::call(kernel, arguments, std::index_sequence_for<A...>());                                          \
  }                                                                                                              \
  static const auto name##_is_there =                                                                            \
      emulator::kernels().emplace(#name, emulator::Kernel{[](void** a) { name##_called(a, name); }, threads});

inline void __syncthreads() {
  emulator::Machine& m = emulator::machine;
  const unsigned turn = m.turns;
  if (++m.arrived == m.threads)
    m.arrived = 0, m.turns++;
  else
    emulator::wait(&m.turns, turn);
}

inline unsigned long long shuffle(unsigned long long x, unsigned from) {
  const uint32_t words[2] = {static_cast<uint32_t>(x), static_cast<uint32_t>(x >> 32)};
  const uint32_t* there = emulator::exchange(words, 2)[from];
  return there[0] | static_cast<unsigned long long>(there[1]) << 32;
}
inline unsigned long long __shfl_xor_sync(unsigned, unsigned long long x, unsigned other) {
  return shuffle(x, (threadIdx.x % 32) ^ other);
}
inline unsigned long long __shfl_sync(unsigned, unsigned long long x, unsigned lane) { return shuffle(x, lane); }
// Lanes without another below keep their own.
inline unsigned long long __shfl_up_sync(unsigned, unsigned long long x, unsigned below) {
  const unsigned lane = threadIdx.x % 32;
  return shuffle(x, lane < below ? lane : lane - below);
}
inline unsigned __ballot_sync(unsigned, bool own) {
  const uint32_t bit = own;
  const auto all = emulator::exchange(&bit, 1);
  unsigned bits = 0;
  for (unsigned lane = 0; lane < 32; lane++) bits |= all[lane][0] << lane;
  return bits;
}
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return static_cast<unsigned long long>(static_cast<unsigned __int128>(a) * b >> 64);
}

inline float __shfl_xor_sync(unsigned, float x, unsigned other) {
  const uint32_t bits = __float_as_uint(x);
  return __uint_as_float(emulator::exchange(&bits, 1)[(threadIdx.x % 32) ^ other][0]);
}

// The PTX ISA says which lane has which numbers.
inline void multiply_16x8x16(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  const uint32_t own[6] = {a[0], a[1], a[2], a[3], b0, b1};
  const auto all = emulator::exchange(own, 6);
  const auto number = [](uint32_t pair, unsigned i) { return __uint_as_float(i % 2 ? pair & 0xffff0000u : pair << 16); };
  const unsigned lane = threadIdx.x % 32;
  for (unsigned i = 0; i < 4; i++) {
    const unsigned row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    for (unsigned k = 0; k < 16; k++) {
      const unsigned of_a = row % 8 * 4 + k % 8 / 2, of_b = column * 4 + k % 8 / 2;
      c[i] += number(all[of_a][row / 8 + k / 8 * 2], k) * number(all[of_b][4 + k / 8], k);
    }
  }
}

inline float exponential(float x) { return std::exp(x); }

// Launches a kernel with `threads` threads a block. Returns null, or what went wrong.
extern "C" __attribute__((visibility("default"))) const char* emulate(const char* name, const unsigned* grid, unsigned threads, void** arguments, uint64_t seed) {
  using namespace emulator;
  const auto found = kernels().find(name);
  if (found == kernels().end()) return "no such kernel";
  if (threads != found->second.threads) return "the kernel is for another number of threads";
  machine.body = found->second.body;
  machine.arguments = arguments;
  machine.threads = threads;
  machine.random = seed;
  machine.error = nullptr;
  while (machine.fibers.size() < threads) {
    machine.fibers.emplace_back();
    machine.fibers.back().stack.reset(new char[Machine::STACK]);
  }
  machine.warps.resize(threads / 32);
  for (unsigned z = 0; z < grid[2]; z++)
    for (unsigned y = 0; y < grid[1]; y++)
      for (unsigned x = 0; x < grid[0]; x++) {
        block_index = {x, y, z};
        if (!run_block() || machine.error) return machine.error;
      }
  return nullptr;
}
