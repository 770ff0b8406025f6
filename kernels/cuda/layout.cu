// Moving and filling: copies between row-strided matrices, constants, counters.
#include "common.cuh"

// y[r, c] = x[r, c] for the rows that x has, 0 below. One thread an element, in a loop over the grid.
KERNEL copy_rows(Rows<const float> x, Rows<float> y) {
  const long long n = (long long)y.rows * y.cols;
  for (long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x; i < n; i += (long long)gridDim.x * blockDim.x) {
    const long long r = i / y.cols, c = i % y.cols;
    y.row(r)[c] = r < x.rows ? x.row(r)[c] : 0.0f;
  }
}

KERNEL fill(Rows<float> y, float value) {
  const long long n = (long long)y.rows * y.cols;
  for (long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x; i < n; i += (long long)gridDim.x * blockDim.x)
    y.row(i / y.cols)[i % y.cols] = value;
}

KERNEL increment(int* counter) { *counter += 1; }

// y = 1 - beta^n for update n, counted from 1, given the number of updates before.
KERNEL bias_correction(const int* step, double beta, float* y) { *y = (float)(1.0 - pow(beta, *step + 1.0)); }
