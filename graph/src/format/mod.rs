//! The RON format that models and pipelines share.

pub mod brackets;
pub mod formula;
pub mod model;
pub mod number;
pub mod rows;
pub mod set;
