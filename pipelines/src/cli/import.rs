//! `dataflow import FILE --model MODEL -o RUN`

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use clap::Args;
use dataflow_graph::compile::{Request, compile};
use dataflow_graph::components::Options;
use dataflow_graph::diagnostic::{Diagnostic, Errors};
use dataflow_graph::format::model::ModelFile;
use dataflow_graph::registry::Registry;

use super::{config_settings, print, thousands};
use crate::checkpoint::sidecar::FORMAT;
use crate::checkpoint::store::Entry;
use crate::checkpoint::{Sidecar, Snapshot, Store, Tensors};
use crate::import::{self, mapping::Mapping};
use crate::report::RunFolder;
use crate::saved;

#[derive(Args)]
pub(super) struct Import {
    /// Safetensors files or PyTorch state_dicts (.pt, .bin); the parts of a model that is split over several
    #[arg(required = true)]
    files: Vec<PathBuf>,
    /// The model that the weights are for
    #[arg(long, value_name = "MODEL")]
    model: PathBuf,
    /// The folder to write, for `sample`, `eval` and `serve`
    #[arg(short, long, value_name = "RUN")]
    out: PathBuf,
    /// A mapping file, where the tensors have other names: models/mappings/mamba_ssm.ron, huggingface_llama.ron
    #[arg(long, value_name = "FILE")]
    mapping: Option<PathBuf>,
    /// Change the model's config, such as n_layer=24; may be repeated
    #[arg(long, value_name = "NAME=VALUE")]
    set: Vec<String>,
}

impl Import {
    pub(super) fn run(self, registry: &Arc<Registry>) -> Result<(), Errors> {
        let model = Arc::new(ModelFile::read(&self.model)?);
        let config = config_settings(&self.set)?;
        let request = Request {
            registry: registry.clone(),
            scope: model.config(&config)?,
            model: model.clone(),
            options: Options::new(1, 1),
            objectives: Vec::new(),
            optimizer: None,
            without: Vec::new(),
            memory_budget: None,
        };
        let plan = compile(&request)?.plan;
        let shapes: BTreeMap<String, Vec<usize>> =
            plan.parameters.iter().map(|p| (p.parameter.name.clone(), p.parameter.shape.clone())).collect();
        let tensors = self.tensors(&shapes)?;
        import::check(&tensors, &shapes).map_err(|e| {
            let help = match self.mapping {
                Some(_) => "a mapping file gives tensors their names in the model; --set changes the model's sizes",
                None => "--set changes the model's sizes; where names differ, --mapping models/mappings/….ron says how",
            };
            Diagnostic::new(e.to_string()).help(help)
        })?;
        let count: usize = tensors.values().map(|t| t.shape.iter().product::<usize>()).sum();
        let line = format!("{} parameters in {} tensors", thousands(count), tensors.len());
        let mut notes = saved::notes_of(&model, &config, None);
        notes.insert(saved::STEP.into(), "0".into());
        let folder = RunFolder::at(&self.out).map_err(wrong)?;
        let store = Store::of(folder.path());
        if !store.list().map_err(wrong)?.is_empty() {
            return Err(Diagnostic::new(format!("{} already holds a model", self.out.display()))
                .help("choose another folder with -o")
                .into());
        }
        let sidecar = Sidecar {
            format: FORMAT,
            dataflow: env!("CARGO_PKG_VERSION").into(),
            device: String::new(),
            step: 0,
            tokens: 0,
            batches: 0,
            skipped: 0,
            seed: 0,
            schedule: String::new(),
            evaluation: None,
            graph: String::new(),
            files: Vec::new(),
            pipeline: String::new(),
        };
        let entry = Entry { step: 0, best: false };
        let snapshot = Snapshot { sidecar, notes, parameters: tensors, states: None, recorded: None };
        store.save(entry, &snapshot).map_err(wrong)?;
        store.publish(entry, &folder.file("last.safetensors")).map_err(wrong)?;
        print(&format!("{line}\nrun folder: {}\n", self.out.display()));
        Ok(())
    }

    fn tensors(&self, shapes: &BTreeMap<String, Vec<usize>>) -> Result<Tensors, Errors> {
        let mut tensors = Tensors::new();
        for file in &self.files {
            for (name, tensor) in import::unwrapped(import::read(file).map_err(wrong)?) {
                if tensors.insert(name.clone(), tensor).is_some() {
                    return Err(
                        Diagnostic::new(format!("{}: `{name}` is in a file before it too", file.display())).into()
                    );
                }
            }
        }
        if let Some(path) = &self.mapping {
            let mapped = Mapping::read(path)?.apply(tensors);
            tensors = mapped.map_err(|e| Diagnostic::new(format!("{}: {e}", path.display())))?;
        }
        import::without_ties(&mut tensors, shapes);
        Ok(tensors)
    }
}

fn wrong(error: impl std::error::Error) -> Errors {
    Diagnostic::new(error.to_string()).into()
}
