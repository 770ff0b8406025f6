//! Trains and runs sequence models that are written as RON graphs.
//!
//! This package is the outermost layer: what feeds a training step ([`data`]), the stages of a pipeline
//! ([`stages`], [`pipeline`]), the training loop ([`trainer`]), what a run leaves behind ([`report`], [`checkpoint`])
//! and how it is opened again ([`saved`], [`resume`]), weights from elsewhere ([`import`]), the comparison with golden
//! files ([`verify`]), measurements ([`bench`]), and the command line ([`cli`]). The compiler, the ops and the kernels
//! are the crates `dataflow-graph`, `dataflow-ops` and `dataflow-kernels`.

pub mod app;
pub mod bench;
mod changes;
pub mod checkpoint;
pub mod cli;
pub mod data;
pub mod evaluation;
pub mod files;
pub mod generate;
pub mod import;
pub mod pipeline;
pub mod report;
pub mod resume;
pub mod saved;
pub mod serve;
pub mod signals;
pub mod stages;
pub mod trainer;
pub mod utilization;
pub mod verify;

pub use app::App;
pub use dataflow_graph as graph;
pub use dataflow_graph::registry::{Info, Plugin, Registry};
pub use dataflow_kernels as kernels;
pub use dataflow_ops as ops;
