//! The training loop: batches in, updates on the device, figures out.

mod finite;
mod state;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use dataflow_graph::compile::{Request, compile_in};
use dataflow_graph::components::{Options, Precision};
use dataflow_graph::plan::Plan;
use dataflow_graph::registry::Registry;
use dataflow_graph::session::Session;
use dataflow_kernels::device::Device;
use serde::{Deserialize, Serialize};

use crate::checkpoint::sidecar::FORMAT;
use crate::checkpoint::store::Verified;
use crate::checkpoint::{CheckpointError, Sidecar, Snapshot};
use crate::data::{Batch, BatchSource, Draw, Prefetcher};
use crate::report::curve::Curve;
use crate::report::metrics::MetricsFile;
use crate::report::progress::Progress;
use crate::report::tensorboard::EventFile;
use crate::report::{EvaluationRow, Notices, Recorder, Row, RunFolder, Sink, StepRow};
use crate::saved;
use crate::signals;
use crate::stages::optimizer::Optimized;
use crate::stages::{Hook, StageError};
use crate::utilization::Utilization;

/// Batches that are filled ahead.
const PREFETCHED: usize = 4;

/// Updates in a row that may be dropped: with more of them it is not the batches that are to blame.
const MOST_DROPPED: u64 = 20;

/// What a training run is made of.
pub struct Setup {
    /// Where ops are found.
    pub registry: Arc<Registry>,
    /// What runs the model.
    pub device: Arc<dyn Device>,
    /// Of matrix products.
    pub precision: Precision,
    /// Model, loss, optimizer.
    pub optimized: Optimized,
    /// For parameters, batches and masks.
    pub seed: u64,
    /// Updates.
    pub steps: u64,
    /// Batches in an update.
    pub micro_batches: usize,
    /// Steps between lines of progress.
    pub log_every: u64,
    /// The most bytes that activations and gradients of a step may take.
    pub memory_budget: Option<usize>,
    /// The text of the pipeline as it runs.
    pub pipeline: String,
    /// What to do when a loss or gradient is not finite.
    pub on_nonfinite: OnNonfinite,
}

/// How far a training run is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Position {
    /// Updates made.
    pub step: u64,
    /// Tokens trained on.
    pub tokens: u64,
    /// Training batches drawn.
    pub batches: u64,
    /// Updates that were dropped.
    pub skipped: u64,
}

/// A model in training.
pub struct Trainer {
    setup: Setup,
    session: Session,
    records: Option<Records>,
    last_evaluation: Option<EvaluationRow>,
    position: Position,
    /// What checkpoints of this run share: the plan's hash, and notes for the header of the weights.
    graph: String,
    notes: BTreeMap<String, String>,
    /// The state after the last update, once somebody asked for it.
    snapshot: Option<Arc<Snapshot>>,
    notices: Notices,
    utilization: Option<Utilization>,
    /// Time that evaluations computed.
    evaluating: Duration,
}

/// Where figures go.
struct Records {
    recorder: Recorder,
    progress: Progress,
}

/// What a run came to.
#[derive(Clone, Debug)]
pub struct Summary {
    /// Time of the updates alone, with waiting for batches and with updates that were dropped.
    pub training: Duration,
    /// Time that evaluations computed.
    pub evaluating: Duration,
    /// The rest of the loop's time: what snapshots, figures, messages and the batches of evaluations cost it.
    pub overhead: Duration,
    /// The last evaluation.
    pub evaluation: Option<EvaluationRow>,
    /// Tokens trained on, since the run was started or resumed.
    pub tokens: u64,
    /// Updates made, those before a resume among them.
    pub step: u64,
    /// Updates that were dropped because they were not finite.
    pub skipped: u64,
    /// The signal that stopped the run before its end.
    pub stopped: Option<usize>,
    /// Whether anything was saved when it stopped.
    pub saved: bool,
}

/// What to do when a loss or gradient is not finite.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum OnNonfinite {
    /// The run ends, and says which node and batch did it.
    #[default]
    Stop,
    /// The update is dropped and the next batch taken instead.
    Skip,
}

impl Trainer {
    /// Compiles the model and fills its parameters.
    ///
    /// # Errors
    /// Everything that is wrong with the model, or no memory left.
    pub fn prepare(setup: Setup) -> Result<Self, StageError> {
        let mut session =
            Session::new(setup.device.clone(), &compile_in(&setup.request(true), setup.precision)?, None)?;
        session.initialize(setup.seed)?;
        let utilization = Utilization::new(session.plan(), setup.micro_batches, setup.precision, setup.device.as_ref());
        let (graph, notes) = (state::graph_hash(session.plan()), saved::notes(&setup.optimized.objective.model));
        Ok(Self {
            setup,
            session,
            records: None,
            last_evaluation: None,
            position: Position::default(),
            graph,
            notes,
            snapshot: None,
            notices: Notices::default(),
            utilization,
            evaluating: Duration::ZERO,
        })
    }

    /// Goes back to where a checkpoint was taken.
    ///
    /// # Errors
    /// A checkpoint of other parameters, or without an optimizer.
    pub fn restore(&mut self, checkpoint: &Verified) -> Result<(), CheckpointError> {
        let sidecar = &checkpoint.sidecar;
        let (parameters, notes) = checkpoint.parameters()?;
        state::restore(&self.session, &parameters, &checkpoint.states()?)?;
        let Sidecar { step, tokens, batches, skipped, .. } = *sidecar;
        self.position = Position { step, tokens, batches, skipped };
        self.last_evaluation = sidecar.evaluation.map(Into::into);
        let same = sidecar.pipeline == self.setup.pipeline && saved::same_model(&notes, &self.notes);
        if same && sidecar.graph != self.graph {
            self.notices.push(
                "another version of this program, which compiled the model otherwise, wrote the checkpoint; \
                 what follows may differ in the last digits"
                    .into(),
            );
        }
        Ok(())
    }

    /// A program that evaluates with the parameters in training.
    ///
    /// # Errors
    /// No memory left.
    pub fn evaluation_session(&self) -> Result<Session, StageError> {
        let compiled = compile_in(&self.setup.request(false), self.setup.precision)?;
        Ok(Session::new(self.setup.device.clone(), &compiled, Some(&self.session))?)
    }

    /// Where batches come from.
    pub fn batches(&self) -> Box<dyn BatchSource> {
        self.setup.optimized.objective.model.batches.duplicate()
    }

    /// The plan of a step.
    pub fn plan(&self) -> &Plan {
        self.session.plan()
    }

    /// The last evaluation.
    pub fn last_evaluation(&self) -> Option<&EvaluationRow> {
        self.last_evaluation.as_ref()
    }

    /// How far the run is.
    pub fn position(&self) -> Position {
        self.position
    }

    /// Messages for the screen, from any thread.
    pub fn notices(&self) -> &Notices {
        &self.notices
    }

    /// Everything it takes to go on from this moment.
    ///
    /// # Errors
    /// If earlier rows could not be recorded.
    pub fn snapshot(&mut self) -> Result<Arc<Snapshot>, StageError> {
        if let Some(snapshot) = &self.snapshot {
            return Ok(snapshot.clone());
        }
        let (parameters, states) = state::read(&self.session);
        let Position { step, tokens, batches, skipped } = self.position;
        let recorded = match &mut self.records {
            Some(records) => Some(records.recorder.mark().map_err(StageError::from_error)?),
            None => None,
        };
        let sidecar = Sidecar {
            format: FORMAT,
            dataflow: env!("CARGO_PKG_VERSION").into(),
            device: self.setup.device.describe(),
            step,
            tokens,
            batches,
            skipped,
            seed: self.setup.seed,
            schedule: self.setup.optimized.schedule(),
            evaluation: self.last_evaluation.map(Into::into),
            graph: self.graph.clone(),
            files: Vec::new(),
            pipeline: self.setup.pipeline.clone(),
        };
        let mut notes = self.notes.clone();
        notes.insert(saved::STEP.into(), step.to_string());
        let snapshot = Arc::new(Snapshot { sidecar, notes, parameters, states: Some(states), recorded });
        self.snapshot = Some(snapshot.clone());
        Ok(snapshot)
    }

    /// Records and shows an evaluation, which computed for so long; `exact` if it went over the whole validation split.
    ///
    /// # Errors
    /// If an earlier row could not be written.
    pub fn report_evaluation(&mut self, row: EvaluationRow, exact: bool, took: Duration) -> Result<(), StageError> {
        self.evaluating += took;
        self.last_evaluation = Some(row);
        // the one at hand does not know of it
        self.snapshot = None;
        let Some(records) = &mut self.records else { return Ok(()) };
        records.progress.evaluation(&row);
        if exact {
            let message = format!("validation loss over the whole split: {:.4} nats per token", row.eval.val);
            records.progress.message(&message);
        }
        records.recorder.record(Row::Evaluation(row)).map_err(StageError::from_error)
    }

    /// Trains to the end.
    ///
    /// # Errors
    /// A loss that is not finite, batches that cannot be had, figures that cannot be written.
    pub fn run(&mut self, folder: &RunFolder, hooks: &mut [Box<dyn Hook>]) -> Result<Summary, StageError> {
        let first = self.position.step;
        let (metrics, rows) = MetricsFile::resume(&folder.metrics(), first).map_err(StageError::from_error)?;
        let events = EventFile::create(folder.path(), first).map_err(StageError::from_error)?;
        let mut curve = Curve::new(&folder.curve());
        rows.iter().for_each(|row| curve.add(row));
        let sinks: Vec<Box<dyn Sink>> = vec![Box::new(metrics), Box::new(events), Box::new(curve)];
        let recorder = Recorder::start(sinks, self.notices.clone());
        let progress = Progress::new(first, self.setup.steps, self.setup.log_every);
        self.records = Some(Records { recorder: recorder.map_err(StageError::from_error)?, progress });
        let trained = self.train(hooks);
        // whatever happened, what was recorded is written, and threads end
        let finished: Result<(), StageError> = hooks.iter_mut().try_for_each(|hook| hook.finish(self));
        let Some(Records { mut progress, recorder }) = self.records.take() else { return trained };
        progress.finish();
        let recorded = recorder.finish().map_err(StageError::from_error);
        self.show_notices();
        let summary = trained?;
        finished?;
        recorded?;
        Ok(summary)
    }

    fn train(&mut self, hooks: &mut [Box<dyn Hook>]) -> Result<Summary, StageError> {
        let (steps, micro) = (self.setup.steps, self.setup.micro_batches as u64);
        let draws = (self.position.batches..).map(Draw::training);
        let mut prefetcher = Prefetcher::start(self.batches(), draws, PREFETCHED).map_err(StageError::from_error)?;
        let mut batch = Batch::new(1, 1);
        let mut summary = Summary {
            training: Duration::ZERO,
            evaluating: Duration::ZERO,
            overhead: Duration::ZERO,
            evaluation: None,
            tokens: 0,
            step: 0,
            skipped: 0,
            stopped: None,
            saved: false,
        };
        let mut dropped = 0;
        let begin = Instant::now();
        self.evaluating = Duration::ZERO;
        while self.position.step < steps {
            let step = self.position.step;
            hooks.iter_mut().try_for_each(|hook| hook.after(self, step, false))?;
            self.show_notices();
            summary.stopped = signals::received();
            if summary.stopped.is_some() {
                for hook in hooks.iter_mut() {
                    summary.saved |= hook.stop(self)?;
                }
                break;
            }
            let start = Instant::now();
            let mut loss = 0.0;
            for _ in 0..micro {
                if !prefetcher.next_into(&mut batch).map_err(StageError::from_error)? {
                    return Err(StageError::Message("there are no more batches".into()));
                }
                loss += self.step(&batch)? / micro as f32;
            }
            // a loss that is not finite must not reach the parameters; gradients that are not, the optimizer refuses
            let mut grad_norm = f32::NAN;
            if loss.is_finite() {
                self.session.run_update().map_err(StageError::from_error)?;
                grad_norm = self.session.scalar("grad_norm").unwrap_or(f32::NAN);
            }
            let took = start.elapsed();
            let tokens = micro * batch.inputs.len() as u64;
            let fine = loss.is_finite() && grad_norm.is_finite();
            let row = StepRow {
                step,
                tokens: self.position.tokens + tokens,
                loss,
                grad_norm,
                lr: self.session.scalar("lr").unwrap_or(f32::NAN),
                tokens_per_s: tokens as f64 / took.as_secs_f64(),
                mfu: self.utilization.map(|u| u.in_seconds(took.as_secs_f64())),
            };
            if !fine {
                let cause = self.cause(&row)?;
                self.position.batches += micro;
                self.position.skipped += 1;
                dropped += 1;
                if self.setup.on_nonfinite == OnNonfinite::Stop || dropped > MOST_DROPPED {
                    if let Some(records) = &mut self.records {
                        records.recorder.record(Row::Step(row)).map_err(StageError::from_error)?;
                    }
                    return Err(self.not_finite(&cause, dropped));
                }
                self.forget_update();
                summary.training += start.elapsed();
                self.notices.push(format!("{cause}; the batch is dropped"));
                continue;
            }
            dropped = 0;
            self.position.step += 1;
            self.position.tokens += tokens;
            self.position.batches += micro;
            self.snapshot = None;
            summary.tokens += tokens;
            summary.training += took;
            hooks.iter_mut().for_each(|hook| hook.step(&row));
            if let Some(records) = &mut self.records {
                records.progress.step(&row, took);
                records.recorder.record(Row::Step(row)).map_err(StageError::from_error)?;
            }
        }
        if summary.stopped.is_none() {
            hooks.iter_mut().try_for_each(|hook| hook.after(self, steps, true))?;
        }
        summary.evaluating = self.evaluating;
        summary.overhead = begin.elapsed().saturating_sub(summary.training + summary.evaluating);
        summary.evaluation = self.last_evaluation;
        (summary.step, summary.skipped) = (self.position.step, self.position.skipped);
        Ok(summary)
    }

    /// Shows what other threads have to say.
    fn show_notices(&mut self) {
        for notice in self.notices.take() {
            match &mut self.records {
                Some(records) => records.progress.warning(&notice),
                None => eprintln!("warning: {notice}"),
            }
        }
    }

    /// Forward and backward of one batch; returns its loss.
    fn step(&mut self, batch: &Batch) -> Result<f32, StageError> {
        batch.write_to(&self.session);
        self.session.run_step().map_err(StageError::from_error)?;
        let loss = self.session.scalar("loss").unwrap_or(f32::NAN);
        self.session.check().map_err(StageError::from_error)?;
        Ok(loss)
    }
}

impl Setup {
    fn request(&self, training: bool) -> Request {
        let objective = &self.optimized.objective;
        let (batch, block) = objective.model.batches.shape();
        Request {
            registry: self.registry.clone(),
            model: objective.model.file.clone(),
            scope: objective.model.scope.clone(),
            options: Options {
                micro_batches: if training { self.micro_batches } else { 1 },
                seed: self.seed,
                training,
                target: self.device.target(),
                packed: objective.model.batches.packed(),
                ..Options::new(batch, block)
            },
            objectives: objective.list(training),
            optimizer: training.then(|| self.optimized.optimizer(self.steps)),
            memory_budget: self.memory_budget.filter(|_| training),
            without: Vec::new(),
        }
    }
}
