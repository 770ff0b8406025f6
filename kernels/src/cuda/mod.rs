//! CUDA: launches as data ([`call`]), one file of launch descriptions for each family of ops, whose device code lies in
//! `kernels/cuda/{family}.cu`.

pub mod attention;
pub mod call;
pub mod conv1d;
pub mod cross_entropy;
pub mod gla;
pub mod layout;
pub mod linear_attention;
pub mod norm;
pub mod optimizer;
mod partials;
pub mod retention;
pub mod rotary;
pub mod scan;
pub mod source;
pub mod token_shift;
