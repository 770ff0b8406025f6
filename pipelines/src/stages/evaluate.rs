//! `Evaluate`: losses on both splits during training, and over the whole validation split at the end.

use std::time::{Duration, Instant};

use dataflow_graph::format::number::Size;
use dataflow_graph::registry::{Info, Registry};
use dataflow_graph::session::Session;
use serde::{Deserialize, Serialize};

use super::{Hook, Kind, Product, Run, Stage, StageError, StageRegistry};
use crate::data::{Batch, BatchSource, Draw, Split};
use crate::report::{EvaluationRow, Losses};
use crate::trainer::Trainer;

/// Every so many steps, the mean loss over random batches of each split. After the last step the validation loss is
/// taken over all whole windows of the split, where it is finite.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Evaluate {
    every: Size,
    batches: Size,
}

impl Stage for Evaluate {
    fn inputs(&self) -> &'static [Kind] {
        &[Kind::Training]
    }
    fn output(&self) -> Kind {
        Kind::Evaluation
    }
    fn start(&self, run: &mut Run, _: &[&Product]) -> Result<Product, StageError> {
        if *self.every == 0 || *self.batches == 0 {
            return Err(StageError::Message("`every` and `batches` must be at least 1".into()));
        }
        let trainer = run.trainer()?;
        let evaluator = Evaluator {
            session: trainer.evaluation_session()?,
            source: trainer.batches(),
            batch: Batch::new(1, 1),
            every: *self.every as u64,
            batches: *self.batches as u64,
            computed: Duration::ZERO,
        };
        run.hooks.push(Box::new(evaluator));
        Ok(Product::Evaluation)
    }
}

struct Evaluator {
    session: Session,
    source: Box<dyn BatchSource>,
    batch: Batch,
    every: u64,
    batches: u64,
    /// Time of the program, without that of making batches.
    computed: Duration,
}

/// Means over the answers of some batches.
#[derive(Default)]
struct Mean {
    loss: f64,
    accuracy: f64,
    answers: f64,
}

impl Evaluator {
    /// Runs the batch in hand and adds its figures.
    fn add(&mut self, mean: &mut Mean) -> Result<(), StageError> {
        let answers = self.batch.answers() as f64;
        let start = Instant::now();
        self.batch.write_to(&self.session);
        self.session.run_step().map_err(StageError::from_error)?;
        self.session.check().map_err(StageError::from_error)?;
        mean.loss += answers * f64::from(self.session.scalar("loss").unwrap_or(f32::NAN));
        mean.accuracy += answers * f64::from(self.session.scalar("accuracy").unwrap_or(f32::NAN));
        mean.answers += answers;
        self.computed += start.elapsed();
        Ok(())
    }

    fn estimate(&mut self, split: Split) -> Result<Mean, StageError> {
        let mut mean = Mean::default();
        for number in 0..self.batches {
            self.source.fill(Draw::evaluation(split, number), &mut self.batch).map_err(StageError::from_error)?;
            self.add(&mut mean)?;
        }
        Ok(mean.divided())
    }

    fn whole(&mut self, split: Split) -> Result<Option<Mean>, StageError> {
        let Some(mut windows) = self.source.whole_windows(split).map_err(StageError::from_error)? else {
            return Ok(None);
        };
        let mut mean = Mean::default();
        while windows.fill(&mut self.batch).map_err(StageError::from_error)? {
            self.add(&mut mean)?;
        }
        Ok(Some(mean.divided()))
    }
}

impl Mean {
    fn divided(mut self) -> Self {
        self.loss /= self.answers;
        self.accuracy /= self.answers;
        self
    }
}

impl Hook for Evaluator {
    fn after(&mut self, trainer: &mut Trainer, done: u64, last: bool) -> Result<(), StageError> {
        if !done.is_multiple_of(self.every) && !last {
            return Ok(());
        }
        let train = self.estimate(Split::Train)?;
        let whole = if last { self.whole(Split::Validation)? } else { None };
        let exact = whole.is_some();
        let val = match whole {
            Some(mean) => mean,
            None => self.estimate(Split::Validation)?,
        };
        let accuracy = self.source.has_answers().then_some(val.accuracy);
        let row = EvaluationRow { step: done, eval: Losses { train: train.loss, val: val.loss }, accuracy };
        trainer.report_evaluation(row, exact, std::mem::take(&mut self.computed))
    }
}

pub(super) fn register(registry: &mut Registry) {
    registry.stage::<Evaluate>(Info {
        name: "Evaluate",
        about: "Losses on both splits during training; over all of the validation split at the end.",
        inputs: &["train"],
        formula: "",
        source: "nanoGPT, estimate_loss",
        example: "(every: 250, batches: 20)",
    });
}
