//! `Train`: compiles the model and makes the trainer.

use dataflow_graph::format::number::Size;
use dataflow_graph::registry::{Info, Registry};
use serde::{Deserialize, Serialize};

use super::{Kind, Product, Run, RunFolderChoice, Stage, StageError, StageRegistry};
use crate::checkpoint::Store;
use crate::report::RunFolder;
use crate::report::folder::TOKENIZER;
use crate::trainer::{OnNonfinite, Setup, Trainer};

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
    /// Whether a loss or gradient that is not finite ends the run (`Stop`) or drops the batch (`Skip`).
    #[serde(default)]
    on_nonfinite: OnNonfinite,
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
        let pipeline = match &run.folder {
            RunFolderChoice::Wanted { resolved, .. } => resolved.clone(),
            RunFolderChoice::Resumed(resume) => resume.file.source.text.clone(),
            RunFolderChoice::Made(_) => String::new(),
        };
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
            pipeline,
            on_nonfinite: self.on_nonfinite,
        };
        let mut trainer = Trainer::prepare(setup)?;
        // the folder is made once the model is known to be fine
        let folder = match &run.folder {
            RunFolderChoice::Made(folder) => folder.clone(),
            RunFolderChoice::Wanted { out, origin, resolved } => {
                let name = run.pipeline.file_stem().map_or("run".into(), |s| s.to_string_lossy().into_owned());
                let mut folder = match out {
                    Some(path) => RunFolder::at(path),
                    None => RunFolder::create(std::path::Path::new("runs"), &name),
                }
                .map_err(StageError::from_error)?;
                folder.describe(origin.clone(), resolved.clone()).map_err(StageError::from_error)?;
                folder
            }
            RunFolderChoice::Resumed(resume) => {
                let mut folder = resume.folder.clone();
                let store = Store::of(folder.path());
                let first = resume.checkpoint.as_ref().map(|(entry, _)| *entry);
                if let Some((_, checkpoint)) = &resume.checkpoint {
                    trainer.restore(checkpoint).map_err(StageError::from_error)?;
                }
                store.sweep(first.map_or(0, |entry| entry.step)).map_err(StageError::from_error)?;
                folder
                    .describe(resume.origin.to_text()?, resume.file.source.text.clone())
                    .map_err(StageError::from_error)?;
                run.resumed = first;
                folder
            }
        };
        // text goes in and comes out of the trained model wherever the folder is moved to
        let tokenizer = optimized.objective.model.batches.tokenizer_file();
        if let Some(file) = tokenizer.filter(|file| file.is_file()) {
            folder.keep(&file, TOKENIZER).map_err(StageError::from_error)?;
        }
        run.folder = RunFolderChoice::Made(folder);
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
