//! A model in training on random tokens, for measuring.

use std::sync::Arc;
use std::time::Instant;

use dataflow_graph::compile::{Request, compile_in};
use dataflow_graph::components::Precision;
use dataflow_graph::diagnostic::{Diagnostic, Errors};
use dataflow_graph::plan::Plan;
use dataflow_graph::session::Session;
use dataflow_kernels::device::{Device, DeviceError};
use dataflow_kernels::random::Stream;

/// A compiled training step with its tokens.
pub struct TrainingStep {
    session: Session,
}

impl TrainingStep {
    /// Compiles a model, fills its parameters and draws one batch of tokens below `vocab`.
    ///
    /// # Errors
    /// What is wrong with the model, or no memory left.
    pub fn prepare(
        request: &Request,
        precision: Precision,
        device: Arc<dyn Device>,
        vocab: usize,
    ) -> Result<Self, Errors> {
        let mut session = Session::new(device, &compile_in(request, precision)?, None)?;
        session.initialize(request.options.seed)?;
        let mut random = Stream::new(request.options.seed, 0);
        let count = request.options.batch * request.options.block;
        for input in ["tokens", "targets"] {
            let tokens: Vec<i32> = (0..count).map(|_| random.below(vocab.max(1)) as i32).collect();
            session.write_input(input, &tokens);
        }
        Ok(Self { session })
    }

    /// Launches and memory.
    pub fn plan(&self) -> &Plan {
        self.session.plan()
    }

    /// Forward, backward and update; returns the loss before the update.
    ///
    /// # Errors
    /// What a kernel refuses.
    pub fn run(&mut self) -> Result<f32, Errors> {
        self.session.run_step().map_err(to_errors)?;
        self.session.run_update().map_err(to_errors)?;
        let loss = self.session.scalar("loss").unwrap_or(f32::NAN);
        self.session.check().map_err(to_errors)?;
        Ok(loss)
    }

    /// Seconds of each of `steps` steps.
    ///
    /// # Errors
    /// What a kernel refuses.
    pub fn time(&mut self, steps: usize) -> Result<Vec<f64>, Errors> {
        let one = |_| {
            let start = Instant::now();
            self.run()?;
            Ok(start.elapsed().as_secs_f64())
        };
        (0..steps).map(one).collect()
    }

    /// Seconds of each launch, for each of `steps` steps.
    ///
    /// # Errors
    /// What a kernel refuses.
    pub fn time_launches(&mut self, steps: usize) -> Result<Vec<Vec<f64>>, Errors> {
        let count = self.plan().launches.len();
        let one = |_| {
            let mut seconds = vec![0.0; count];
            self.session.run_timed(0..count, &mut seconds).map_err(to_errors)?;
            Ok(seconds)
        };
        (0..steps).map(one).collect()
    }
}

/// The error of a device as one for the user.
pub(super) fn to_errors(error: DeviceError) -> Errors {
    Diagnostic::new(error.to_string()).into()
}
