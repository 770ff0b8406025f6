//! Gated linear attention.
