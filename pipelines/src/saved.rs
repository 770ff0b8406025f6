//! A trained model, opened from a run folder or a weight file.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use dataflow_graph::diagnostic::{Diagnostic, Errors, Source};
use dataflow_graph::format::formula::Number;
use dataflow_graph::format::model::ModelFile;
use dataflow_graph::format::number::Scope;
use dataflow_graph::session::Session;

use crate::checkpoint::store::{Entry, SIDECAR, Verified};
use crate::checkpoint::{Store, Tensors, WEIGHTS, tensors};
use crate::data::Tokenizer;
use crate::files::parent;
use crate::pipeline::PipelineFile;
use crate::report::RunFolder;
use crate::stages::model::Chosen;

/// Notes in the header of a weight file: the updates made.
pub const STEP: &str = "dataflow.step";
/// The text of the model file.
const MODEL: &str = "dataflow.model";
/// What of the model's config is set, as a JSON object.
const CONFIG: &str = "dataflow.config";
/// What turned the text into tokens, in JSON.
const TOKENIZER: &str = "dataflow.tokenizer";
/// The program's version.
const VERSION: &str = "dataflow.version";

/// A model with its parameters.
#[derive(Debug)]
pub struct Saved {
    /// The file that the parameters come from.
    pub weights: PathBuf,
    /// Updates made, where the file says so.
    pub step: Option<u64>,
    /// The model file.
    pub model: Arc<ModelFile>,
    /// What of its config is set, the vocabulary and the block among it.
    pub config: BTreeMap<String, Number>,
    /// What turned the text into tokens, where there is one.
    pub tokenizer: Option<Tokenizer>,
    /// The parameters by name.
    pub parameters: Tensors,
    /// The pipeline as it ran, where the model was trained by one.
    pub pipeline: Option<PipelineFile>,
    /// Damaged checkpoints that were passed over.
    pub warnings: Vec<String>,
}

impl Saved {
    /// Opens a run folder, a checkpoint folder in it, or a weight file that this program wrote. Of a run folder it takes
    /// the checkpoint of the lowest validation loss if there is one, else the latest; all checksums are compared.
    ///
    /// # Errors
    /// Nothing there, nothing that is whole, or a weight file without a model in its header.
    pub fn open(path: &Path) -> Result<Self, Errors> {
        let (checkpoint, run, mut warnings) = if path.is_dir() && !path.join(SIDECAR).exists() {
            let (found, damaged) = Store::of(path).best().map_err(to_errors)?;
            let warnings: Vec<String> = damaged.iter().map(ToString::to_string).collect();
            let Some((_, checkpoint)) = found else { return Err(nothing(path, &warnings)) };
            (checkpoint, Some(path.to_path_buf()), warnings)
        } else if path.is_dir() {
            (Verified::open(path).map_err(to_errors)?, path.ancestors().nth(2).map(Path::to_path_buf), Vec::new())
        } else {
            return Self::file(path);
        };
        let (parameters, notes) = checkpoint.parameters().map_err(to_errors)?;
        let pipeline = match (run, checkpoint.sidecar.pipeline.as_str()) {
            (_, "") => None,
            (run, text) => {
                // the name is for messages, and model files are looked for beside it
                let name = run.unwrap_or_default().join(crate::report::folder::RESOLVED);
                let source = Source { name: name.display().to_string(), text: text.to_string() };
                Some(PipelineFile::parse(Arc::new(source))?)
            }
        };
        warnings.iter_mut().for_each(|w| w.push_str("; the one before it is used"));
        Self::new(checkpoint.path.join(WEIGHTS), parameters, &notes, pipeline, warnings)
    }

    fn file(path: &Path) -> Result<Self, Errors> {
        let (parameters, notes) = tensors::read(path).map_err(to_errors)?;
        let folder = RunFolder::resume(parent(path)).ok();
        let pipeline = folder.map(|f| PipelineFile::read(&f.resolved(), &[])).transpose()?;
        Self::new(path.to_path_buf(), parameters, &notes, pipeline, Vec::new())
    }

    fn new(
        weights: PathBuf,
        parameters: Tensors,
        notes: &BTreeMap<String, String>,
        pipeline: Option<PipelineFile>,
        warnings: Vec<String>,
    ) -> Result<Self, Errors> {
        let path = weights.display();
        let wrong = |what: String| Diagnostic::new(format!("{path}: {what}"));
        let Some(text) = notes.get(MODEL) else {
            let error = wrong("its header has no model, so it was not written by this program".into());
            return Err(error
                .help("`dataflow import FILE --model models/x.ron -o RUN` makes a run folder of it")
                .into());
        };
        // errors in it are shown as places of this file
        let source = Source { name: format!("{path} (model)"), text: text.clone() };
        let model = Arc::new(ModelFile::parse(Arc::new(source))?);
        let config = match notes.get(CONFIG) {
            Some(text) => parse_config(text).map_err(|e| wrong(format!("`{CONFIG}`: {e}")))?,
            None => BTreeMap::new(),
        };
        let tokenizer = notes.get(TOKENIZER).map(|text| serde_json::from_str(text)).transpose();
        let tokenizer = tokenizer.map_err(|e| wrong(format!("`{TOKENIZER}`: {e}")))?;
        let step = notes.get(STEP).and_then(|text| text.parse().ok());
        Ok(Self { weights, step, model, config, tokenizer, parameters, pipeline, warnings })
    }

    /// The value of every config name of the model, with some set otherwise than in training (a longer `block`).
    ///
    /// # Errors
    /// A name that the model does not have.
    pub fn scope(&self, set: &BTreeMap<String, Number>) -> Result<Scope, Errors> {
        let mut config = self.config.clone();
        config.extend(set.iter().map(|(name, number)| (name.clone(), *number)));
        self.model.config(&config)
    }

    /// Copies the parameters to a session of the model.
    ///
    /// # Errors
    /// Every parameter that is missing, too many, or has another shape.
    pub fn fill(&self, session: &Session) -> Result<(), Errors> {
        let wrong = |what| Diagnostic::new(format!("{}: {what}", self.weights.display())).into();
        write_parameters(session, &self.parameters).map_err(wrong)
    }
}

fn to_errors(error: impl std::error::Error) -> Errors {
    Diagnostic::new(error.to_string()).into()
}

fn nothing(path: &Path, damaged: &[String]) -> Errors {
    let message = format!("{} holds no checkpoint", path.display());
    match damaged {
        [] => {
            Diagnostic::new(message).help("`dataflow run` writes them, with a `Checkpoint` row in the pipeline").into()
        }
        damaged => Diagnostic::new(format!("{message} that is whole: {}", damaged.join("; "))).into(),
    }
}

/// Copies parameters to a session that has exactly these.
///
/// # Errors
/// A list of all that do not fit.
pub fn write_parameters(session: &Session, parameters: &Tensors) -> Result<(), String> {
    let planned = &session.plan().parameters;
    let mut wrong = Vec::new();
    for p in planned {
        let (name, shape) = (&p.parameter.name, &p.port.tensor.shape);
        match parameters.get(name) {
            None => wrong.push(format!("`{name}` {shape:?} is missing")),
            Some(tensor) if tensor.shape != *shape || tensor.as_f32().is_none() => {
                wrong.push(format!("`{name}` has shape {:?}, and the model wants {shape:?}", tensor.shape));
            }
            Some(_) => {}
        }
    }
    let known = |name: &&String| planned.iter().any(|p| p.parameter.name == **name);
    wrong.extend(parameters.keys().filter(|n| !known(n)).map(|n| format!("`{n}` is none of the model's")));
    if !wrong.is_empty() {
        return Err(format!("the parameters do not fit the model: {}", wrong.join("; ")));
    }
    for p in planned {
        let numbers = parameters.get(&p.parameter.name).and_then(crate::checkpoint::Tensor::as_f32);
        numbers.into_iter().for_each(|numbers| session.write_real(&p.port, numbers));
    }
    Ok(())
}

/// The notes that make a weight file complete: model, config, vocabulary.
pub(crate) fn notes(model: &Chosen) -> BTreeMap<String, String> {
    let tokenizer = model.batches.tokenizer().filter(|t| **t != Tokenizer::Unknown);
    notes_of(&model.file, &model.config, tokenizer)
}

/// As [`notes`], of the parts.
pub(crate) fn notes_of(
    model: &ModelFile,
    config: &BTreeMap<String, Number>,
    tokenizer: Option<&Tokenizer>,
) -> BTreeMap<String, String> {
    let numbers = config.iter().map(|(name, number)| match number {
        Number::Int(i) => (name.clone(), serde_json::Value::from(*i)),
        Number::Real(x) => (name.clone(), serde_json::Value::from(*x)),
    });
    let config = serde_json::Value::Object(numbers.collect()).to_string();
    let mut notes = BTreeMap::from([
        // what PyTorch's own writers say, and some readers ask for
        ("format".to_string(), "pt".to_string()),
        (VERSION.into(), env!("CARGO_PKG_VERSION").into()),
        (MODEL.into(), model.source.text.clone()),
        (CONFIG.into(), config),
    ]);
    if let Some(text) = tokenizer.and_then(|t| serde_json::to_string(t).ok()) {
        notes.insert(TOKENIZER.into(), text);
    }
    notes
}

/// The model file's text among the notes of a weight file.
pub(crate) fn model_text(notes: &BTreeMap<String, String>) -> Option<&str> {
    notes.get(MODEL).map(String::as_str)
}

/// Whether two weight files are of one model.
pub(crate) fn same_model(one: &BTreeMap<String, String>, other: &BTreeMap<String, String>) -> bool {
    [MODEL, CONFIG].iter().all(|key| one.get(*key) == other.get(*key))
}

fn parse_config(text: &str) -> Result<BTreeMap<String, Number>, String> {
    let numbers: BTreeMap<String, serde_json::Number> = serde_json::from_str(text).map_err(|e| e.to_string())?;
    let number = |n: serde_json::Number| match n.as_i64() {
        Some(i) => Number::Int(i),
        None => Number::Real(n.as_f64().unwrap_or(f64::NAN)),
    };
    Ok(numbers.into_iter().map(|(name, n)| (name, number(n))).collect())
}

/// A checkpoint in words.
pub(crate) fn describe(store: &Store, entry: Entry) -> String {
    format!("{} (step {})", store.path(entry).display(), entry.step)
}
