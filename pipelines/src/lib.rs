//! Trains and runs sequence models that are written as RON graphs.
//!
//! This package is the outermost layer: what feeds a training step ([`data`]) and what is left behind by
//! one ([`report`]).

pub mod data;
pub mod files;
pub mod report;
