//! CUDA: launches as data ([`call`]), one file of launch descriptions for each family of ops, whose device code lies in
//! `kernels/cuda/{family}.cu`, and the [`device`] that compiles and runs them.
//!
//! The driver, NVRTC and cuBLASLt are opened at run time: nothing of CUDA is needed to build, and a machine without it
//! says so when the device is asked for.

pub mod attention;
mod blas;
pub mod call;
pub mod compile;
pub mod conv1d;
pub mod cross_entropy;
pub mod device;
pub mod elementwise;
pub mod embedding;
pub mod gla;
pub mod layout;
pub mod linear_attention;
pub mod norm;
pub mod optimizer;
mod partials;
mod peak;
mod program;
pub mod recurrent;
pub mod reduce;
pub mod retention;
pub mod rotary;
pub mod scan;
pub mod source;
pub mod token_shift;
pub mod units;
