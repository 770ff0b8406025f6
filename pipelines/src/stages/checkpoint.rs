//! `Checkpoint`: what a run saves, and how much of it stays.

use std::cell::Cell;
use std::fmt;

use dataflow_graph::format::number::Size;
use dataflow_graph::registry::{Info, Registry};
use serde::de::{DeserializeSeed, EnumAccess, VariantAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};

use super::{Hook, Kind, Product, Run, RunFolderChoice, Stage, StageError, StageRegistry};
use crate::checkpoint::store::Entry;
use crate::checkpoint::{Job, Writer};
use crate::trainer::Trainer;

/// Which checkpoints are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum Keep {
    /// That of the lowest validation loss; its weights are in `best.safetensors` too.
    Best,
    /// So many of the latest, taken every `every` steps and after the last one, whose weights are in
    /// `last.safetensors` too. `Last` alone keeps two.
    Last(Size),
    /// One every so many steps, all of them, and the last one.
    Every(Size),
}

/// Saves parameters, optimizer and position, so that the run can go on from there.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Checkpoint {
    keep: Keep,
    /// Steps between two checkpoints of `Last`.
    #[serde(default = "quarter_thousand")]
    every: Size,
}

fn quarter_thousand() -> Size {
    Size(250)
}

/// `Last` may stand alone, which serde's derived code cannot say.
impl<'de> Deserialize<'de> for Keep {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_enum("Keep", &["Best", "Last", "Every"], KeepVisitor)
    }
}

#[derive(Deserialize)]
#[serde(variant_identifier)]
enum Name {
    Best,
    Last,
    Every,
}

struct KeepVisitor;

impl<'de> Visitor<'de> for KeepVisitor {
    type Value = Keep;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Best, Last(n) or Every(k)")
    }

    fn visit_enum<A: EnumAccess<'de>>(self, access: A) -> Result<Keep, A::Error> {
        let (name, content) = access.variant::<Name>()?;
        match name {
            Name::Best => content.unit_variant().map(|()| Keep::Best),
            Name::Every => content.newtype_variant().map(Keep::Every),
            Name::Last => {
                let met = Cell::new(false);
                match content.newtype_variant_seed(Noting(&met)) {
                    // there are no parentheses
                    Err(_) if !met.get() => Ok(Keep::Last(Size(2))),
                    n => n.map(Keep::Last),
                }
            }
        }
    }
}

/// A number, and whether there was one.
struct Noting<'a>(&'a Cell<bool>);

impl<'de> DeserializeSeed<'de> for Noting<'_> {
    type Value = Size;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Size, D::Error> {
        self.0.set(true);
        Size::deserialize(deserializer)
    }
}

impl Stage for Checkpoint {
    fn inputs(&self) -> &'static [Kind] {
        match self.keep {
            Keep::Best => &[Kind::Evaluation],
            Keep::Last(_) | Keep::Every(_) => &[Kind::Training],
        }
    }
    fn output(&self) -> Kind {
        Kind::Training
    }
    fn start(&self, run: &mut Run, _: &[&Product]) -> Result<Product, StageError> {
        if let (_, 0) | (Keep::Last(Size(0)) | Keep::Every(Size(0)), _) = (self.keep, *self.every) {
            return Err(StageError::Message("`every` and the number of `keep` must be at least 1".into()));
        }
        let writer = run.writer()?;
        writer.keep(|policy| match self.keep {
            Keep::Best => {}
            Keep::Last(n) => policy.last = Some(policy.last.map_or(*n, |m| m.max(*n))),
            Keep::Every(k) => policy.every.push(*k as u64),
        });
        let best = match (&run.folder, run.resumed) {
            // the lowest loss so far is that of the checkpoint on the disk
            (RunFolderChoice::Made(folder), Some(from)) if self.keep == Keep::Best => {
                lowest(folder.path(), from.step).map_err(StageError::from_error)?
            }
            _ => f64::INFINITY,
        };
        run.hooks.push(Box::new(Keeper { keep: self.keep, every: *self.every as u64, best, writer }));
        Ok(Product::Training)
    }
}

/// The lowest loss of the best checkpoints up to `step`; damaged ones go.
fn lowest(folder: &std::path::Path, step: u64) -> Result<f64, crate::files::FileError> {
    let store = crate::checkpoint::Store::of(folder);
    let mut lowest = f64::INFINITY;
    for entry in store.list()?.into_iter().filter(|e| e.best) {
        match crate::checkpoint::store::Verified::open(&store.path(entry)) {
            Ok(checkpoint) if entry.step <= step => {
                lowest = checkpoint.sidecar.evaluation.map_or(lowest, |e| e.val.min(lowest));
            }
            _ => store.remove(entry)?,
        }
    }
    Ok(lowest)
}

struct Keeper {
    keep: Keep,
    every: u64,
    best: f64,
    writer: Writer,
}

impl Keeper {
    fn save(&self, trainer: &mut Trainer, best: bool) -> Result<(), StageError> {
        let entry = Entry { step: trainer.position().step, best };
        let job = Job { entry, snapshot: trainer.snapshot()? };
        self.writer.submit(job).map_err(StageError::from_error)
    }
}

impl Hook for Keeper {
    fn after(&mut self, trainer: &mut Trainer, done: u64, last: bool) -> Result<(), StageError> {
        self.writer.check().map_err(StageError::from_error)?;
        let due = |every: u64| last || (done > 0 && done.is_multiple_of(every));
        match self.keep {
            Keep::Best => {
                // an evaluation of this very moment: its hook runs before this one
                let row = trainer.last_evaluation().filter(|e| e.step == done && e.eval.val < self.best);
                if let Some(val) = row.map(|e| e.eval.val) {
                    self.best = val;
                    self.save(trainer, true)?;
                }
            }
            Keep::Last(_) if due(self.every) => self.save(trainer, false)?,
            Keep::Every(k) if due(*k as u64) => self.save(trainer, false)?,
            Keep::Last(_) | Keep::Every(_) => {}
        }
        Ok(())
    }

    fn stop(&mut self, trainer: &mut Trainer) -> Result<bool, StageError> {
        self.save(trainer, false).map(|()| true)
    }

    fn finish(&mut self, _: &mut Trainer) -> Result<(), StageError> {
        self.writer.finish().map_err(StageError::from_error)
    }
}

pub(super) fn register(registry: &mut Registry) {
    registry.stage::<Checkpoint>(Info {
        name: "Checkpoint",
        about: "Saves parameters, optimizer and position: the last n, one every k steps, or that of the lowest \
                validation loss.",
        inputs: &["eval for Best, train for Last(n) and Every(k)"],
        formula: "",
        source: "",
        example: "(keep: Best)",
    });
}
