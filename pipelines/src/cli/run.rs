//! `dataflow run PIPELINE`

use std::path::PathBuf;
use std::sync::Arc;

use clap::Args;
use dataflow_graph::components::Precision;
use dataflow_graph::diagnostic::Errors;
use dataflow_graph::registry::Registry;

use super::{DeviceArgs, print};
use crate::pipeline::{Pipeline, PipelineFile};
use crate::stages::{self, RunFolderChoice};

#[derive(Args)]
pub(super) struct Run {
    /// A pipeline file, such as pipelines/recall.ron
    pipeline: PathBuf,
    /// Change an attribute of a row, such as train.steps=100 or model.file=models/llama.ron; may be repeated
    #[arg(long, value_name = "ROW.ATTRIBUTE=VALUE")]
    set: Vec<String>,
    #[command(flatten)]
    device: DeviceArgs,
    /// Of the factors of matrix products: f32, or bf16 with sums, parameters and activations in f32
    #[arg(long, value_name = "f32|bf16", default_value_t = Precision::F32)]
    precision: Precision,
    /// The folder to write; runs/NAME-NUMBER by default
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Stop behind this row: `--until tokens` only prepares the data
    #[arg(long, value_name = "ROW")]
    until: Option<String>,
}

impl Run {
    pub(super) fn run(self, registry: &Arc<Registry>) -> Result<(), Errors> {
        let file = PipelineFile::read(&self.pipeline, &self.set)?;
        let mut pipeline = Pipeline::new(&file, registry)?;
        let device = self.device.open()?;
        print(&format!("{}: {}\n", self.pipeline.display(), file.about));
        print(&format!("device: {}\n", device.describe()));
        let mut run = stages::Run {
            registry: registry.clone(),
            device,
            threads: self.device.threads(),
            precision: self.precision,
            seed: file.seed,
            pipeline: self.pipeline,
            cache: PathBuf::from("data"),
            folder: RunFolderChoice::Wanted { out: self.out, resolved: file.source.text.clone() },
            trainer: None,
            hooks: Vec::new(),
        };
        let Some(summary) = pipeline.run(&mut run, self.until.as_deref())? else { return Ok(()) };
        let seconds = summary.training.as_secs_f64();
        let speed = summary.tokens as f64 / seconds.max(1e-9);
        print(&format!("trained on {} tokens in {seconds:.1} s ({speed:.0} tokens/s)\n", summary.tokens));
        if let Some(row) = summary.evaluation {
            let accuracy = row.accuracy.map(|a| format!(", accuracy {:.2}%", 100.0 * a)).unwrap_or_default();
            print(&format!("final loss: train {:.4}, validation {:.4}{accuracy}\n", row.eval.train, row.eval.val));
        }
        if let RunFolderChoice::Made(folder) = &run.folder {
            print(&format!("run folder: {}\n", folder.path().display()));
        }
        Ok(())
    }
}
