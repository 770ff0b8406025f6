//! `dataflow verify FILE.safetensors…`

use std::path::PathBuf;
use std::sync::Arc;

use clap::Args;
use dataflow_graph::diagnostic::{Diagnostic, Errors};
use dataflow_graph::registry::Registry;
use serde_json::json;

use super::{DeviceArgs, NumberFormat, PrecisionArgs, WithoutArgs, print, print_json};
use crate::verify::{Backend, models_in, summary, table, verify_file};

#[derive(Args)]
pub(super) struct Verify {
    /// Golden files of ops or models
    #[arg(required = true)]
    files: Vec<PathBuf>,
    /// The folder of the model files
    #[arg(long, value_name = "DIR", default_value = "models")]
    models: PathBuf,
    #[command(flatten)]
    device: DeviceArgs,
    #[command(flatten)]
    precision: PrecisionArgs,
    #[command(flatten)]
    without: WithoutArgs,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

impl Verify {
    pub(super) fn run(self, registry: &Arc<Registry>) -> Result<(), Errors> {
        let (device, precision) = self.precision.open(&self.device, &self.without.without, Some(NumberFormat::F32))?;
        let backend = Backend { device, precision };
        let models = models_in(&self.models);
        let mut errors = Errors::default();
        let mut comparisons = Vec::new();
        for file in &self.files {
            match verify_file(file, registry, &models, &backend) {
                Ok(found) => comparisons.extend(found),
                Err(error) => errors.push(Diagnostic::new(error.to_string())),
            }
        }
        match self.json {
            true => print_json(&json!({ "comparisons": comparisons })),
            false => print(&format!("{}{}\n", table(&comparisons), summary(&comparisons))),
        }
        let wrong = comparisons.iter().filter(|c| !c.ok).count();
        if wrong > 0 {
            errors.push(Diagnostic::new(format!("{wrong} of {} tensors are above their tolerance", comparisons.len())));
        }
        errors.into_result()
    }
}
