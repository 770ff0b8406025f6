//! Causal softmax attention.
