//! The graph layer of dataflow: one world for models and pipelines, the RON format, the compiler, and the
//! traits that ops and plugins implement.
//!
//! A model file becomes rows ([`format`]), rows become nodes of a [`World`](world::World), and systems
//! ([`systems`]) turn the world into a [`Plan`](plan::Plan), which a [`Session`](session::Session) runs on a
//! device.

pub mod build;
pub mod builtin;
pub mod check;
pub mod compile;
pub mod components;
pub mod diagnostic;
pub mod elementwise;
pub mod format;
pub mod gradient;
pub mod initializer;
pub mod op;
pub mod optimizer;
pub mod plan;
pub mod registry;
pub mod schedule;
pub mod session;
pub mod systems;
pub mod types;
pub mod world;
