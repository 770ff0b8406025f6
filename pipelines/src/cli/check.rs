//! `dataflow check FILE…`

use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::Args;
use dataflow_graph::compile::{Request, compile};
use dataflow_graph::components::Options;
use dataflow_graph::diagnostic::{Diagnostic, Errors};
use dataflow_graph::format::formula::Number;
use dataflow_graph::format::model::ModelFile;
use dataflow_graph::format::number::Scope;
use dataflow_graph::format::rows::read_source;
use dataflow_graph::registry::Registry;
use serde_json::json;

use super::{config_settings, print, print_json, thousands};
use crate::pipeline::{Pipeline, PipelineFile};

#[derive(Args)]
pub(super) struct Check {
    /// Model and pipeline files
    #[arg(required = true)]
    files: Vec<PathBuf>,
    /// Change the config of models (d_model=384) or rows of pipelines (train.steps=100); may be repeated
    #[arg(long, value_name = "NAME=VALUE")]
    set: Vec<String>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// What a sound file holds.
struct Sound {
    /// For people.
    line: String,
    /// Numbers of parameters: all, and those that weight decay applies to.
    parameters: Option<(usize, usize)>,
}

impl Check {
    pub(super) fn run(self, registry: &Arc<Registry>) -> Result<(), Errors> {
        let mut errors = Errors::default();
        let mut reports = Vec::new();
        for path in &self.files {
            match self.file(path, registry) {
                Ok(sound) => {
                    if !self.json {
                        print(&format!("{}: {}\n", path.display(), sound.line));
                    }
                    let (total, decayed) = sound.parameters.unzip();
                    reports.push(json!({ "file": path, "parameters": total, "decayed": decayed }));
                }
                Err(found) => errors.0.extend(found.0),
            }
        }
        if self.json {
            let list: Vec<_> = errors.0.iter().map(describe).collect();
            print_json(&json!({ "errors": list, "files": reports }));
            // the object says it all
            if !list.is_empty() {
                std::process::exit(1);
            }
            return Ok(());
        }
        if errors.0.is_empty() { Ok(()) } else { Err(errors) }
    }

    fn file(&self, path: &Path, registry: &Arc<Registry>) -> Result<Sound, Errors> {
        let source = read_source(path)?;
        // a pipeline says so in its first word
        if first_word(&source.text) == "Pipeline" {
            let file = PipelineFile::read(path, &self.set)?;
            let stages = Pipeline::new(&file, registry)?.stages();
            let mut line = format!("pipeline of {} stages", stages.len());
            for model in stages.iter().filter_map(|(_, stage)| stage.model()) {
                let (model, scope) = model.load(path, &[])?;
                line += &format!("; {}", check_model(registry, &model, scope)?.line);
            }
            return Ok(Sound { line, parameters: None });
        }
        let model = Arc::new(ModelFile::parse(source)?);
        let (scope, mut errors) = model.config_with_errors(&config_settings(&self.set)?);
        let checked = check_model(registry, &model, scope);
        if errors.0.is_empty() {
            return checked;
        }
        errors.extend(checked.err().unwrap_or_default());
        Err(errors.sorted())
    }
}

/// The first identifier of a file, behind comments and extensions.
fn first_word(text: &str) -> &str {
    let mut rest = text.trim_start();
    while rest.starts_with("//") || rest.starts_with("#!") {
        rest = rest.split_once('\n').map_or("", |(_, rest)| rest).trim_start();
    }
    let end = rest.find(|c: char| !c.is_alphanumeric()).unwrap_or(rest.len());
    &rest[..end]
}

fn check_model(registry: &Arc<Registry>, model: &Arc<ModelFile>, scope: Scope) -> Result<Sound, Errors> {
    let block = scope.get("block").and_then(Number::int).and_then(|b| usize::try_from(b).ok()).unwrap_or(64);
    let request = Request {
        registry: registry.clone(),
        model: model.clone(),
        scope,
        options: Options::new(1, block.max(1)),
        objectives: Vec::new(),
        optimizer: None,
        memory_budget: None,
        without: Vec::new(),
    };
    let plan = compile(&request)?.plan;
    let total = plan.parameter_count();
    let decayed = plan.parameters.iter().filter(|p| p.decays).map(|p| p.port.tensor.elements()).sum();
    let line = format!(
        "{} parameters in {} tensors ({} with weight decay, {} without)",
        thousands(total),
        plan.parameters.len(),
        thousands(decayed),
        thousands(total - decayed)
    );
    Ok(Sound { line, parameters: Some((total, decayed)) })
}

fn describe(error: &Diagnostic) -> serde_json::Value {
    let place = error.span.as_ref().map(|s| (s.source.name.clone(), s.source.line_column(s.bytes.start)));
    let (file, (line, column)) = place.map_or((None, (None, None)), |(f, (l, c))| (Some(f), (Some(l), Some(c))));
    json!({
        "file": file, "line": line, "column": column, "row": error.row, "message": error.message, "help": error.help,
    })
}
