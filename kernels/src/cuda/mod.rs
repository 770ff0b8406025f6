//! CUDA: launches as data ([`call`]), one file of launch descriptions for each family of ops, whose device code lies in
//! `kernels/cuda/{family}.cu`.

pub mod call;
pub mod layout;
pub mod source;
