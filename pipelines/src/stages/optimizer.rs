//! `AdamW`: what updates the parameters.

use std::sync::Arc;

use dataflow_graph::format::number::{Real, Size};
use dataflow_graph::optimizer::Optimizer;
use dataflow_graph::registry::{Info, Registry};
use dataflow_ops::optimizer::{self, Schedule};
use serde::{Deserialize, Serialize};

use super::model::Objective;
use super::{Kind, Product, Run, Stage, StageError, StageRegistry};

/// AdamW (Loshchilov and Hutter, 2019), with clipping of the global norm and a learning-rate schedule. Weight decay
/// applies to parameters of two dimensions or more.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AdamW {
    lr: LearningRate,
    #[serde(default = "betas")]
    betas: (Real, Real),
    #[serde(default = "eps")]
    eps: Real,
    #[serde(default)]
    decay: Real,
    /// Largest norm of all gradients together; not clipped by default.
    #[serde(default)]
    clip: Option<Real>,
}

fn betas() -> (Real, Real) {
    (Real(0.9), Real(0.999))
}

fn eps() -> Real {
    Real(1e-8)
}

/// The learning rate over the run.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub enum LearningRate {
    /// The same at every step.
    Constant(Real),
    /// A straight line up to `peak` over `warmup` steps, then half a cosine down to `floor` at step `steps`, by
    /// default the end of the training.
    Cosine {
        /// Highest rate.
        peak: Real,
        /// Lowest rate after the warm-up.
        floor: Real,
        /// Steps of the warm-up.
        warmup: Size,
        /// Step at which `floor` is reached.
        #[serde(default)]
        steps: Option<Size>,
    },
}

/// A model with a loss and an optimizer.
#[derive(Clone)]
pub struct Optimized {
    /// Model and loss.
    pub objective: Objective,
    settings: AdamW,
}

impl Optimized {
    /// The learning-rate schedule, as in the pipeline.
    pub fn schedule(&self) -> String {
        ron::to_string(&self.settings.lr).unwrap_or_default()
    }

    /// The optimizer for a training of so many steps.
    pub fn optimizer(&self, training_steps: u64) -> Arc<dyn Optimizer> {
        let schedule = match self.settings.lr {
            LearningRate::Constant(lr) => Schedule::Constant(lr.0),
            LearningRate::Cosine { peak, floor, warmup, steps } => Schedule::Cosine {
                peak: peak.0,
                floor: floor.0,
                warmup: *warmup as u64,
                steps: steps.map_or(training_steps, |s| *s as u64),
            },
        };
        Arc::new(optimizer::AdamW {
            schedule,
            betas: (self.settings.betas.0.0, self.settings.betas.1.0),
            eps: self.settings.eps.0,
            decay: self.settings.decay.0,
            clip: self.settings.clip.map(|c| c.0),
        })
    }
}

impl AdamW {
    fn check(&self) -> Result<(), String> {
        let beta = |b: f64| (0.0..1.0).contains(&b);
        let positive = |x: f64| x >= 0.0 && x.is_finite();
        if !beta(self.betas.0.0) || !beta(self.betas.1.0) {
            return Err("`betas` must lie in [0, 1)".into());
        }
        if !positive(self.eps.0) || !positive(self.decay.0) || !self.clip.is_none_or(|c| c.0 > 0.0) {
            return Err("`eps` and `decay` must be 0 or more, and `clip` more than 0".into());
        }
        let fine = match self.lr {
            LearningRate::Constant(lr) => positive(lr.0),
            LearningRate::Cosine { peak, floor, .. } => positive(floor.0) && positive(peak.0),
        };
        if fine { Ok(()) } else { Err("the learning rate must be 0 or more".into()) }
    }
}

impl Stage for AdamW {
    fn inputs(&self) -> &'static [Kind] {
        &[Kind::Loss]
    }
    fn output(&self) -> Kind {
        Kind::Optimizer
    }
    fn start(&self, _: &mut Run, inputs: &[&Product]) -> Result<Product, StageError> {
        let [Product::Loss(objective)] = inputs else { unreachable!("kinds are checked before stages start") };
        self.check().map_err(StageError::Message)?;
        Ok(Product::Optimizer(Optimized { objective: objective.clone(), settings: self.clone() }))
    }
}

pub(super) fn register(registry: &mut Registry) {
    registry.stage::<AdamW>(Info {
        name: "AdamW",
        about: "Adam with decoupled weight decay, clipping of the global norm, and a learning-rate schedule.",
        inputs: &["loss"],
        formula: "p = (1 - lr decay) p - lr m / (sqrt(v) + eps), m and v corrected for their start",
        source: "Loshchilov and Hutter, 2019",
        example: "(lr: Cosine(peak: 1e-3, floor: 1e-4, warmup: 100))",
    });
}
