// CUDA's built-in variables and functions, as far as the kernels use them, for the emulation.
#pragma once

#define threadIdx (emulation::machine.current->index)
#define blockIdx (emulation::machine.block_index)
#define blockDim (emulation::machine.block)
#define gridDim (emulation::machine.grid)
constexpr int warpSize = 32;

inline void __syncthreads() { emulation::block_barrier(); }
inline int __syncthreads_or(int p) { emulation::block_barrier(p); return emulation::machine.votes[0]; }
inline int __syncthreads_and(int p) { emulation::block_barrier(p); return emulation::machine.votes[1]; }
inline int __syncthreads_count(int p) { emulation::block_barrier(p); return emulation::machine.votes[2]; }
inline void __threadfence() {}
inline void __threadfence_system() {}
inline void __threadfence_block() {}

namespace emulation {
enum Operation { SYNC = 1, SHUFFLE, SHUFFLE_UP, SHUFFLE_DOWN, SHUFFLE_XOR, BALLOT, MATRICES, MULTIPLY };

/// Gives `value` to the other lanes and takes that of lane `from(lane)`, if it takes part.
template <class T, class From> T exchange(unsigned mask, int operation, T value, From from) {
  static_assert(sizeof(T) <= 16, "type of a shuffle");
  Meeting& m = meet(mask, operation, &value, sizeof value);
  const unsigned source = from(lane());
  T result = value;
  if (source < 32) {
    if (!(m.mask >> source & 1)) fail("a shuffle reads a lane that takes no part");
    memcpy(&result, m.value[source], sizeof result);
  }
  leave(m);
  return result;
}
}  // namespace emulation

inline void __syncwarp(unsigned mask = ~0u) { emulation::leave(emulation::meet(mask, emulation::SYNC, nullptr, 0)); }
template <class T> T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  return emulation::exchange(mask, emulation::SHUFFLE, value,
                             [=](unsigned l) { return (l & ~(width - 1u)) | (source & (width - 1u)); });
}
template <class T> T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = 32) {
  return emulation::exchange(mask, emulation::SHUFFLE_UP, value,
                             [=](unsigned l) { return (l & (width - 1u)) < by ? 32u : l - by; });
}
template <class T> T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32) {
  return emulation::exchange(mask, emulation::SHUFFLE_DOWN, value,
                             [=](unsigned l) { return (l & (width - 1u)) + by >= unsigned(width) ? 32u : l + by; });
}
template <class T> T __shfl_xor_sync(unsigned mask, T value, int by, int width = 32) {
  return emulation::exchange(mask, emulation::SHUFFLE_XOR, value, [=](unsigned l) {
    const unsigned other = l ^ unsigned(by);
    return (other & ~(width - 1u)) == (l & ~(width - 1u)) ? other : 32u;
  });
}
inline unsigned __ballot_sync(unsigned mask, int vote) {
  emulation::Meeting& m = emulation::meet(mask, emulation::BALLOT, &vote, sizeof vote);
  unsigned result = 0;
  for (unsigned i = 0; i < 32; ++i) {
    int other = 0;
    if (m.mask >> i & 1) memcpy(&other, m.value[i], sizeof other);
    if (other) result |= 1u << i;
  }
  emulation::leave(m);
  return result;
}
inline int __any_sync(unsigned mask, int vote) { return __ballot_sync(mask, vote) != 0; }
inline int __all_sync(unsigned mask, int vote) { return __ballot_sync(mask, !vote) == 0; }

template <class T> T atomicAdd(T* p, T v) { T old = *p; *p = old + v; return old; }
template <class T> T atomicMax(T* p, T v) { T old = *p; if (v > old) *p = v; return old; }
template <class T> T atomicMin(T* p, T v) { T old = *p; if (v < old) *p = v; return old; }
template <class T> T atomicExch(T* p, T v) { T old = *p; *p = v; return old; }
template <class T> T atomicCAS(T* p, T compare, T v) { T old = *p; if (old == compare) *p = v; return old; }

template <class T> T __ldg(const T* p) { return *p; }
template <class T> T __ldcs(const T* p) { return *p; }
template <class T> void __stcs(T* p, T v) { *p = v; }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float __saturatef(float x) { return x < 0 ? 0 : x > 1 ? 1 : x; }
inline int __float_as_int(float f) { int i; memcpy(&i, &f, 4); return i; }
inline unsigned __float_as_uint(float f) { unsigned i; memcpy(&i, &f, 4); return i; }
inline float __int_as_float(int i) { float f; memcpy(&f, &i, 4); return f; }
inline float __uint_as_float(unsigned i) { float f; memcpy(&f, &i, 4); return f; }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(unsigned x) { return __builtin_ffs(int(x)); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned(uint64_t(a) * b >> 32); }
inline void sincos(double x, double* s, double* c) { *s = sin(x); *c = cos(x); }
template <class T> T min(T a, T b) { return b < a ? b : a; }
template <class T> T max(T a, T b) { return a < b ? b : a; }

// What the kernels say in PTX: see common.cuh.

/// Starts a copy of 16 bytes to shared memory.
inline void copy_async(void* to, const void* from) {
  using namespace emulation;
  if ((uintptr_t(to) | uintptr_t(from)) & 15) fail("an asynchronous copy is not aligned to 16 bytes");
  Fiber& f = *machine.current;
  if (f.copies == MAX_COPIES) fail("too many asynchronous copies in flight");
  machine.copies[f.linear][f.copies++] = {to, from, f.group};
}
/// Ends a group of copies.
inline void copy_commit() { ++emulation::machine.current->group; }
/// Waits until at most N groups are in flight.
template <int N> inline void copy_wait() { emulation::finish_copies(N); }

namespace emulation {
inline float bf16(unsigned word, unsigned high) {
  return __uint_as_float(high ? word & 0xffff0000u : word << 16);
}
}  // namespace emulation

/// Four 8 x 8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8.
inline void load_matrices(unsigned (&r)[4], const void* row, bool transposed) {
  using namespace emulation;
  if (uintptr_t(row) & 15) fail("a row of a matrix load is not aligned to 16 bytes");
  Meeting& m = meet(~0u, MATRICES, &row, sizeof row);
  const unsigned l = lane();
  for (unsigned i = 0; i < 4; ++i) {
    unsigned word = 0;
    for (unsigned half = 0; half < 2; ++half) {
      const unsigned a = l / 4, b = l % 4 * 2 + half;
      const uint16_t* from;
      memcpy(&from, m.value[i * 8 + (transposed ? b : a)], sizeof from);
      word |= unsigned(from[transposed ? a : b]) << (16 * half);
    }
    r[i] = word;
  }
  leave(m);
}

/// d [16, 8] += a [16, 16] b [16, 8] of a warp: bf16 operands, f32 sums, fragments as in PTX's mma.m16n8k16.
inline void mma_bf16(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  using namespace emulation;
  const unsigned mine[6] = {a[0], a[1], a[2], a[3], b0, b1};
  Meeting& m = meet(~0u, MULTIPLY, mine, sizeof mine);
  const unsigned l = lane(), group = l / 4, pair = l % 4;
  for (unsigned e = 0; e < 4; ++e) {
    const unsigned row = group + (e / 2) * 8, col = pair * 2 + e % 2;
    float sum = d[e];
    for (unsigned k = 0; k < 16; ++k) {
      unsigned left[6], right[6];
      memcpy(left, m.value[row % 8 * 4 + k % 8 / 2], sizeof left);
      memcpy(right, m.value[col * 4 + k % 8 / 2], sizeof right);
      sum += bf16(left[row / 8 + k / 8 * 2], k % 2) * bf16(right[4 + k / 8], k % 2);
    }
    d[e] = sum;
  }
  leave(m);
}

/// d [16, 8] += a [16, 8] b [8, 8] of a warp, fragments as in PTX's mma.m16n8k8; of the operands the bits of a tf32 number.
inline void mma_tf32(float (&d)[4], const float (&a)[4], float b0, float b1) {
  using namespace emulation;
  const float mine[6] = {a[0], a[1], a[2], a[3], b0, b1};
  Meeting& m = meet(~0u, MULTIPLY, mine, sizeof mine);
  const unsigned l = lane(), group = l / 4, pair = l % 4;
  const auto operand = [&](unsigned lane, unsigned i) {
    unsigned word;
    memcpy(&word, m.value[lane] + 4 * i, 4);
    return __uint_as_float(word & 0xffffe000u);
  };
  for (unsigned e = 0; e < 4; ++e) {
    const unsigned row = group + (e / 2) * 8, col = pair * 2 + e % 2;
    for (unsigned k = 0; k < 8; ++k)
      d[e] += operand(row % 8 * 4 + k % 4, row / 8 + k / 4 * 2) * operand(col * 4 + k % 4, 4 + k / 4);
  }
  leave(m);
}
