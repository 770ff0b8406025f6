//! `Model` and `CrossEntropy`: which model is trained, and for what.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use dataflow_graph::diagnostic::{Diagnostic, Errors, Source};
use dataflow_graph::format::formula::Number;
use dataflow_graph::format::model::ModelFile;
use dataflow_graph::format::number::Scope;
use dataflow_graph::op::Op;
use dataflow_graph::registry::{Info, Registry};
use serde::{Deserialize, Serialize};

use super::{Kind, Product, Run, Stage, StageError, StageRegistry};
use crate::data::BatchSource;

/// A model file, with some of its config names set. The vocabulary and the block follow from the batches unless
/// they are set.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Model {
    file: PathBuf,
    #[serde(default, serialize_with = "numbers")]
    config: BTreeMap<String, Number>,
}

fn numbers<S: serde::Serializer>(config: &BTreeMap<String, Number>, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_map(config.iter().map(|(name, number)| (name, number.real())))
}

/// A model file with its config, and the batches that it is for.
pub struct Chosen {
    /// The file.
    pub file: Arc<ModelFile>,
    /// Its config.
    pub scope: Scope,
    /// What of its config the pipeline sets.
    pub config: BTreeMap<String, Number>,
    /// Where batches come from.
    pub batches: Box<dyn BatchSource>,
}

impl Clone for Chosen {
    fn clone(&self) -> Self {
        let (file, scope, config) = (self.file.clone(), self.scope.clone(), self.config.clone());
        Self { file, scope, config, batches: self.batches.duplicate() }
    }
}

impl Model {
    /// The file with its config. Its path is relative to the current folder, or to that of the pipeline.
    ///
    /// # Errors
    /// Everything that is wrong with the file, or names that it does not have.
    pub fn load(&self, pipeline: &Path, set: &[(&str, usize)]) -> Result<(Arc<ModelFile>, Scope), Errors> {
        let path = self.path(pipeline).ok_or_else(|| {
            let (file, beside) = (self.file.display(), beside(pipeline, &self.file));
            let beside = if beside == self.file { String::new() } else { format!(", nor `{}`", beside.display()) };
            Diagnostic::new(format!("there is no model file `{file}`{beside}"))
                .help("name one with --set model.file=models/longhorn.ron")
        })?;
        let file = Arc::new(ModelFile::read(&path)?);
        let scope = file.config(&self.settings(set))?;
        Ok((file, scope))
    }

    /// Where the file is, if it is anywhere: as named, or beside the pipeline.
    pub fn path(&self, pipeline: &Path) -> Option<PathBuf> {
        [self.file.clone(), beside(pipeline, &self.file)].into_iter().find(|p| p.exists())
    }

    /// What the row sets of the model's config, and what follows from the batches.
    pub fn settings(&self, set: &[(&str, usize)]) -> BTreeMap<String, Number> {
        let mut config = self.config.clone();
        for (name, value) in set {
            config.entry((*name).to_string()).or_insert(Number::Int(*value as i64));
        }
        config
    }
}

fn beside(pipeline: &Path, file: &Path) -> PathBuf {
    pipeline.parent().unwrap_or(Path::new("")).join(file)
}

impl Stage for Model {
    fn inputs(&self) -> &'static [Kind] {
        &[Kind::Batches]
    }
    fn output(&self) -> Kind {
        Kind::Model
    }
    fn start(&self, run: &mut Run, inputs: &[&Product]) -> Result<Product, StageError> {
        let [Product::Batches(batches)] = inputs else { unreachable!("kinds are checked before stages start") };
        let (vocabulary, block) = (batches.vocabulary(), batches.shape().1);
        let follows = [("vocab", vocabulary), ("block", block)];
        let (file, scope) = match &run.model {
            Some(text) => {
                let source = Source { name: self.file.display().to_string(), text: text.clone() };
                let file = Arc::new(ModelFile::parse(Arc::new(source))?);
                let scope = file.config(&self.settings(&follows))?;
                (file, scope)
            }
            None => self.load(&run.pipeline, &follows)?,
        };
        if let Some(vocab) = scope.get("vocab").and_then(Number::int)
            && vocab < vocabulary as i64
        {
            let message = format!("the model has a vocabulary of {vocab}, but the tokens go up to {}", vocabulary - 1);
            return Err(StageError::Message(format!("{message}: leave `vocab` out of `config`, or raise it")));
        }
        let config = self.settings(&follows);
        Ok(Product::Model(Chosen { file, scope, config, batches: batches.duplicate() }))
    }
    fn model(&self) -> Option<&Model> {
        Some(self)
    }
}

/// The mean negative log-likelihood of the targets, in nats per token.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CrossEntropy {}

/// A model with its loss.
#[derive(Clone)]
pub struct Objective {
    /// The model.
    pub model: Chosen,
    /// The loss, an op of (logits, targets).
    pub loss: Arc<dyn Op>,
    /// The share of right answers, where the task has them.
    pub accuracy: Option<Arc<dyn Op>>,
}

impl Objective {
    /// The objectives of a program that trains, or of one that evaluates.
    pub fn list(&self, training: bool) -> Vec<(String, Arc<dyn Op>)> {
        let accuracy = self.accuracy.clone().filter(|_| !training).map(|op| ("accuracy".to_string(), op));
        std::iter::once(("loss".to_string(), self.loss.clone())).chain(accuracy).collect()
    }
}

impl Stage for CrossEntropy {
    fn inputs(&self) -> &'static [Kind] {
        &[Kind::Model, Kind::Batches]
    }
    fn output(&self) -> Kind {
        Kind::Loss
    }
    fn start(&self, _: &mut Run, inputs: &[&Product]) -> Result<Product, StageError> {
        let [Product::Model(model), Product::Batches(batches)] = inputs else {
            unreachable!("kinds are checked before stages start")
        };
        let accuracy = batches.has_answers().then(|| Arc::new(dataflow_ops::loss::Accuracy {}) as Arc<dyn Op>);
        let loss = Arc::new(dataflow_ops::loss::CrossEntropy {});
        Ok(Product::Loss(Objective { model: model.clone(), loss, accuracy }))
    }
}

pub(super) fn register(registry: &mut Registry) {
    registry.stage::<Model>(Info {
        name: "Model",
        about: "A model file with some of its config set; vocabulary and block follow from the batches.",
        inputs: &["batches"],
        formula: "",
        source: "",
        example: "(file: \"models/longhorn.ron\")",
    });
    registry.stage::<CrossEntropy>(Info {
        name: "CrossEntropy",
        about: "The loss: the mean negative log-likelihood of the targets, in nats per token.",
        inputs: &["model", "batches"],
        formula: "mean(log sum exp(logits) - logits[target])",
        source: "",
        example: "",
    });
}
