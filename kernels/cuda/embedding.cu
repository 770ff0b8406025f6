// Row lookup by token, and its gradient.
#include "common.cuh"

DEVICE int checked(const int* tokens, long long i, int rows, int* fault) {
  const int token = tokens[i];
  if (token >= 0 && token < rows) return token;
  fault[1] = token;
  fault[2] = (int)i;
  fault[3] = rows;
  __threadfence_system();
  fault[0] = 1;
  return 0;
}

// y[i] = table[tokens[i]]. One block a row of y.
KERNEL embedding_forward(const int* tokens, Rows<const float> table, Rows<float> y, int* fault) {
  const long long i = blockIdx.x;
  const float* from = table.row(checked(tokens, i, table.rows, fault));
  for (int c = threadIdx.x; c < y.cols; c += blockDim.x) y.row(i)[c] = from[c];
}

// dtable[t] += the sum of dy[i] over all i with tokens[i] = t, in the order of i. One block for each i; the first one of
// each token does the work. Blocks of 256 threads.
KERNEL embedding_backward(const int* tokens, Rows<const float> dy, Rows<float> dtable, int* fault) {
  __shared__ int found[256];
  const long long i = blockIdx.x;
  const int token = checked(tokens, i, dtable.rows, fault);
  if (token != tokens[i]) return;
  int earlier = 0;
  for (long long j = threadIdx.x; j < i; j += blockDim.x) earlier |= tokens[j] == token;
  if (__syncthreads_or(earlier)) return;
  float* to = dtable.row(token);
  for (long long from = i; from < dy.rows; from += 256) {
    const long long mine = from + threadIdx.x;
    const int is = mine < dy.rows && tokens[mine] == token;
    if (!__syncthreads_or(is)) continue;
    found[threadIdx.x] = is;
    __syncthreads();
    for (int c = threadIdx.x; c < dy.cols; c += blockDim.x) {
      float sum = to[c];
      for (int k = 0; k < 256; ++k)
        if (found[k]) sum += dy.row(from + k)[c];
      to[c] = sum;
    }
    __syncthreads();
  }
}
