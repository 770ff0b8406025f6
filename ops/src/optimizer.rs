//! AdamW with clipping of the global norm and a learning-rate schedule, as nodes of the graph.

use std::ops::RangeInclusive;
use std::sync::Arc;

use dataflow_graph::build::STEP;
use dataflow_graph::builtin::{Elementwise, SumTo, sum};
use dataflow_graph::op::{Cost, NodeView, Op, OpError};
use dataflow_graph::optimizer::{Optimizer, Update};
use dataflow_graph::systems::compound::Decomposition;
use dataflow_graph::types::TensorType;
use dataflow_kernels::cpu::interpreter::MAX_INPUTS;
use dataflow_kernels::cpu::optimizer::{self, clip_coefficient};
use dataflow_kernels::cpu::reduce::sum_of_squares;
use dataflow_kernels::cuda::{layout, optimizer as cuda};
use dataflow_kernels::device::{Kernel, Target};
use dataflow_kernels::expression::{Builder, Program, Register};

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

impl Schedule {
    /// For the device's kernel.
    fn rate(&self) -> cuda::Rate<'_> {
        match *self {
            Schedule::Constant(lr) => cuda::Rate::Constant(lr),
            Schedule::Cosine { peak, floor, warmup, steps } => cuda::Rate::Cosine { peak, floor, warmup, steps },
            Schedule::Table(ref rates) => cuda::Rate::Table(rates),
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
            Target::Cuda => Ok(Kernel::cuda(move |c| cuda::learning_rate(c, schedule.rate(), c.input(0), c.output(0)))),
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
    fn decompose(&self, d: &mut Decomposition<'_>) -> Result<bool, OpError> {
        let mut sums = Vec::new();
        for tensor in d.inputs().to_vec() {
            let squares = d.emit(Elementwise::of(1, |b, x| b.square(x[0])), &[tensor])?;
            sums.push(d.emit(SumTo { shape: vec![] }, &[squares])?);
        }
        while sums.len() > 1 {
            let parts = sums.chunks(MAX_INPUTS);
            sums = parts.map(|part| d.emit(sum(part.len()), part)).collect::<Result<_, _>>()?;
        }
        let Some(&total) = sums.first() else { return Ok(false) };
        let norm = d.emit(Elementwise::of(1, |b, x| b.sqrt(x[0])), &[total])?;
        d.set(0, norm);
        Ok(true)
    }
    fn lower(&self, _: &NodeView<'_>, target: Target) -> Result<Kernel, OpError> {
        match target {
            Target::Cuda => Ok(Kernel::cuda(|c| {
                let gradients: Vec<_> = (0..c.inputs()).map(|i| c.input(i)).collect();
                cuda::global_norm(c, &gradients, c.output(0))
            })),
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

/// (step, lr, norm, then parameter, gradient, m, v of each) to the new parameters and moments, in place. With a norm
/// that is not finite nothing changes, so that one bad batch cannot ruin what was learned.
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
    /// A launch for each tensor and line of the formula. Where the norm is not finite, each leaves what it would replace.
    fn decompose(&self, d: &mut Decomposition<'_>) -> Result<bool, OpError> {
        let AdamW { betas, eps, decay, clip, .. } = self.settings;
        let (step, lr, norm) = (d.inputs()[0], d.inputs()[1], d.inputs()[2]);
        let corrections = [betas.0, betas.1].map(|beta| d.emit(BiasCorrection(beta), &[step]));
        let [first, second] = corrections;
        let (first, second) = (first?, second?);
        let clip = clip.map(|max| {
            let coefficient = Elementwise::of(1, |b, x| {
                let norm = b.offset(x[0], 1e-6);
                let (max, one) = (b.constant(max as f32), b.constant(1.0));
                let coefficient = b.div(max, norm);
                b.min(coefficient, one)
            });
            d.emit(coefficient, &[norm])
        });
        let clip = clip.transpose()?;
        let finite = Elementwise::of(1, |b, x| {
            let infinity = b.constant(f32::INFINITY);
            let norm = b.abs(x[0]);
            b.greater(infinity, norm)
        });
        let finite = d.emit(finite, &[norm])?;
        let tensors = d.inputs()[3..].to_vec();
        for (tensor, decays) in tensors.chunks_exact(4).zip(&self.decays) {
            let &[mut parameter, mut gradient, mut m, mut v] = tensor else { unreachable!("chunks of four") };
            if let Some(clip) = clip {
                gradient = d.emit(Elementwise::of(2, |b, x| b.mul(x[0], x[1])), &[gradient, clip])?;
            }
            if *decays && decay != 0.0 {
                let shrink = Advance::of(1, |b, x| {
                    let share = b.scale(x[1], decay as f32);
                    let rest = b.one_minus(share);
                    b.mul(x[0], rest)
                });
                parameter = d.emit(shrink, &[parameter, lr, finite])?;
            }
            let average = |beta: f64| {
                move |b: &mut Builder, old: Register, new: Register| {
                    let (old, new) = (b.scale(old, beta as f32), b.scale(new, (1.0 - beta) as f32));
                    b.add(old, new)
                }
            };
            m = d.emit(Advance::of(1, |b, x| average(betas.0)(b, x[0], x[1])), &[m, gradient, finite])?;
            let square = |b: &mut Builder, x: &[Register]| {
                let square = b.square(x[1]);
                average(betas.1)(b, x[0], square)
            };
            v = d.emit(Advance::of(1, square), &[v, gradient, finite])?;
            let size = Elementwise::of(2, |b, x| {
                let mean = b.div(x[0], x[1]);
                let root = b.sqrt(mean);
                b.offset(root, eps as f32)
            });
            let size = d.emit(size, &[v, second])?;
            let step = Advance::of(4, |b, x| {
                let rate = b.div(x[3], x[4]);
                let step = b.div(x[1], x[2]);
                let step = b.mul(rate, step);
                b.sub(x[0], step)
            });
            d.emit(step, &[parameter, m, size, lr, first, finite])?;
        }
        Ok(true)
    }
    fn lower(&self, _: &NodeView<'_>, target: Target) -> Result<Kernel, OpError> {
        let Self { settings, decays } = self.clone();
        match target {
            Target::Cuda => Ok(Kernel::cuda(move |c| {
                let (beta1, beta2) = settings.betas;
                let one = cuda::AdamW { beta1, beta2, eps: settings.eps, clip: settings.clip };
                let parameter = |(i, &decays): (usize, &bool)| cuda::Parameter {
                    value: c.output(3 * i),
                    gradient: c.input(4 + 4 * i),
                    m: c.output(3 * i + 1),
                    v: c.output(3 * i + 2),
                    decay: if decays { settings.decay } else { 0.0 },
                };
                let parameters: Vec<_> = decays.iter().enumerate().map(parameter).collect();
                cuda::adamw(c, one, c.input(0), c.input(1), c.input(2), &parameters)
            })),
            Target::Cpu => Ok(Kernel::cpu(move |a| {
                let (step, lr) = (a.slice::<i32>(0)[0] as u64 + 1, f64::from(a.slice::<f32>(1)[0]));
                let norm = f64::from(a.slice::<f32>(2)[0]);
                if !norm.is_finite() {
                    // the host reads the norm too, and decides what becomes of the run
                    return Ok(());
                }
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

/// `1 - beta^n` for update number n, counted from 1, given the number of updates before.
#[derive(Clone, Debug)]
struct BiasCorrection(f64);

impl Op for BiasCorrection {
    fn infer(&self, _: &[TensorType]) -> Result<Vec<TensorType>, OpError> {
        Ok(vec![TensorType::f32([])])
    }
    fn lower(&self, _: &NodeView<'_>, target: Target) -> Result<Kernel, OpError> {
        let beta = self.0;
        match target {
            Target::Cuda => Ok(Kernel::cuda(move |c| layout::bias_correction(c, c.input(0), beta, c.output(0)))),
            Target::Cpu => Ok(Kernel::cpu(move |a| {
                let updates = f64::from(a.slice::<i32>(0)[0]) + 1.0;
                a.slice_mut(0)[0] = (1.0 - beta.powf(updates)) as f32;
                Ok(())
            })),
        }
    }
}

/// An expression that replaces its first input, unless its last one is 0.
#[derive(Clone, Debug)]
struct Advance(Elementwise);

impl Advance {
    /// Of a tensor, `others` and the condition.
    fn of(others: usize, form: impl FnOnce(&mut Builder, &[Register]) -> Register) -> Self {
        Self(Elementwise::of(others + 2, |b, x| {
            let new = form(b, x);
            b.select(x[others + 1], new, x[0])
        }))
    }
}

impl Op for Advance {
    fn arity(&self) -> RangeInclusive<usize> {
        self.0.arity()
    }
    fn expression(&self, inputs: usize) -> Option<Program> {
        self.0.expression(inputs)
    }
    fn updates(&self) -> Vec<(usize, usize)> {
        vec![(0, 0)]
    }
    fn strided(&self) -> bool {
        true
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
