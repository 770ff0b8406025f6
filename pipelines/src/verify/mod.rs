//! Compares golden files with this program: ops, whole models, and training trajectories.
//!
//! A golden file (`tests/golden/README.md`) holds inputs of the published PyTorch code and what it makes of
//! them in double precision. Every comparison runs what users run: a model file or rows of ops become a plan,
//! and the device runs it; no kernel is called past the graph.

mod file;
mod model;
mod op;
mod op_table;
mod program;
mod report;
pub mod tolerance;
mod update;

use std::collections::HashSet;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use dataflow_graph::components::Precision;
use dataflow_graph::diagnostic::{Diagnostic, Errors};
use dataflow_graph::format::model::ModelFile;
use dataflow_graph::registry::Registry;
use dataflow_kernels::device::{Device, DeviceError};
use serde::Serialize;

use crate::files::FileError;
use file::GoldenFile;
pub use model::Trajectory;
pub use report::{summary, table};
use tolerance::Kind;

/// One tensor of a golden file beside this program's.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Comparison {
    /// The golden file.
    pub file: String,
    /// The tensor in it, such as `case0/grad/x` or `train/loss`.
    pub tensor: String,
    /// Largest difference over largest magnitude; infinite (`null` in JSON) where this program's has a NaN.
    pub relative_error: f64,
    /// What `relative_error` may be.
    pub tolerance: f64,
    /// Whether it is within the tolerance.
    pub ok: bool,
}

/// Why a golden file cannot be compared.
#[derive(Debug, thiserror::Error)]
#[error("{}: {problem}", path.display())]
pub struct VerifyError {
    /// The golden file.
    pub path: PathBuf,
    /// What is wrong.
    #[source]
    pub problem: Problem,
}

/// What is wrong with a golden file, or with the model that it is compared with.
#[derive(Debug, thiserror::Error)]
pub enum Problem {
    /// It cannot be read.
    #[error(transparent)]
    File(#[from] FileError),
    /// It is no safetensors file, or a part of one.
    #[error("{0}")]
    NotSafetensors(String),
    /// It lacks what a golden file has, or contradicts itself.
    #[error("{0}; see tests/golden/README.md for the format")]
    Content(String),
    /// There is no op of the name in the metadata.
    #[error("there is no golden op `{op}`; there are: {known}")]
    UnknownOp {
        /// The name.
        op: String,
        /// All names.
        known: String,
    },
    /// The parameters of file and model differ.
    #[error("the parameters of the file and of {model} differ:{}", List(differences))]
    Parameters {
        /// The model.
        model: String,
        /// One line for each difference.
        differences: Vec<String>,
    },
    /// The model does not compile.
    #[error("{0}")]
    Graph(#[from] Errors),
    /// The device failed.
    #[error(transparent)]
    Device(#[from] DeviceError),
}

impl From<Diagnostic> for Problem {
    fn from(diagnostic: Diagnostic) -> Self {
        Problem::Graph(diagnostic.into())
    }
}

struct List<'a>(&'a [String]);

impl fmt::Display for List<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|line| write!(f, "\n  {line}"))
    }
}

/// What computes the numbers that are compared.
#[derive(Clone)]
pub struct Backend {
    /// Where programs run.
    pub device: Arc<dyn Device>,
    /// The precision that they are compiled for; tolerances follow.
    pub precision: Precision,
}

/// Finds the model of a name such as `llama`.
pub type Models<'a> = dyn Fn(&str) -> Result<Arc<ModelFile>, Errors> + 'a;

/// The models `NAME.ron` of a folder.
pub fn models_in(folder: &Path) -> impl Fn(&str) -> Result<Arc<ModelFile>, Errors> {
    let folder = folder.to_path_buf();
    move |name| {
        let plain = !name.is_empty() && name.chars().all(|c| c.is_ascii_alphanumeric() || "_-".contains(c));
        if !plain {
            let message = format!("`{name}` is no name of a model");
            return Err(Diagnostic::new(message).help("a model's name is that of its file, without `.ron`").into());
        }
        Ok(Arc::new(ModelFile::read(&folder.join(format!("{name}.ron")))?))
    }
}

/// Compares every tensor of a golden file with what this program computes from its inputs.
///
/// # Errors
/// A file that cannot be read or is no golden file, a model whose parameters are not the file's, or a device
/// that fails. A tensor above its tolerance is no error: look at [`Comparison::ok`].
pub fn verify_file(
    path: &Path,
    registry: &Arc<Registry>,
    models: &Models<'_>,
    backend: &Backend,
) -> Result<Vec<Comparison>, VerifyError> {
    let run = || {
        let file = GoldenFile::read(path)?;
        let file_name = path.display().to_string();
        let mut judge = Judge { file: file_name, precision: backend.precision, comparisons: Vec::new() };
        match (file.word("op"), file.word("model")) {
            (Some(op), None) => op::verify(&file, op, registry, backend, &mut judge)?,
            (None, Some(model)) => model::verify(&file, model, registry, models, backend, &mut judge)?,
            (None, None) => {
                let message = "the metadata names neither an `op` nor a `model`, so this is no golden file";
                return Err(Problem::Content(message.into()));
            }
            (Some(_), Some(_)) => {
                return Err(Problem::Content("the metadata names both an `op` and a `model`".into()));
            }
        }
        judge.check_complete(&file)?;
        Ok(judge.comparisons)
    };
    run().map_err(|problem| VerifyError { path: path.to_path_buf(), problem })
}

/// Trains the model of a golden file as the file says, from its initial parameters.
///
/// # Errors
/// As [`verify_file`], and if the file is not one of a model.
pub fn trajectory(
    path: &Path,
    registry: &Arc<Registry>,
    models: &Models<'_>,
    backend: &Backend,
) -> Result<Trajectory, VerifyError> {
    let run = || {
        let file = GoldenFile::read(path)?;
        let model = file.word("model").ok_or_else(|| Problem::Content("the metadata names no `model`".into()))?;
        model::trajectory(&file, model, registry, models, backend)
    };
    run().map_err(|problem| VerifyError { path: path.to_path_buf(), problem })
}

/// Collects comparisons.
struct Judge {
    file: String,
    precision: Precision,
    comparisons: Vec<Comparison>,
}

impl Judge {
    /// Compares this program's numbers with the golden ones of the same layout.
    fn compare(&mut self, tensor: impl Into<String>, ours: &[f32], golden: &[f32], kind: Kind) {
        let tolerance = kind.tolerance(self.precision);
        let relative_error = relative_error(ours, golden);
        let ok = relative_error <= tolerance;
        self.comparisons.push(Comparison {
            file: self.file.clone(),
            tensor: tensor.into(),
            relative_error,
            tolerance,
            ok,
        });
    }
}

impl Judge {
    /// Fails if the file has results that nothing was compared with: those of a case that the metadata does not
    /// list, or of an input that is not there.
    fn check_complete(&self, file: &GoldenFile) -> Result<(), Problem> {
        let compared: HashSet<&str> = self.comparisons.iter().map(|c| c.tensor.as_str()).collect();
        let result = |name: &str| name.starts_with("grad/") || name.contains("/grad/") || name.contains("/out/");
        match file.below("").find(|(name, _)| result(name) && !compared.contains(name)) {
            Some((name, _)) => Err(Problem::Content(format!("`{name}` is the result of nothing that the file lists"))),
            None => Ok(()),
        }
    }
}

/// Largest difference over largest magnitude of `golden`; infinite for NaN and for different sizes.
fn relative_error(ours: &[f32], golden: &[f32]) -> f64 {
    if ours.len() != golden.len() {
        return f64::INFINITY;
    }
    let magnitude = golden.iter().fold(0.0f64, |m, x| m.max(f64::from(x.abs())));
    let difference = ours.iter().zip(golden).fold(0.0f64, |m, (&a, &b)| {
        let d = (f64::from(a) - f64::from(b)).abs();
        if d.is_nan() { f64::INFINITY } else { m.max(d) }
    });
    match difference {
        0.0 => 0.0,
        // where all golden numbers are 0, any other number is far off
        d if d.is_finite() => d / magnitude.max(1e-12),
        _ => f64::INFINITY,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_are_relative_to_the_largest_magnitude() {
        assert_eq!(relative_error(&[1.0, -3.5], &[1.0, -4.0]), 0.125);
        assert_eq!(relative_error(&[0.0, 0.0], &[0.0, 0.0]), 0.0);
        assert!(relative_error(&[1e-3], &[0.0]) > 1e6);
        assert_eq!(relative_error(&[f32::NAN, 0.0], &[1.0, 0.0]), f64::INFINITY);
        assert_eq!(relative_error(&[1.0, f32::NAN], &[1.0, 0.5]), f64::INFINITY);
        assert_eq!(relative_error(&[f32::INFINITY], &[f32::INFINITY]), f64::INFINITY);
        assert_eq!(relative_error(&[1.0], &[1.0, 2.0]), f64::INFINITY);
    }

    #[test]
    fn a_model_is_named_by_a_plain_word() {
        let models = models_in(Path::new("models"));
        for name in ["", "../llama", "a/b", "a\\b"] {
            assert!(models(name).unwrap_err().to_string().contains("is no name of a model"), "{name}");
        }
        assert!(models("no_such_model").unwrap_err().to_string().contains("cannot read"));
    }
}
