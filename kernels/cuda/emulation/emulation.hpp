// Runs CUDA C++ kernels on the processor, for tests: a translation unit is this header, the kernel's source, and
// `EMU_KERNEL(name);` for each of its kernels. It becomes a shared library whose `emu_launch` runs them.
//
// Blocks run one after another; the threads of a block are fibers of one system thread that switch at barriers and warp
// operations. What CUDA leaves open is made as unkind as possible, so that mistakes show:
//  - threads run in a chosen order (ascending, descending, shuffled, or greedy: the first warps run as far ahead as
//    barriers let them), so that a missing barrier shows as a result that depends on the order;
//  - shared memory is filled with NaN before each block;
//  - asynchronous copies happen at the last moment at which they must have happened;
//  - threads that wait for each other at different barriers, a lane that calls a warp operation which leaves it out,
//    lanes that meet in different warp operations, and misaligned vector copies are errors.
// Built with `-fsanitize=address,undefined` it also finds accesses outside of buffers and of dynamic shared memory.
// Not modelled: blocks that run at the same time, memory ordering between them, streams.
#pragma once
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#if defined(__SANITIZE_ADDRESS__)
extern "C" void __sanitizer_start_switch_fiber(void** fake, const void* bottom, size_t size);
extern "C" void __sanitizer_finish_switch_fiber(void* fake, const void** bottom, size_t* size);
extern "C" void __asan_unpoison_memory_region(const volatile void* address, size_t size);
#endif

// Each library has a machine and kernels of its own: nothing but the functions at the end may be seen by others.
#pragma GCC visibility push(hidden)

#define CUDA_EMULATION 1
#define DEVICE static inline
#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __restrict__ __restrict
// Static shared memory goes to a section of its own, so that it can be filled before each block.
#define __shared__ static __attribute__((section("cuda_shared")))
#define DYNAMIC_SHARED(T, name) T* name = reinterpret_cast<T*>(emulation::dynamic_shared())

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {}
};
struct uint3 { unsigned x, y, z; };
struct __align__(8) float2 { float x, y; };
struct __align__(16) float4 { float x, y, z, w; };
struct __align__(8) int2 { int x, y; };
struct __align__(16) int4 { int x, y, z, w; };
struct __align__(8) uint2 { unsigned x, y; };
struct __align__(16) uint4 { unsigned x, y, z, w; };
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }


namespace emulation {

enum State : unsigned char { READY, AT_BLOCK_BARRIER, IN_WARP_OPERATION, DONE };

constexpr unsigned MAX_THREADS = 1024;
constexpr size_t STACK = 64 * 1024;
constexpr unsigned MAX_COPIES = 256;

struct Copy {
  void* to;
  const void* from;
  unsigned group;
};

struct Fiber {
  void* stack_pointer;
  void* fake_stack;
  uint3 index;
  unsigned linear;
  State state;
  unsigned copies, group;
};

/// A warp operation in flight: the lanes of `mask` meet in it, leave a value each, and read those of the others.
struct Meeting {
  unsigned mask, arrived, left;
  int operation;
  __align__(16) unsigned char value[32][48];
};

struct Warp {
  unsigned members;
  Meeting meetings[8];
};

struct Machine {
  Fiber* current = nullptr;
  void* main_stack = nullptr;
  void* main_fake = nullptr;
  const void* main_bottom = nullptr;
  size_t main_size = 0;
  dim3 grid, block;
  uint3 block_index{};
  Fiber fibers[MAX_THREADS];
  Warp warps[MAX_THREADS / 32];
  Copy copies[MAX_THREADS][MAX_COPIES];
  unsigned char* stacks = nullptr;
  unsigned char* dynamic = nullptr;
  size_t dynamic_size = 0;
  unsigned live = 0, waiting = 0;
  int any = 0, all = 1, count = 0, votes[3]{};
  void (*entry)(void**) = nullptr;
  void** arguments = nullptr;
  bool failed = false;
  char message[256] = "";
};
inline Machine machine;

inline unsigned char* dynamic_shared() { return machine.dynamic; }

extern "C" __attribute__((visibility("hidden"))) void emulation_switch(void** save, void* load);
#if defined(__x86_64__)
asm(R"(
.text
.hidden emulation_switch
.globl emulation_switch
.type emulation_switch,@function
emulation_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp,(%rdi)
  movq %rsi,%rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulation_switch,.-emulation_switch
)");
constexpr size_t SAVED = 7;  // the return address lies above the registers
constexpr size_t RETURN = 6;
#elif defined(__aarch64__)
asm(R"(
.text
.hidden emulation_switch
.globl emulation_switch
.type emulation_switch,%function
emulation_switch:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size emulation_switch,.-emulation_switch
)");
constexpr size_t SAVED = 20;
constexpr size_t RETURN = 11;  // x30
#else
#error "no context switch for this processor"
#endif

inline unsigned char* stack_of(unsigned thread) { return machine.stacks + thread * STACK; }

inline void to_scheduler() {
  Fiber* f = machine.current;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(f->state == DONE ? nullptr : &f->fake_stack, machine.main_bottom, machine.main_size);
#endif
  emulation_switch(&f->stack_pointer, machine.main_stack);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(f->fake_stack, nullptr, nullptr);
#endif
}

inline void resume(Fiber& f) {
  machine.current = &f;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&machine.main_fake, stack_of(f.linear), STACK);
#endif
  emulation_switch(&machine.main_stack, f.stack_pointer);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(machine.main_fake, nullptr, nullptr);
#endif
}

/// Ends the launch with a message. The threads of the block are abandoned where they are.
inline void fail(const char* what) {
  Machine& m = machine;
  if (!m.failed) {
    m.failed = true;
    snprintf(m.message, sizeof m.message, "%s (block %u,%u,%u thread %u)", what, m.block_index.x, m.block_index.y,
             m.block_index.z, m.current ? m.current->linear : 0);
  }
  if (m.current) {
    for (;;) to_scheduler();
  }
}

inline void release_block() {
  Machine& m = machine;
  for (unsigned i = 0; i < m.block.x * m.block.y * m.block.z; ++i)
    if (m.fibers[i].state == AT_BLOCK_BARRIER) m.fibers[i].state = READY;
  m.waiting = 0;
  m.votes[0] = m.any; m.votes[1] = m.all; m.votes[2] = m.count;
  m.any = 0; m.all = 1; m.count = 0;
}

inline void block_barrier(int vote = 0) {
  Machine& m = machine;
  m.any |= vote != 0; m.all &= vote != 0; m.count += vote != 0;
  if (++m.waiting == m.live) return release_block();
  m.current->state = AT_BLOCK_BARRIER;
  to_scheduler();
}

inline Warp& warp() { return machine.warps[machine.current->linear >> 5]; }
inline unsigned lane() { return machine.current->linear & 31; }

/// Meets the other lanes of `mask`, with a value for them to read. The result holds until `leave`.
inline Meeting& meet(unsigned mask, int operation, const void* value, size_t size) {
  Warp& w = warp();
  mask &= w.members;
  const unsigned me = 1u << lane();
  if (!(mask & me)) fail("a lane calls a warp operation whose mask leaves it out");
  Meeting* found = nullptr;
  for (Meeting& x : w.meetings)
    if (x.mask == mask && x.arrived != mask) found = &x;
  if (!found) {
    for (Meeting& x : w.meetings)
      if (!x.mask) { found = &x; break; }
    if (!found) fail("too many warp operations in flight");
    found->mask = mask; found->arrived = 0; found->left = 0; found->operation = operation;
  }
  if (found->operation != operation) fail("lanes of a warp meet in different operations");
  if (size) memcpy(found->value[lane()], value, size);
  found->arrived |= me;
  if (found->arrived == mask) {
    Fiber* first = machine.current - lane();
    for (unsigned i = 0; i < 32; ++i)
      if ((mask >> i & 1) && first[i].state == IN_WARP_OPERATION) first[i].state = READY;
  } else {
    machine.current->state = IN_WARP_OPERATION;
    // a lane may wait in one meeting only, so whatever wakes it is this one
    while (found->arrived != mask) { machine.current->state = IN_WARP_OPERATION; to_scheduler(); }
  }
  return *found;
}

inline void leave(Meeting& m) {
  m.left |= 1u << lane();
  if (m.left == m.mask) m.mask = 0;
}

inline void finish_copies(unsigned keep) {
  Fiber& f = *machine.current;
  unsigned kept = 0;
  Copy* list = machine.copies[f.linear];
  for (unsigned i = 0; i < f.copies; ++i) {
    if (list[i].group + keep < f.group) memcpy(list[i].to, list[i].from, 16);
    else list[kept++] = list[i];
  }
  f.copies = kept;
}

inline void run_thread() {
  Machine& m = machine;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &m.main_bottom, &m.main_size);
#endif
  m.entry(m.arguments);
  m.current->state = DONE;
  --m.live;
  if (m.live && m.waiting == m.live) release_block();
  to_scheduler();
  abort();
}

inline void prepare_thread(unsigned i) {
  Machine& m = machine;
  Fiber& f = m.fibers[i];
  f.linear = i;
  f.state = READY;
  f.fake_stack = nullptr;
  f.copies = 0;
  f.group = 0;
  f.index = {i % m.block.x, i / m.block.x % m.block.y, i / (m.block.x * m.block.y)};
  m.warps[i >> 5].members |= 1u << (i & 31);
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(stack_of(i), STACK);
#endif
  // as if called: one word below a 16-byte boundary on x86-64, on the boundary elsewhere
  uintptr_t top = (reinterpret_cast<uintptr_t>(stack_of(i)) + STACK) & ~uintptr_t(15);
#if defined(__x86_64__)
  top -= 8;
#endif
  void** frame = reinterpret_cast<void**>(top) - SAVED;
  for (size_t k = 0; k < SAVED; ++k) frame[k] = nullptr;
  frame[RETURN] = reinterpret_cast<void*>(&run_thread);
  f.stack_pointer = frame;
}

extern "C" char __start_cuda_shared[] __attribute__((weak, visibility("hidden")));
extern "C" char __stop_cuda_shared[] __attribute__((weak, visibility("hidden")));

inline void run_block(const unsigned* order, bool greedy) {
  Machine& m = machine;
  const unsigned threads = m.block.x * m.block.y * m.block.z;
  m.live = threads;
  m.waiting = 0;
  m.any = 0; m.all = 1; m.count = 0;
  if (__start_cuda_shared) memset(__start_cuda_shared, 0xff, __stop_cuda_shared - __start_cuda_shared);
  memset(m.dynamic, 0xff, m.dynamic_size);
  for (Warp& w : m.warps) {
    w.members = 0;
    for (Meeting& x : w.meetings) x.mask = 0;
  }
  for (unsigned i = 0; i < threads; ++i) prepare_thread(i);
  while (m.live && !m.failed) {
    bool moved = false;
    for (unsigned k = 0; k < threads && !m.failed; ++k) {
      Fiber& f = m.fibers[order[k]];
      if (f.state != READY) continue;
      moved = true;
      resume(f);
      if (greedy) k = (k & ~31u) - 1;
    }
    m.current = nullptr;
    if (!moved && !m.failed) fail("deadlock: threads wait at different barriers");
  }
}

/// order: 0 ascending, 1 descending, 2 greedy, else the seed of a random order.
inline int run_grid(const unsigned* grid, const unsigned* block, size_t shared, unsigned order) {
  Machine& m = machine;
  m.failed = false;
  m.current = nullptr;
  m.grid = {grid[0], grid[1], grid[2]};
  m.block = {block[0], block[1], block[2]};
  const unsigned threads = block[0] * block[1] * block[2];
  if (!threads || threads > MAX_THREADS || !grid[0] || !grid[1] || !grid[2] || grid[1] > 65535 || grid[2] > 65535) {
    fail("the grid or block has a size that CUDA does not allow");
    return 1;
  }
  if (shared > 227 * 1024) {
    fail("more shared memory than a block may have");
    return 1;
  }
  static unsigned turn[MAX_THREADS];
  for (unsigned i = 0; i < threads; ++i) turn[i] = order == 1 ? threads - 1 - i : i;
  if (order > 2) {
    unsigned random = order;
    for (unsigned i = threads; i > 1; --i) {
      random = random * 1664525u + 1013904223u;
      const unsigned j = (random >> 8) % i, other = turn[j];
      turn[j] = turn[i - 1];
      turn[i - 1] = other;
    }
  }
  if (!m.stacks) m.stacks = static_cast<unsigned char*>(aligned_alloc(4096, MAX_THREADS * STACK));
  void* memory = nullptr;
  if (!m.stacks || posix_memalign(&memory, 1024, shared ? shared : 1)) {
    fail("no memory");
    return 1;
  }
  m.dynamic = static_cast<unsigned char*>(memory);
  m.dynamic_size = shared;
  for (unsigned z = 0; z < grid[2]; ++z)
    for (unsigned y = 0; y < grid[1]; ++y)
      for (unsigned x = 0; x < grid[0] && !m.failed; ++x) {
        m.block_index = {x, y, z};
        run_block(turn, order == 2);
      }
  free(memory);
  return m.failed;
}

// Kernels by name, launched with the `void**` of cuLaunchKernel.
struct Kernel {
  const char* name;
  void (*call)(void**);
  unsigned parameters;
  const size_t* sizes;
  Kernel* next;
};
inline Kernel* kernels = nullptr;

template <class T> struct Plain { typedef T type; };
template <class T> struct Plain<const T> { typedef T type; };
template <size_t... I> struct Numbers {};
template <size_t N, size_t... I> struct Count : Count<N - 1, N - 1, I...> {};
template <size_t... I> struct Count<0, I...> { typedef Numbers<I...> type; };

template <auto F> struct Thunk;
template <class... A, void (*F)(A...)> struct Thunk<F> {
  template <size_t... I> static void call_with(void** p, Numbers<I...>) {
    F(*reinterpret_cast<typename Plain<A>::type*>(p[I])...);
  }
  static void call(void** p) { call_with(p, typename Count<sizeof...(A)>::type()); }
  static constexpr size_t sizes[sizeof...(A) + 1] = {sizeof(A)..., 0};
  static int add(const char* name) {
    static Kernel kernel{name, &call, sizeof...(A), sizes, kernels};
    kernels = &kernel;
    return 0;
  }
};

inline const Kernel* find(const char* name) {
  for (const Kernel* k = kernels; k; k = k->next)
    if (!strcmp(k->name, name)) return k;
  return nullptr;
}

}  // namespace emulation

#define EMU_KERNEL(kernel) static int registered_##kernel = emulation::Thunk<&kernel>::add(#kernel)

#define EMU_EXPORT extern "C" inline __attribute__((used, visibility("default")))

/// Runs a kernel; 0, or an error that `emu_error` tells. order: see `run_grid`.
EMU_EXPORT int emu_launch(const char* name, const unsigned* grid, const unsigned* block, size_t shared,
                          void** arguments, unsigned order) {
  using namespace emulation;
  const Kernel* kernel = find(name);
  if (!kernel) {
    snprintf(machine.message, sizeof machine.message, "no kernel is called %s", name);
    return 1;
  }
  machine.entry = kernel->call;
  machine.arguments = arguments;
  return run_grid(grid, block, shared, order);
}

/// Number of a kernel's parameters; -1 if there is no such kernel.
EMU_EXPORT int emu_params(const char* name) {
  const emulation::Kernel* kernel = emulation::find(name);
  return kernel ? int(kernel->parameters) : -1;
}

/// Bytes of a kernel's parameter.
EMU_EXPORT size_t emu_param_size(const char* name, int parameter) {
  const emulation::Kernel* kernel = emulation::find(name);
  return kernel && parameter >= 0 && unsigned(parameter) < kernel->parameters ? kernel->sizes[parameter] : 0;
}

/// What went wrong in the last launch.
EMU_EXPORT const char* emu_error() { return emulation::machine.message; }

#include "builtins.hpp"
