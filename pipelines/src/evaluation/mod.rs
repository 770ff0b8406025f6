//! The loss of a trained model at contexts of any length: how far it uses more context than it was trained with.

pub mod contexts;
pub mod figure;
