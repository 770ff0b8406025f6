//! AdamW with clipping of the global norm and a learning-rate schedule, as nodes of the graph.

use std::ops::RangeInclusive;
use std::sync::Arc;

use dataflow_graph::build::STEP;
use dataflow_graph::op::{Cost, NodeView, Op, OpError};
use dataflow_graph::optimizer::{Optimizer, Update};
use dataflow_graph::types::TensorType;
use dataflow_kernels::cpu::optimizer::{self, clip_coefficient};
use dataflow_kernels::cpu::reduce::sum_of_squares;
use dataflow_kernels::device::{Kernel, Target};

/// The learning rate as a function of the number of updates made before, counted from 0.
#[derive(Clone, Debug, PartialEq)]
pub enum Schedule {
    /// The same at every update.
    Constant(f64),
    /// From 0 up to `peak` in a straight line over `warmup` updates, then along a half cosine down to `floor` at
    /// update `steps`, and `floor` from there on (nanoGPT's `get_lr`).
    Cosine {
        /// Highest rate.
        peak: f64,
        /// Lowest rate after the warm-up.
        floor: f64,
        /// Updates of the warm-up.
        warmup: u64,
        /// Update at which `floor` is reached.
        steps: u64,
    },
    /// A rate for each update; the last one holds from there on.
    Table(Arc<[f32]>),
}

impl Schedule {
    /// The rate of update number `step`.
    pub fn at(&self, step: u64) -> f64 {
        match *self {
            Schedule::Constant(lr) => lr,
            Schedule::Cosine { peak, warmup, .. } if step < warmup => peak * step as f64 / warmup as f64,
            Schedule::Cosine { floor, steps, .. } if step > steps => floor,
            Schedule::Cosine { peak, floor, warmup, steps } => {
                let progress = (step - warmup) as f64 / steps.saturating_sub(warmup).max(1) as f64;
                floor + 0.5 * (1.0 + (std::f64::consts::PI * progress).cos()) * (peak - floor)
            }
            Schedule::Table(ref rates) => rates.get(step as usize).or(rates.last()).copied().unwrap_or(0.0).into(),
        }
    }
}

/// AdamW (Loshchilov and Hutter, 2019) of all parameters. Weight decay applies to those of two dimensions or
/// more. The graph reports `lr` and `grad_norm`, the global norm before clipping.
#[derive(Clone, Debug)]
pub struct AdamW {
    /// Learning rate.
    pub schedule: Schedule,
    /// Decay of the moments.
    pub betas: (f64, f64),
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decoupled weight decay.
    pub decay: f64,
    /// Largest norm of all gradients together, if they are clipped.
    pub clip: Option<f64>,
}

impl Optimizer for AdamW {
    fn update(&self, update: &mut Update<'_>) -> Result<(), OpError> {
        let parameters = update.parameters();
        let step = update.state(STEP, TensorType::i32([1]));
        let lr = update.emit("lr", LearningRate(self.schedule.clone()), &[step])?[0];
        let gradients: Vec<_> = parameters.iter().map(|p| p.gradient).collect();
        let norm = update.emit("grad_norm", GlobalNorm, &gradients)?[0];
        let mut inputs = vec![step, lr, norm];
        for p in &parameters {
            let tensor = update.type_of(p.value);
            let m = update.state(&format!("{}.m", p.name), tensor.clone());
            let v = update.state(&format!("{}.v", p.name), tensor);
            inputs.extend([p.value, p.gradient, m, v]);
        }
        let decays = parameters.iter().map(|p| p.decays).collect();
        update.emit("adamw", AdamWUpdate { settings: self.clone(), decays }, &inputs)?;
        update.report("lr", lr);
        update.report("grad_norm", norm);
        Ok(())
    }
}

/// The number of updates so far to the learning rate.
#[derive(Clone, Debug)]
struct LearningRate(Schedule);

impl Op for LearningRate {
    fn infer(&self, _: &[TensorType]) -> Result<Vec<TensorType>, OpError> {
        Ok(vec![TensorType::f32([])])
    }
    fn lower(&self, _: &NodeView<'_>, target: Target) -> Result<Kernel, OpError> {
        let schedule = self.0.clone();
        match target {
            Target::Cuda => Err(OpError::no_kernel(target)),
            Target::Cpu => Ok(Kernel::cpu(move |a| {
                a.slice_mut(0)[0] = schedule.at(a.slice::<i32>(0)[0] as u64) as f32;
                Ok(())
            })),
        }
    }
}

/// The Euclidean norm of all inputs together.
#[derive(Clone, Debug)]
struct GlobalNorm;

impl Op for GlobalNorm {
    fn arity(&self) -> RangeInclusive<usize> {
        0..=usize::MAX
    }
    fn infer(&self, _: &[TensorType]) -> Result<Vec<TensorType>, OpError> {
        Ok(vec![TensorType::f32([])])
    }
    fn lower(&self, _: &NodeView<'_>, target: Target) -> Result<Kernel, OpError> {
        match target {
            Target::Cuda => Err(OpError::no_kernel(target)),
            Target::Cpu => Ok(Kernel::cpu(|a| {
                let squares: f64 = (0..a.inputs()).map(|i| sum_of_squares(a.slice(i))).sum();
                a.slice_mut(0)[0] = squares.sqrt() as f32;
                Ok(())
            })),
        }
    }
    fn cost(&self, node: &NodeView<'_>) -> Cost {
        let elements: usize = node.inputs.iter().map(TensorType::elements).sum();
        Cost { flops: 2.0 * elements as f64, bytes: node.bytes() }
    }
}

/// (step, lr, norm, then parameter, gradient, m, v of each) to the new parameters and moments, in place.
#[derive(Clone, Debug)]
struct AdamWUpdate {
    settings: AdamW,
    decays: Vec<bool>,
}

impl Op for AdamWUpdate {
    fn arity(&self) -> RangeInclusive<usize> {
        let n = 3 + 4 * self.decays.len();
        n..=n
    }
    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, OpError> {
        Ok(inputs[3..].chunks(4).flat_map(|p| [p[0].clone(), p[2].clone(), p[3].clone()]).collect())
    }
    fn lower(&self, _: &NodeView<'_>, target: Target) -> Result<Kernel, OpError> {
        let Self { settings, decays } = self.clone();
        match target {
            Target::Cuda => Err(OpError::no_kernel(target)),
            Target::Cpu => Ok(Kernel::cpu(move |a| {
                let (step, lr) = (a.slice::<i32>(0)[0] as u64 + 1, f64::from(a.slice::<f32>(1)[0]));
                let norm = f64::from(a.slice::<f32>(2)[0]);
                let grad_scale = settings.clip.map_or(1.0, |max| clip_coefficient(norm, max));
                for (i, &decays) in decays.iter().enumerate() {
                    let (param, m, v) = (a.slice_mut(3 * i), a.slice_mut(3 * i + 1), a.slice_mut(3 * i + 2));
                    let decay = if decays { settings.decay } else { 0.0 };
                    let (beta1, beta2) = settings.betas;
                    let one = optimizer::AdamW { lr, beta1, beta2, eps: settings.eps, decay, step, grad_scale };
                    optimizer::adamw(param, a.slice(3 + 4 * i + 1), m, v, one);
                }
                Ok(())
            })),
        }
    }
    fn updates(&self) -> Vec<(usize, usize)> {
        (0..self.decays.len())
            .flat_map(|i| [(3 * i, 3 + 4 * i), (3 * i + 1, 5 + 4 * i), (3 * i + 2, 6 + 4 * i)])
            .collect()
    }
    fn cost(&self, node: &NodeView<'_>) -> Cost {
        let elements: usize = node.outputs.iter().map(TensorType::elements).sum();
        Cost { flops: 4.0 * elements as f64, bytes: node.bytes() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_schedule_is_that_of_nanogpt() {
        let lr = Schedule::Cosine { peak: 1e-3, floor: 1e-4, warmup: 100, steps: 2000 };
        assert_eq!(lr.at(0), 0.0);
        assert_eq!(lr.at(50), 5e-4);
        assert_eq!(lr.at(100), 1e-3);
        assert!((lr.at(1050) - 5.5e-4).abs() < 1e-12);
        assert!((lr.at(2000) - 1e-4).abs() < 1e-18);
        assert_eq!(lr.at(2001), 1e-4);
    }
}
