//! Kernels for the CPU: Rust, with SIMD chosen at run time and a team of threads.

pub mod device;
mod pages;
pub mod simd;
pub mod team;
pub mod threads;

pub mod attention;
mod chunked;
pub mod conv1d;
pub mod cross_entropy;
pub mod documents;
pub mod embedding;
pub mod gla;
pub mod interpreter;
mod lanes;
pub mod longhorn;
pub mod math;
pub mod matmul;
pub mod matvec;
pub mod norm;
pub mod optimizer;
pub mod output;
pub mod reduce;
pub mod retention;
pub mod rotary;
pub mod scan;
pub mod selective_scan;
pub mod sequences;
pub mod token_shift;
pub mod wkv;
