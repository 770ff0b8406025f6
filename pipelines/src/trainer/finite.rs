//! Losses and gradients that are not finite: which node and batch did it, and how to go on without it.

use dataflow_graph::build::{STEP, TICK};

use super::Trainer;
use crate::data::{Batch, Draw};
use crate::report::StepRow;
use crate::stages::StageError;

impl Trainer {
    /// Finds out where a number that is not finite came from, by running the batches of the update again, launch by
    /// launch. The parameters are what they were before the update.
    pub(super) fn cause(&mut self, row: &StepRow) -> Result<String, StageError> {
        let StepRow { step, loss, grad_norm, .. } = *row;
        let what = match loss.is_finite() {
            false => format!("step {step}: the loss is {loss}, which is not finite"),
            true => format!("step {step}: the norm of the gradient is {grad_norm}, which is not finite"),
        };
        if let Some(name) = self.broken_parameter() {
            return Ok(format!("{what}: the parameter `{name}` is not finite before this step"));
        }
        let (first, micro) = (self.position.batches, self.setup.micro_batches as u64);
        let mut source = self.batches();
        let mut batch = Batch::new(1, 1);
        for number in first..first + micro {
            source.fill(Draw::training(number), &mut batch).map_err(StageError::from_error)?;
            // random masks are drawn by this counter
            self.set_counter(TICK, number);
            batch.write_to(&self.session);
            if let Some(launch) = self.session.first_not_finite().map_err(StageError::from_error)? {
                let (name, op) = (&launch.name, launch.op.split(['(', ' ', '{']).next().unwrap_or_default());
                return Ok(format!(
                    "{what}: the first node whose output is not finite is `{name}` ({op}), with training batch {number}"
                ));
            }
        }
        Ok(format!("{what}: every node's output is, but not the sum over batches {first} to {}", first + micro - 1))
    }

    fn broken_parameter(&self) -> Option<String> {
        let mut parameters = self.session.plan().parameters.iter();
        let broken = parameters.find(|p| self.session.read::<f32>(&p.port).iter().any(|x| !x.is_finite()));
        broken.map(|p| p.parameter.name.clone())
    }

    /// After an update that did not happen: counters and gradient sums as before it, but for the batches drawn.
    pub(super) fn forget_update(&mut self) {
        self.set_counter(STEP, self.position.step);
        self.set_counter(TICK, self.position.batches);
        self.session.clear_gradients();
    }

    fn set_counter(&mut self, name: &str, value: u64) {
        if let Some(port) = self.session.plan().states.get(name) {
            self.session.write(port, &[value as i32]);
        }
    }

    /// The end of a run for a number that is not finite.
    pub(super) fn not_finite(&self, cause: &str, dropped: u64) -> StageError {
        let help = "use a lower learning rate, a longer warm-up or `clip`";
        StageError::Message(match dropped {
            0 | 1 => format!("{cause}; {help}; `on_nonfinite: Skip` of the row `train` drops such batches"),
            n => format!("{cause}; {n} updates in a row were dropped; {help}"),
        })
    }
}
