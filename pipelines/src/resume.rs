//! Going on with a run: from where, and whether it is still the same one.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use dataflow_graph::diagnostic::{Diagnostic, Errors, Source};
use dataflow_graph::registry::Registry;
use ron::ser::PrettyConfig;
use serde::{Deserialize, Serialize};

use crate::changes::changes;
use crate::checkpoint::store::{Entry, Verified};
use crate::checkpoint::{CheckpointError, Store};
use crate::files::FileError;
use crate::pipeline::{Pipeline, PipelineFile};
use crate::report::RunFolder;
use crate::saved;

/// How a run was started: `run.ron`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename = "Run", deny_unknown_fields)]
pub struct Origin {
    /// The pipeline file.
    pub pipeline: PathBuf,
    /// What `--set` changed in it, in order.
    pub settings: Vec<String>,
    /// The file's text then.
    pub text: String,
}

impl Origin {
    /// The text of the file.
    ///
    /// # Errors
    /// None that are known.
    pub fn to_text(&self) -> Result<String, Errors> {
        let pretty = PrettyConfig::new().escape_strings(false).struct_names(true);
        let text = ron::ser::to_string_pretty(self, pretty).map_err(|e| Diagnostic::new(e.to_string()))?;
        Ok(text + "\n")
    }

    fn read(path: &Path) -> Result<Self, Errors> {
        let text = fs::read_to_string(path).map_err(FileError::on("read", path)).map_err(message)?;
        ron::from_str(&text).map_err(|e| Diagnostic::new(format!("{}: {e}", path.display())).into())
    }

    fn parse(&self) -> Result<PipelineFile, Errors> {
        let source = Source { name: self.pipeline.display().to_string(), text: self.text.clone() };
        PipelineFile::with(Arc::new(source), &self.settings)
    }
}

/// A run to go on with.
pub struct Resume {
    /// Its folder.
    pub folder: RunFolder,
    /// How it was started, with what is set now.
    pub origin: Origin,
    /// The pipeline as it goes on.
    pub file: PipelineFile,
    /// Where it goes on; from the beginning if nothing was saved.
    pub checkpoint: Option<(Entry, Verified)>,
    /// The model as it was trained, for where its file is gone.
    pub model: Option<String>,
    /// Damaged checkpoints that were passed over.
    pub warnings: Vec<String>,
}

impl Resume {
    /// Finds out how to go on with the run in `folder`. `pipeline` is the file that the user names, if he names one, and
    /// `settings` what he sets.
    ///
    /// # Errors
    /// A pipeline or model that is not what it was, with a list of the differences; files that cannot be read.
    pub fn prepare(
        folder: RunFolder,
        pipeline: Option<&Path>,
        settings: &[String],
        registry: &Registry,
    ) -> Result<Self, Errors> {
        let mut origin = Origin::read(&folder.origin())?;
        let name = |setting: &String| setting.split('=').next().unwrap_or_default().trim().to_string();
        origin.settings.retain(|old| settings.iter().all(|new| name(new) != name(old)));
        origin.settings.extend_from_slice(settings);
        let was = origin.parse()?;
        let file = match pipeline {
            None => was,
            Some(path) => {
                let now = PipelineFile::read(path, &origin.settings)?;
                let changed = changes(&was.source.text, &now.source.text);
                if !changed.is_empty() {
                    return Err(refusal(&folder, &path.display().to_string(), &changed));
                }
                origin.pipeline = path.to_path_buf();
                origin.text = fs::read_to_string(path).map_err(FileError::on("read", path)).map_err(message)?;
                now
            }
        };
        let store = Store::of(folder.path());
        let (checkpoint, damaged) = store.latest().map_err(message)?;
        if let Some(later) = damaged.iter().find(|e| matches!(e, CheckpointError::Format { .. })) {
            return Err(Diagnostic::new(later.to_string()).into());
        }
        let next = match &checkpoint {
            Some((entry, _)) => format!("the one before it is used: {}", saved::describe(&store, *entry)),
            None => "there is none before it, and the run starts anew".into(),
        };
        let warnings = damaged.iter().map(|e| format!("{e}; {next}")).collect();
        let mut resume = Self { folder, origin, file, checkpoint, model: None, warnings };
        resume.compare_models(settings, registry)?;
        Ok(resume)
    }

    fn compare_models(&mut self, settings: &[String], registry: &Registry) -> Result<(), Errors> {
        let Some((_, checkpoint)) = &self.checkpoint else { return Ok(()) };
        let (_, notes) = checkpoint.parameters().map_err(|e| Diagnostic::new(e.to_string()))?;
        let Some(was) = saved::model_text(&notes) else { return Ok(()) };
        for (row, stage) in Pipeline::new(&self.file, registry)?.stages() {
            let Some(model) = stage.model() else { continue };
            let chosen = |s: &String| s.split('=').next().is_some_and(|n| n.trim() == format!("{row}.file"));
            if settings.iter().any(chosen) {
                continue;
            }
            match model.path(&self.origin.pipeline) {
                None => self.model = Some(was.to_string()),
                Some(path) => {
                    let now = fs::read_to_string(&path).map_err(FileError::on("read", &path)).map_err(message)?;
                    let changed = changes(was, &now);
                    if !changed.is_empty() {
                        return Err(refusal(&self.folder, &path.display().to_string(), &changed));
                    }
                }
            }
        }
        Ok(())
    }
}

fn message(error: FileError) -> Errors {
    Diagnostic::new(error.to_string()).into()
}

fn refusal(folder: &RunFolder, file: &str, changed: &[String]) -> Errors {
    let folder = folder.path().display();
    let message = format!("{file} is not what it was when {folder} was started:\n{}", changed.join("\n"));
    Diagnostic::new(message)
        .help(
            "undo the change to go on, or say on purpose what is to be different with --set row.attribute=value \
             (a changed model: --set model.file=PATH); without --resume a new run starts",
        )
        .into()
}
