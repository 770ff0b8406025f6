//! CUDA: launches as data ([`call`]), one file of launch descriptions for each family of ops, whose device code lies in
//! `kernels/cuda/{family}.cu`.

pub mod call;
pub mod cross_entropy;
pub mod layout;
pub mod norm;
pub mod optimizer;
mod partials;
pub mod rotary;
pub mod source;
