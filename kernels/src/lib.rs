//! Kernels and device memory.
//!
//! Nothing in this crate knows what a graph is: a kernel takes slices (or row-strided matrices, see
//! [`rows`]) and sizes. `cpu/` and `cuda/` lie behind the one boundary [`device`].
//!
//! This is the only crate of the workspace that contains `unsafe`; each block states why it is sound.

pub mod allocation;
pub mod cpu;
pub mod cuda;
pub mod device;
pub mod expression;
pub mod mapped_file;
pub mod random;
pub mod rows;

pub use rows::{Rows, RowsMut};
