// What every kernel file includes. No header of the CUDA toolkit is needed: NVRTC alone compiles this.
#pragma once

#define KERNEL extern "C" __global__ void

#ifndef CUDA_EMULATION
#define DEVICE static __device__ __forceinline__
// Dynamic shared memory as an array of T.
#define DYNAMIC_SHARED(T, name)                                       \
  extern __shared__ __align__(16) unsigned char name##_bytes[];       \
  T* name = reinterpret_cast<T*>(name##_bytes)
#endif

// A row-strided matrix: element (r, c) is data[r * stride + c]. See kernels/src/cuda/call.rs.
template <class T>
struct Rows {
  T* data;
  int rows;
  int cols;
  long long stride;
  __device__ __forceinline__ T* row(long long r) const { return data + r * stride; }
};

// Sum over the 32 lanes of a warp; every lane has it.
DEVICE float warp_sum(float x) {
  for (int o = 16; o > 0; o >>= 1) x += __shfl_xor_sync(0xffffffffu, x, o);
  return x;
}

// Largest number of a warp; every lane has it.
DEVICE float warp_max(float x) {
  for (int o = 16; o > 0; o >>= 1) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, o));
  return x;
}

// Sum over a block of whole warps; every thread has it. `scratch` is shared memory for 32 numbers.
DEVICE float block_sum(float x, float* scratch) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
  x = warp_sum(x);
  __syncthreads();
  if (lane == 0) scratch[warp] = x;
  __syncthreads();
  return warp_sum(lane < warps ? scratch[lane] : 0.0f);
}
