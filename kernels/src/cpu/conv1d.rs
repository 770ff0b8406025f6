//! Causal depthwise convolution over time.
