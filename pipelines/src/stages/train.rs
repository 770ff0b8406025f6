//! `Train`: compiles the model and makes the trainer.

use dataflow_graph::format::number::Size;
use dataflow_graph::registry::{Info, Registry};
use serde::{Deserialize, Serialize};

use super::{Kind, Product, Run, RunFolderChoice, Stage, StageError, StageRegistry};
use crate::files::write_atomically;
use crate::report::RunFolder;
use crate::trainer::{Setup, Trainer};

/// So many updates, each with the gradient of one or more batches.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Train {
    steps: Size,
    /// Batches whose gradients are averaged for an update.
    #[serde(default = "one")]
    micro_batches: Size,
    /// The most bytes that activations and gradients of a step may take; what is cheap is recomputed until they fit.
    #[serde(default)]
    memory_budget: Option<Size>,
    /// Steps between lines of progress where the output is no terminal.
    #[serde(default = "hundred")]
    log_every: Size,
}

fn one() -> Size {
    Size(1)
}

fn hundred() -> Size {
    Size(100)
}

impl Stage for Train {
    fn inputs(&self) -> &'static [Kind] {
        &[Kind::Optimizer]
    }
    fn output(&self) -> Kind {
        Kind::Training
    }
    fn start(&self, run: &mut Run, inputs: &[&Product]) -> Result<Product, StageError> {
        let [Product::Optimizer(optimized)] = inputs else { unreachable!("kinds are checked before stages start") };
        if *self.steps == 0 || *self.micro_batches == 0 || *self.log_every == 0 {
            return Err(StageError::Message("`steps`, `micro_batches` and `log_every` must be at least 1".into()));
        }
        if run.trainer.is_some() {
            return Err(StageError::Message("a pipeline trains one model: remove the other `Train` row".into()));
        }
        let setup = Setup {
            registry: run.registry.clone(),
            device: run.device.clone(),
            precision: run.precision,
            optimized: optimized.clone(),
            seed: run.seed,
            steps: *self.steps as u64,
            micro_batches: *self.micro_batches,
            log_every: *self.log_every as u64,
            memory_budget: self.memory_budget.map(|bytes| *bytes),
        };
        let trainer = Trainer::prepare(setup)?;
        // the folder is made once the model is known to be fine
        if let RunFolderChoice::Wanted { out, resolved } = &run.folder {
            let name = run.pipeline.file_stem().map_or("run".into(), |s| s.to_string_lossy().into_owned());
            let folder = match out {
                Some(path) => RunFolder::at(path),
                None => RunFolder::create(std::path::Path::new("runs"), &name),
            };
            let folder = folder.map_err(StageError::from_error)?;
            write_atomically(&folder.resolved(), |file| std::io::Write::write_all(file, resolved.as_bytes()))
                .map_err(StageError::from_error)?;
            run.folder = RunFolderChoice::Made(folder);
        }
        run.trainer = Some(trainer);
        Ok(Product::Training)
    }
}

pub(super) fn register(registry: &mut Registry) {
    registry.stage::<Train>(Info {
        name: "Train",
        about: "Trains the model for a number of updates.",
        inputs: &["optimizer"],
        formula: "",
        source: "",
        example: "(steps: 2000)",
    });
}
