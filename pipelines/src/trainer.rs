//! The training loop: batches in, updates on the device, figures out.

use std::sync::Arc;
use std::time::{Duration, Instant};

use dataflow_graph::compile::{Request, compile_in};
use dataflow_graph::components::{Options, Precision};
use dataflow_graph::plan::Plan;
use dataflow_graph::registry::Registry;
use dataflow_graph::session::Session;
use dataflow_kernels::device::Device;

use crate::data::{Batch, BatchSource, Draw, Prefetcher};
use crate::report::curve::Curve;
use crate::report::metrics::MetricsFile;
use crate::report::progress::Progress;
use crate::report::tensorboard::EventFile;
use crate::report::{EvaluationRow, Recorder, Row, RunFolder, StepRow};
use crate::stages::optimizer::Optimized;
use crate::stages::{Hook, StageError};

/// Batches that are filled ahead.
const PREFETCHED: usize = 4;

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
}

/// A model in training.
pub struct Trainer {
    setup: Setup,
    session: Session,
    records: Option<Records>,
    last_evaluation: Option<EvaluationRow>,
}

/// Where figures go.
struct Records {
    recorder: Recorder,
    progress: Progress,
}

/// What a run came to.
#[derive(Clone, Debug)]
pub struct Summary {
    /// Seconds of the updates alone, without evaluation.
    pub training: Duration,
    /// The last evaluation.
    pub evaluation: Option<EvaluationRow>,
    /// Tokens trained on.
    pub tokens: u64,
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
        Ok(Self { setup, session, records: None, last_evaluation: None })
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

    /// The parameters at this moment: name, shape, numbers.
    pub fn snapshot(&self) -> Vec<(String, Vec<usize>, Vec<f32>)> {
        let parameters = &self.session.plan().parameters;
        let one = |p: &dataflow_graph::plan::PlannedParameter| {
            (p.parameter.name.clone(), p.parameter.shape.clone(), self.session.read(&p.port))
        };
        parameters.iter().map(one).collect()
    }

    /// Records and shows an evaluation; `exact` if it went over the whole validation split.
    ///
    /// # Errors
    /// If an earlier row could not be written.
    pub fn report_evaluation(&mut self, row: EvaluationRow, exact: bool) -> Result<(), StageError> {
        self.last_evaluation = Some(row);
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
        let metrics = MetricsFile::create(&folder.metrics()).map_err(StageError::from_error)?;
        let events = EventFile::create(folder.path(), 0).map_err(StageError::from_error)?;
        let curve = Curve::new(&folder.curve());
        let recorder = Recorder::start(vec![Box::new(metrics), Box::new(events), Box::new(curve)]);
        let progress = Progress::new(0, self.setup.steps, self.setup.log_every);
        self.records = Some(Records { recorder: recorder.map_err(StageError::from_error)?, progress });
        let trained = self.train(hooks);
        // whatever happened, what was recorded is written, and threads end
        let finished: Result<(), StageError> = hooks.iter_mut().try_for_each(|hook| hook.finish(self));
        let Some(mut records) = self.records.take() else { return trained };
        records.progress.finish();
        let recorded = records.recorder.finish().map_err(StageError::from_error);
        let summary = trained?;
        finished?;
        recorded?;
        Ok(summary)
    }

    fn train(&mut self, hooks: &mut [Box<dyn Hook>]) -> Result<Summary, StageError> {
        let (steps, micro) = (self.setup.steps, self.setup.micro_batches as u64);
        let draws = (0..steps * micro).map(Draw::training);
        let mut prefetcher = Prefetcher::start(self.batches(), draws, PREFETCHED).map_err(StageError::from_error)?;
        let mut batch = Batch::new(1, 1);
        let mut summary = Summary { training: Duration::ZERO, evaluation: None, tokens: 0 };
        for step in 0..steps {
            hooks.iter_mut().try_for_each(|hook| hook.after(self, step, false))?;
            let start = Instant::now();
            let mut loss = 0.0;
            for _ in 0..micro {
                prefetcher.next_into(&mut batch).map_err(StageError::from_error)?;
                loss += self.step(&batch)? / micro as f32;
            }
            self.session.run_update().map_err(StageError::from_error)?;
            let took = start.elapsed();
            let tokens = micro * batch.inputs.len() as u64;
            summary.tokens += tokens;
            summary.training += took;
            let row = StepRow {
                step,
                tokens: summary.tokens,
                loss,
                grad_norm: self.session.scalar("grad_norm").unwrap_or(f32::NAN),
                lr: self.session.scalar("lr").unwrap_or(f32::NAN),
                tokens_per_s: tokens as f64 / took.as_secs_f64(),
                mfu: None,
            };
            hooks.iter_mut().for_each(|hook| hook.step(&row));
            if let Some(records) = &mut self.records {
                records.progress.step(&row, took);
                records.recorder.record(Row::Step(row)).map_err(StageError::from_error)?;
            }
            if !row.loss.is_finite() || !row.grad_norm.is_finite() {
                let message = format!("step {step}: the loss is {} and the gradient norm {}", row.loss, row.grad_norm);
                return Err(StageError::Message(format!(
                    "{message}, which is not finite: use a lower learning rate, a longer warm-up or `clip`"
                )));
            }
        }
        hooks.iter_mut().try_for_each(|hook| hook.after(self, steps, true))?;
        summary.evaluation = self.last_evaluation;
        Ok(summary)
    }

    /// Forward and backward of one batch; returns its loss.
    fn step(&mut self, batch: &Batch) -> Result<f32, StageError> {
        self.session.write_input("tokens", &batch.inputs);
        self.session.write_input("targets", &batch.targets);
        self.session.run_step().map_err(StageError::from_error)?;
        Ok(self.session.scalar("loss").unwrap_or(f32::NAN))
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
                batch,
                block,
                micro_batches: if training { self.micro_batches } else { 1 },
                seed: self.seed,
                training,
                recurrent: None,
            },
            objectives: objective.list(training),
            optimizer: training.then(|| self.optimized.optimizer(self.steps)),
            memory_budget: self.memory_budget.filter(|_| training),
            without: Vec::new(),
        }
    }
}
