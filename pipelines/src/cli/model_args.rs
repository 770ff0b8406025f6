//! The model and sizes that `plan` and `bench` compile a training step for.

use std::path::PathBuf;
use std::sync::Arc;

use clap::Args;
use dataflow_graph::compile::Request;
use dataflow_graph::components::{Options, Target};
use dataflow_graph::diagnostic::Errors;
use dataflow_graph::format::formula::Number;
use dataflow_graph::format::model::ModelFile;
use dataflow_graph::registry::Registry;
use dataflow_ops::loss::CrossEntropy;
use dataflow_ops::optimizer::{AdamW, Schedule};

use super::{CAPTURE, config_settings};

#[derive(Args)]
pub(super) struct ModelArgs {
    /// A model file, such as models/longhorn.ron
    pub(super) model: PathBuf,
    /// Sequences in a batch
    #[arg(long, value_name = "B", value_parser = clap::value_parser!(u32).range(1..))]
    pub(super) batch: u32,
    /// Tokens in a sequence
    #[arg(long, value_name = "T", value_parser = clap::value_parser!(u32).range(1..))]
    pub(super) block: u32,
    /// Change the config of the model; may be repeated
    #[arg(long, value_name = "NAME=VALUE")]
    set: Vec<String>,
    /// Leave a system of the compiler out, or `capture` (CUDA graphs); may be repeated
    #[arg(long, value_name = "SYSTEM")]
    pub(super) without: Vec<String>,
    /// The most bytes that activations and gradients may take; what is cheap is computed again until they fit
    #[arg(long, value_name = "BYTES")]
    memory_budget: Option<usize>,
}

impl ModelArgs {
    /// A training step: cross-entropy, clipping to norm 1, AdamW.
    pub(super) fn training(&self, registry: &Arc<Registry>, target: Target) -> Result<Request, Errors> {
        let model = Arc::new(ModelFile::read(&self.model)?);
        let mut config = config_settings(&self.set)?;
        config.entry("block".into()).or_insert(Number::Int(self.block.into()));
        let scope = model.config(&config)?;
        let adamw =
            AdamW { schedule: Schedule::Constant(1e-3), betas: (0.9, 0.99), eps: 1e-8, decay: 0.1, clip: Some(1.0) };
        Ok(Request {
            registry: registry.clone(),
            model,
            scope,
            options: Options { training: true, target, ..Options::new(self.batch as usize, self.block as usize) },
            objectives: vec![("loss".into(), Arc::new(CrossEntropy {}))],
            optimizer: Some(Arc::new(adamw)),
            memory_budget: self.memory_budget,
            without: self.without.iter().filter(|name| *name != CAPTURE).cloned().collect(),
        })
    }
}
