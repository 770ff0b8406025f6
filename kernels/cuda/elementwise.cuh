// What generated elementwise code calls. Includes nothing: the code includes common.cuh, real.cuh and keep.cuh before.
#pragma once

// log(1 + e^x); x above 20
DEVICE float softplus(float x) { return x > 20.0f ? x : log1pf(expf(x)); }
DEVICE float log_sigmoid(float x) { return (x < 0.0f ? x : 0.0f) - log1pf(expf(-fabsf(x))); }
