//! The program: a registry filled by plugins, and the command line over it.

use std::process::ExitCode;
use std::sync::Arc;

use dataflow_graph::registry::{Plugin, Registry};
use dataflow_ops::BuiltinOps;

use crate::cli;
use crate::stages::BuiltinStages;

/// The program with its built-in ops and stages; plugins add more.
///
/// ```no_run
/// use dataflow::{App, Plugin, Registry};
///
/// struct Mine;
/// impl Plugin for Mine {
///     fn build(&self, _registry: &mut Registry) { /* registry.op::<MyOp>(…) */ }
/// }
///
/// fn main() -> std::process::ExitCode {
///     App::new().add_plugin(Mine).run()
/// }
/// ```
pub struct App {
    registry: Registry,
}

impl Default for App {
    fn default() -> Self {
        Self::new()
    }
}

impl App {
    /// The built-in ops and stages.
    pub fn new() -> Self {
        let mut registry = Registry::new();
        registry.add_plugin(&BuiltinOps);
        registry.add_plugin(&BuiltinStages);
        Self { registry }
    }

    /// Registers what a plugin brings; it may replace what is there.
    pub fn add_plugin(mut self, plugin: impl Plugin) -> Self {
        self.registry.add_plugin(&plugin);
        self
    }

    /// Everything that is registered.
    pub fn into_registry(self) -> Arc<Registry> {
        Arc::new(self.registry)
    }

    /// Runs the command line of this process.
    pub fn run(self) -> ExitCode {
        cli::run(&self.into_registry(), std::env::args_os())
    }
}
