// Moving and filling: copies between row-strided matrices, constants, counters.
#include "common.cuh"
#include "real.cuh"

// Type of what is copied.
#ifndef FROM
#define FROM float
#endif

// y[r, c] = x[r, c] for the rows and columns that x has, 0 behind. One thread an element, in a loop over the grid.
KERNEL copy_rows(Rows<const FROM> x, Rows<real> y) {
  const long long n = (long long)y.rows * y.cols;
  for (long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x; i < n; i += (long long)gridDim.x * blockDim.x) {
    const long long r = i / y.cols, c = i % y.cols;
    store(y.row(r) + c, r < x.rows && c < x.cols ? to_float(x.row(r)[c]) : 0.0f);
  }
}

KERNEL fill(Rows<real> y, float value) {
  const long long n = (long long)y.rows * y.cols;
  for (long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x; i < n; i += (long long)gridDim.x * blockDim.x)
    store(y.row(i / y.cols) + i % y.cols, value);
}

KERNEL increment(int* counter) { *counter += 1; }

// y = 1 - beta^n for update n, counted from 1, given the number of updates before.
KERNEL bias_correction(const int* step, double beta, float* y) { *y = (float)(1.0 - pow(beta, *step + 1.0)); }
