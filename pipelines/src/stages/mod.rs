//! The stages of a pipeline: what a row of a pipeline file may name.
//!
//! Starting a stage makes its [`Product`], which the stages behind it take. Stages that act while a model is
//! trained (evaluation, checkpoints) leave a [`Hook`] with the run.

pub mod batches;
pub mod checkpoint;
pub mod documents;
pub mod evaluate;
pub mod model;
pub mod optimizer;
pub mod text;
pub mod train;

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;

use dataflow_graph::components::Precision;
use dataflow_graph::diagnostic::Errors;
use dataflow_graph::registry::{Info, Plugin, Registry};
use dataflow_kernels::device::Device;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::checkpoint::Writer;
use crate::checkpoint::store::Entry;
use crate::data::{BatchSource, Text, TokenSplits};
use crate::report::{RunFolder, StepRow};
use crate::resume::Resume;
use crate::trainer::Trainer;

/// What flows from a stage to those that name it as an input.
pub enum Product {
    /// A text.
    Text(Arc<Text>),
    /// A corpus.
    Documents(Arc<documents::Documents>),
    /// The token files of a text.
    Tokens(TokenSplits),
    /// Where batches come from.
    Batches(Box<dyn BatchSource>),
    /// A model file with its config.
    Model(model::Chosen),
    /// A model with what it is trained for.
    Loss(model::Objective),
    /// A model with a loss and what updates it.
    Optimizer(optimizer::Optimized),
    /// A training run, which the trainer of [`Run`] does.
    Training,
    /// Evaluations of a training run.
    Evaluation,
}

/// The kinds of [`Product`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// See [`Product::Text`].
    Text,
    /// See [`Product::Documents`].
    Documents,
    /// See [`Product::Tokens`].
    Tokens,
    /// See [`Product::Batches`].
    Batches,
    /// See [`Product::Model`].
    Model,
    /// See [`Product::Loss`].
    Loss,
    /// See [`Product::Optimizer`].
    Optimizer,
    /// See [`Product::Training`].
    Training,
    /// See [`Product::Evaluation`].
    Evaluation,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Kind::Text => "a text (Text)",
            Kind::Documents => "documents (Documents)",
            Kind::Tokens => "tokens (Chars, Tokenize, TokenFiles)",
            Kind::Batches => "batches (Windows, Sequential, Packed, Recall)",
            Kind::Model => "a model (Model)",
            Kind::Loss => "a loss (CrossEntropy)",
            Kind::Optimizer => "an optimizer (AdamW)",
            Kind::Training => "a training run (Train)",
            Kind::Evaluation => "evaluations (Evaluate)",
        })
    }
}

/// Why a stage cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum StageError {
    /// A file of the user is wrong.
    #[error(transparent)]
    File(#[from] Errors),
    /// Anything else, in words for the user.
    #[error("{0}")]
    Message(String),
}

impl StageError {
    /// Any error, in its own words.
    pub fn from_error(error: impl std::error::Error) -> Self {
        StageError::Message(error.to_string())
    }
}

/// What all stages of a run share.
pub struct Run {
    /// Where ops are found.
    pub registry: Arc<Registry>,
    /// What runs the model.
    pub device: Arc<dyn Device>,
    /// Threads for the preparation of data.
    pub threads: usize,
    /// Of matrix products.
    pub precision: Precision,
    /// The seed of the pipeline.
    pub seed: u64,
    /// The pipeline file, relative to which model files are looked for too.
    pub pipeline: PathBuf,
    /// Where prepared data is kept.
    pub cache: PathBuf,
    /// Where results go; made by the stage `Train`.
    pub folder: RunFolderChoice,
    /// Made by the stage `Train`.
    pub trainer: Option<Trainer>,
    /// What acts during training, in the order of the stages.
    pub hooks: Vec<Box<dyn Hook>>,
    /// The text of the model where it comes from a checkpoint, because its file is gone.
    pub model: Option<String>,
    /// The checkpoint that the run goes on from, if it does.
    pub resumed: Option<Entry>,
    /// Made by the first stage that saves something.
    pub writer: Option<Writer>,
}

/// Where a run writes.
pub enum RunFolderChoice {
    /// A folder that the user named, or one with a number.
    Wanted {
        /// `--out`
        out: Option<PathBuf>,
        /// How the run was started, for `run.ron`.
        origin: String,
        /// The pipeline as it runs.
        resolved: String,
    },
    /// That of a run to go on with.
    Resumed(Box<Resume>),
    /// It is there.
    Made(RunFolder),
}

impl Run {
    /// The trainer, which the stage `Train` makes before those behind it start.
    ///
    /// # Errors
    /// If there is none.
    pub fn trainer(&mut self) -> Result<&mut Trainer, StageError> {
        self.trainer.as_mut().ok_or_else(|| StageError::Message("no stage trains a model before this one".into()))
    }
}

impl Run {
    /// The thread that writes checkpoints.
    ///
    /// # Errors
    /// If there is no trainer, or the system has no more threads.
    pub fn writer(&mut self) -> Result<Writer, StageError> {
        let notices = self.trainer()?.notices().clone();
        let RunFolderChoice::Made(folder) = &self.folder else {
            return Err(StageError::Message("no stage trains a model before this one".into()));
        };
        if self.writer.is_none() {
            let writer = Writer::start(folder.clone(), notices).map_err(StageError::from_error)?;
            if let Some(entry) = self.resumed {
                writer.has(entry);
            }
            self.writer = Some(writer);
        }
        self.writer.clone().ok_or_else(|| StageError::Message("the thread that writes checkpoints is gone".into()))
    }
}

/// Something that happens while a model is trained.
pub trait Hook: Send {
    /// After `done` updates: 0 before the first one; `last` after the last one.
    ///
    /// # Errors
    /// Ends the run.
    fn after(&mut self, trainer: &mut Trainer, done: u64, last: bool) -> Result<(), StageError>;

    /// With the figures of an update.
    fn step(&mut self, _row: &StepRow) {}

    /// When the run is asked to stop before its end: whether it saved where the run is.
    ///
    /// # Errors
    /// Ends the run at once.
    fn stop(&mut self, _trainer: &mut Trainer) -> Result<bool, StageError> {
        Ok(false)
    }

    /// At the end of the run: waits for what is still being written.
    ///
    /// # Errors
    /// What could not be written.
    fn finish(&mut self, _trainer: &mut Trainer) -> Result<(), StageError> {
        Ok(())
    }
}

/// A registered kind of row of a pipeline.
pub trait Stage: fmt::Debug + Send + Sync + 'static {
    /// What it takes, in order.
    fn inputs(&self) -> &'static [Kind];

    /// What it makes.
    fn output(&self) -> Kind;

    /// Starts the stage with the products of its inputs.
    ///
    /// # Errors
    /// In words for the user.
    fn start(&self, run: &mut Run, inputs: &[&Product]) -> Result<Product, StageError>;

    /// For `dataflow check`: the model file that the row names and its config.
    fn model(&self) -> Option<&model::Model> {
        None
    }
}

/// Registration of stages, beside [`Registry::op`].
pub trait StageRegistry {
    /// Registers a stage; a later registration of the same name replaces the earlier one.
    fn stage<T: Stage + Serialize + DeserializeOwned>(&mut self, info: Info);
}

impl StageRegistry for Registry {
    fn stage<T: Stage + Serialize + DeserializeOwned>(&mut self, info: Info) {
        self.add::<dyn Stage, T>(info, |stage| Arc::new(stage));
    }
}

/// Registers every built-in stage.
pub struct BuiltinStages;

impl Plugin for BuiltinStages {
    fn build(&self, registry: &mut Registry) {
        text::register(registry);
        documents::register(registry);
        batches::register(registry);
        model::register(registry);
        optimizer::register(registry);
        train::register(registry);
        evaluate::register(registry);
        checkpoint::register(registry);
    }
}
