//! `dataflow run PIPELINE`

use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::Args;
use dataflow_graph::diagnostic::{Diagnostic, Errors};
use dataflow_graph::registry::Registry;

use super::{DeviceArgs, PrecisionArgs, WithoutArgs, print};
use crate::pipeline::{Pipeline, PipelineFile};
use crate::report::RunFolder;
use crate::resume::{Origin, Resume};
use crate::signals;
use crate::stages::{self, RunFolderChoice};
use crate::trainer::Summary;

#[derive(Args)]
pub(super) struct Run {
    /// A pipeline file, such as pipelines/recall.ron; or the folder of a run to go on with
    pipeline: PathBuf,
    /// Change an attribute of a row, such as train.steps=100 or model.file=models/llama.ron; may be repeated
    #[arg(long, value_name = "ROW.ATTRIBUTE=VALUE")]
    set: Vec<String>,
    #[command(flatten)]
    device: DeviceArgs,
    #[command(flatten)]
    precision: PrecisionArgs,
    #[command(flatten)]
    without: WithoutArgs,
    /// The folder to write; runs/NAME-NUMBER by default
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Go on with the latest run of this pipeline, or with the one in --out, to the state it would have had
    #[arg(long)]
    resume: bool,
    /// Stop behind this row: `--until tokens` only prepares the data
    #[arg(long, value_name = "ROW")]
    until: Option<String>,
}

impl Run {
    pub(super) fn run(self, registry: &Arc<Registry>) -> Result<(), Errors> {
        let (file, path, choice, model) = match self.resumed(registry)? {
            Some(resume) => {
                resume.warnings.iter().for_each(|w| eprintln!("warning: {w}"));
                let folder = resume.folder.path().display();
                let place = match &resume.checkpoint {
                    Some((entry, _)) => format!("after step {}", entry.step),
                    None => "from the beginning, since nothing was saved".into(),
                };
                print(&format!("resuming {folder} {place}\n"));
                let (file, path, model) = (resume.file.clone(), resume.origin.pipeline.clone(), resume.model.clone());
                (file, path, RunFolderChoice::Resumed(Box::new(resume)), model)
            }
            None => {
                let file = PipelineFile::read(&self.pipeline, &self.set)?;
                let text = PipelineFile::read(&self.pipeline, &[])?.source.text.clone();
                let origin = Origin { pipeline: self.pipeline.clone(), settings: self.set.clone(), text };
                let (origin, resolved) = (origin.to_text()?, file.source.text.clone());
                (file, self.pipeline.clone(), RunFolderChoice::Wanted { out: self.out, origin, resolved }, None)
            }
        };
        let mut pipeline = Pipeline::new(&file, registry)?;
        let (device, precision) = self.precision.open(&self.device, &self.without.without, None)?;
        print(&format!("{}: {}\n", path.display(), file.about));
        print(&format!("device: {}\n", device.describe()));
        let mut run = stages::Run {
            registry: registry.clone(),
            device,
            threads: self.device.threads(),
            precision,
            seed: file.seed,
            pipeline: path,
            cache: PathBuf::from("data"),
            folder: choice,
            trainer: None,
            hooks: Vec::new(),
            model,
            resumed: None,
            writer: None,
        };
        let Some(summary) = pipeline.run(&mut run, self.until.as_deref())? else { return Ok(()) };
        let RunFolderChoice::Made(folder) = &run.folder else { return Ok(()) };
        report(&summary, folder);
        if let Some(stopped) = summary.stopped {
            // everything is on the disk by now
            std::process::exit(signals::exit_code(stopped).into());
        }
        Ok(())
    }

    /// The run to go on with, if one is asked for.
    fn resumed(&self, registry: &Registry) -> Result<Option<Resume>, Errors> {
        let found = if self.pipeline.is_dir() {
            if self.out.is_some() {
                let message = "a run goes on in its own folder: leave --out away";
                return Err(Diagnostic::new(message).into());
            }
            RunFolder::resume(&self.pipeline)
        } else if !self.resume {
            return Ok(None);
        } else if let Some(out) = &self.out {
            RunFolder::resume(out)
        } else {
            let name = self.pipeline.file_stem().unwrap_or_default().to_string_lossy();
            RunFolder::latest(Path::new("runs"), &name)
        };
        let folder = found.map_err(|e| Diagnostic::new(e.to_string()))?;
        let given = (!self.pipeline.is_dir()).then_some(&*self.pipeline);
        Resume::prepare(folder, given, &self.set, registry).map(Some)
    }
}

fn report(summary: &Summary, folder: &RunFolder) {
    let path = folder.path().display();
    let seconds = summary.training.as_secs_f64();
    let speed = summary.tokens as f64 / seconds.max(1e-9);
    print(&format!("trained on {} tokens in {seconds:.1} s ({speed:.0} tokens/s)\n", summary.tokens));
    let parts = [summary.training, summary.evaluating, summary.overhead].map(|part| part.as_secs_f64());
    let [updates, evaluations, rest] = parts.map(|part| 100.0 * part / parts.iter().sum::<f64>().max(1e-9));
    print(&format!(
        "time of the loop: updates {updates:.1} %, evaluations {evaluations:.1} %, checkpoints and figures {rest:.2} %\n"
    ));
    if summary.skipped > 0 {
        print(&format!("batches dropped because they were not finite: {}\n", summary.skipped));
    }
    if let Some(row) = summary.evaluation.filter(|_| summary.stopped.is_none()) {
        let accuracy = row.accuracy.map(|a| format!(", accuracy {:.2}%", 100.0 * a)).unwrap_or_default();
        print(&format!("final loss: train {:.4}, validation {:.4}{accuracy}\n", row.eval.train, row.eval.val));
    }
    match summary.stopped {
        None => print(&format!("run folder: {path}\n")),
        Some(_) if summary.saved => {
            print(&format!("stopped after step {}; to go on: dataflow run {path}\n", summary.step));
        }
        Some(_) => {
            let step = summary.step;
            print(&format!(
                "stopped after step {step}; nothing is saved, since the pipeline has no `Checkpoint` row\n"
            ));
        }
    }
}
