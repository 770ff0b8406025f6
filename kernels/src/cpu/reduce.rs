//! Sums over rows, columns and whole tensors.
