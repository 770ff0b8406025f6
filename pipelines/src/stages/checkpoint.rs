//! `Checkpoint`: weights as safetensors, written by a thread of its own.

use std::collections::HashMap;
use std::path::PathBuf;
use std::thread::JoinHandle;

use crossbeam::channel::{Sender, bounded};
use dataflow_graph::registry::{Info, Registry};
use safetensors::tensor::{Dtype, TensorView};
use serde::{Deserialize, Serialize};

use super::{Hook, Kind, Product, Run, RunFolderChoice, Stage, StageError, StageRegistry};
use crate::files::{FileError, write_atomically};
use crate::trainer::Trainer;

/// Which weights are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Keep {
    /// Those of the lowest validation loss, in `best.safetensors`.
    Best,
    /// Those after the last step, in `last.safetensors`.
    Last,
}

/// Writes the parameters under their names, in `f32`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Checkpoint {
    keep: Keep,
}

impl Stage for Checkpoint {
    fn inputs(&self) -> &'static [Kind] {
        match self.keep {
            Keep::Best => &[Kind::Evaluation],
            Keep::Last => &[Kind::Training],
        }
    }
    fn output(&self) -> Kind {
        Kind::Training
    }
    fn start(&self, run: &mut Run, _: &[&Product]) -> Result<Product, StageError> {
        let RunFolderChoice::Made(folder) = &run.folder else {
            return Err(StageError::Message("no stage trains a model before this one".into()));
        };
        let name = match self.keep {
            Keep::Best => "best.safetensors",
            Keep::Last => "last.safetensors",
        };
        let writer = Writer::start(folder.file(name)).map_err(StageError::from_error)?;
        run.hooks.push(Box::new(Keeper { keep: self.keep, best: f64::INFINITY, writer: Some(writer) }));
        Ok(Product::Training)
    }
}

struct Keeper {
    keep: Keep,
    best: f64,
    writer: Option<Writer>,
}

impl Hook for Keeper {
    fn after(&mut self, trainer: &mut Trainer, done: u64, last: bool) -> Result<(), StageError> {
        let wanted = match self.keep {
            Keep::Last => last,
            // an evaluation of this very moment: its hook runs before this one
            Keep::Best => trainer.last_evaluation().is_some_and(|e| e.step == done && e.eval.val < self.best),
        };
        if !wanted {
            return Ok(());
        }
        let mut about = HashMap::from([("step".to_string(), done.to_string())]);
        if let Some(row) = trainer.last_evaluation() {
            self.best = row.eval.val;
            about.insert("validation_loss".into(), row.eval.val.to_string());
        }
        let snapshot = Snapshot { parameters: trainer.snapshot(), about };
        self.writer.as_ref().map_or(Ok(()), |w| w.write(snapshot))
    }

    fn finish(&mut self, _: &mut Trainer) -> Result<(), StageError> {
        self.writer.take().map_or(Ok(()), Writer::finish)
    }
}

/// Parameters at one moment.
struct Snapshot {
    parameters: Vec<(String, Vec<usize>, Vec<f32>)>,
    about: HashMap<String, String>,
}

/// The thread that writes: a step never waits for the disk, unless the checkpoint before is still being written.
struct Writer {
    snapshots: Sender<Snapshot>,
    thread: JoinHandle<Result<(), FileError>>,
}

impl Writer {
    fn start(path: PathBuf) -> std::io::Result<Self> {
        let (snapshots, received) = bounded::<Snapshot>(1);
        let thread = std::thread::Builder::new()
            .name("checkpoint".into())
            .spawn(move || received.iter().try_for_each(|snapshot| save(&path, &snapshot)))?;
        Ok(Self { snapshots, thread })
    }

    fn write(&self, snapshot: Snapshot) -> Result<(), StageError> {
        self.snapshots
            .send(snapshot)
            .map_err(|_| StageError::Message("a checkpoint could not be written; the run ends".into()))
    }

    fn finish(self) -> Result<(), StageError> {
        drop(self.snapshots);
        match self.thread.join() {
            Ok(result) => result.map_err(StageError::from_error),
            Err(_) => Err(StageError::Message("the thread that writes checkpoints panicked; please report it".into())),
        }
    }
}

fn save(path: &std::path::Path, snapshot: &Snapshot) -> Result<(), FileError> {
    let views: Vec<(&str, TensorView<'_>)> = snapshot
        .parameters
        .iter()
        .map(|(name, shape, data)| {
            let bytes = dataflow_kernels::device::as_bytes(data);
            let view = TensorView::new(Dtype::F32, shape.clone(), bytes).expect("a parameter has its shape's elements");
            (name.as_str(), view)
        })
        .collect();
    write_atomically(path, |file| {
        let mut bytes = safetensors::serialize(views, Some(snapshot.about.clone())).map_err(std::io::Error::other)?;
        sort_header(&mut bytes).map_err(std::io::Error::other)?;
        std::io::Write::write_all(file, &bytes)
    })
}

/// Puts the JSON header into a fixed order. The notes about the file come from a hash map, so that without this two
/// runs of one seed would write different bytes.
fn sort_header(bytes: &mut [u8]) -> Result<(), serde_json::Error> {
    let length = u64::from_le_bytes(bytes[..8].try_into().expect("a safetensors file starts with 8 bytes of length"));
    let header = &mut bytes[8..8 + length as usize];
    // maps of serde_json are sorted; the same entries take the same space
    let sorted = serde_json::to_vec(&serde_json::from_slice::<serde_json::Value>(header)?)?;
    if sorted.len() <= header.len() {
        header.fill(b' ');
        header[..sorted.len()].copy_from_slice(&sorted);
    }
    Ok(())
}

pub(super) fn register(registry: &mut Registry) {
    registry.stage::<Checkpoint>(Info {
        name: "Checkpoint",
        about: "Weights as safetensors: those of the lowest validation loss, or those after the last step.",
        inputs: &["eval for Best, train for Last"],
        formula: "",
        source: "",
        example: "(keep: Best)",
    });
}
