// Dropout masks, bit for bit those of kernels/src/random.rs.
#pragma once

struct Keep {
  unsigned k0, k1, threshold;
  float scale;
  // 0 or `scale` at a counter: the hash `bits` of random.rs.
  __device__ __forceinline__ float at(unsigned long long counter) const {
    const unsigned high = (unsigned)(counter >> 32);
    unsigned x = (unsigned)counter + k0;
    x = (x ^ (x >> 17)) * 0xed5ad4bbu;
    x = ((x ^ (x >> 11)) + (k1 + high * 0x9e3779b9u)) * 0xac4c1b51u;
    x = (x ^ (x >> 15)) * 0x31848babu;
    x = x ^ (x >> 14);
    return x >= threshold ? scale : 0.0f;
  }
};

// The mask of dropout layer `site` in training step `step`: its key is a Philox-4x32-10 block.
DEVICE Keep keep_new(unsigned long long seed, int step, unsigned site, unsigned threshold, float scale) {
  unsigned k0 = (unsigned)seed, k1 = (unsigned)(seed >> 32);
  unsigned a = (unsigned)step, b = step < 0 ? 0xffffffffu : 0u, c = site, d = 0x6d61736bu;
  for (int round = 0; round < 10; ++round) {
    const unsigned long long p = (unsigned long long)a * 0xd2511f53u, q = (unsigned long long)c * 0xcd9e8d57u;
    a = (unsigned)(q >> 32) ^ b ^ k0;
    b = (unsigned)q;
    c = (unsigned)(p >> 32) ^ d ^ k1;
    d = (unsigned)p;
    k0 += 0x9e3779b9u;
    k1 += 0xbb67ae85u;
  }
  return Keep{a, b, threshold, scale};
}
