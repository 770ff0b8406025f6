//! The language-model head and the loss in one op, which works on blocks of rows: neither the logits `[B T, V]` nor
//! their gradient are ever stored whole. For a vocabulary of 50304 they would be most of a step's memory.
//!
//! While training, the launch that computes the loss computes the gradients as well, since the logits of a block are
//! there: with `p = softmax(x W^T)` and N rows that count,
//!
//! ```text
//! dlogits = (p - onehot(target)) / (N micro_batches)      dx = dlogits W      dW = dlogits^T x
//! ```
//!
//! `dW` is summed over the blocks in their order, and blocks depend on the sizes alone, so results are the same on any
//! number of threads.

use std::ops::RangeInclusive;
use std::sync::Arc;

use dataflow_graph::builtin::Elementwise;
use dataflow_graph::components::Precision;
use dataflow_graph::gradient::Gradient;
use dataflow_graph::op::{Activations, Cost, Merged, NodeView, Of, Op, OpError, Pair};
use dataflow_graph::types::TensorType;
use dataflow_kernels::cpu::cross_entropy::{Loss, count, forward, forward_backward_in_place};
use dataflow_kernels::cpu::matmul::{Init, Mat};
use dataflow_kernels::cuda::call::{self as cuda, Calls, Product, Start};
use dataflow_kernels::cuda::cross_entropy;
use dataflow_kernels::device::{Arguments, Kernel, KernelError, Target};
use dataflow_kernels::expression::Program;
use dataflow_kernels::{Rows, RowsMut};

use crate::linear::Linear;
use crate::product::product_in;

/// Logits of a block, where that leaves it rows enough.
const BLOCK: usize = 8 << 20;
/// Fewest rows of a block: each reads W twice, and reads and writes dW, which so many rows pay for.
const LEAST_ROWS: usize = 512;
/// Most rows of a block.
const MOST_ROWS: usize = 2048;
/// Rows of a block on a CUDA device, where a product of few rows leaves most of the device idle.
const CUDA_ROWS: usize = 8192;

/// (x, W, targets) to the loss, while training dx and dW, and scratch memory: the logits of a block of rows, in
/// evaluation also their log-sum-exps.
#[derive(Clone, Debug)]
struct LinearCrossEntropy {
    /// While training, what the loss is multiplied with before it is differentiated.
    upstream: Option<f32>,
    target: Target,
}

/// The head and the loss, if nobody else wants the logits.
pub(crate) fn merge(pair: &Pair<'_>) -> Option<Merged> {
    let bias = pair.producer_inputs.len() > 2;
    if pair.shared || pair.input != 0 || bias || pair.producer.downcast::<Linear>().is_none() {
        return None;
    }
    let upstream = pair.options.training.then(|| 1.0 / pair.options.micro_batches as f32);
    Some(Merged {
        op: Arc::new(LinearCrossEntropy { upstream, target: pair.options.target }),
        inputs: vec![Of::Producer(0), Of::Producer(1), Of::Consumer(1)],
        outputs: vec![Of::Consumer(0)],
    })
}

/// Rows of a block.
fn block_rows(rows: usize, classes: usize, target: Target) -> usize {
    let most = match target {
        Target::Cpu => (BLOCK / classes.max(1)).clamp(LEAST_ROWS, MOST_ROWS),
        Target::Cuda => CUDA_ROWS,
    };
    most.min(rows)
}

impl Op for LinearCrossEntropy {
    fn arity(&self) -> RangeInclusive<usize> {
        3..=3
    }
    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, OpError> {
        let (x, weight) = (&inputs[0], &inputs[1]);
        let block = block_rows(x.rows(), weight.rows(), self.target);
        let mut outputs = vec![TensorType::f32([])];
        match self.upstream {
            Some(_) => outputs.extend([x.clone(), weight.clone()]),
            None => outputs.push(TensorType::f32([block])),
        }
        outputs.push(TensorType::f32([block, weight.rows()]));
        Ok(outputs)
    }
    fn gradient(&self, g: &mut Gradient<'_>) -> Result<(), OpError> {
        let Some(dy) = g.output_gradient(0) else { return Ok(()) };
        let Some(upstream) = self.upstream else { return Err("an evaluation program has no gradient".into()) };
        let factor = g.constant(dy).map(|c| c / upstream);
        for i in [0, 1] {
            let mut gradient = g.output(1 + i);
            if factor != Some(1.0) {
                let program = Program::new(2, |b, x| {
                    let scaled = b.mul(x[0], x[1]);
                    vec![b.scale(scaled, 1.0 / upstream)]
                });
                let shape = g.type_of(gradient).shape;
                gradient = g.emit(Elementwise { program, shape: Some(shape) }, &[gradient, dy])?[0];
            }
            g.set(i, gradient)?;
        }
        Ok(())
    }
    fn products(&self) -> bool {
        true
    }
    fn lower(&self, node: &NodeView<'_>, target: Target) -> Result<Kernel, OpError> {
        let (upstream, precision) = (self.upstream, node.precision);
        match target {
            Target::Cuda => Ok(Kernel::cuda(move |c| match upstream {
                Some(upstream) => train_on_cuda(c, upstream, precision == Precision::Bf16),
                None => evaluate_on_cuda(c, precision == Precision::Bf16),
            })),
            Target::Cpu => Ok(Kernel::cpu(move |a| {
                let loss = match upstream {
                    Some(upstream) => train(a, upstream, precision),
                    None => evaluate(a, precision),
                };
                a.slice_mut(0)[0] = loss?.mean();
                Ok(())
            })),
        }
    }
    fn activations(&self, _: usize) -> Activations {
        let outputs = if self.upstream.is_some() { vec![1, 3] } else { vec![2] };
        Activations::new([0, 1], outputs)
    }
    fn cost(&self, node: &NodeView<'_>) -> Cost {
        let (x, weight) = (&node.inputs[0], &node.inputs[1]);
        let logits = (x.rows() * weight.rows()) as f64;
        let (products, softmax) = if self.upstream.is_some() { (6.0, 30.0) } else { (2.0, 15.0) };
        Cost { flops: logits * (products * x.cols() as f64 + softmax), bytes: node.bytes() }
    }
}

/// Blocks of rows: from and to.
fn blocks(rows: usize, per_block: usize) -> impl Iterator<Item = (usize, usize)> {
    (0..rows).step_by(per_block.max(1)).map(move |from| (from, (from + per_block).min(rows)))
}

fn train(a: &Arguments<'_>, upstream: f32, precision: Precision) -> Result<Loss, KernelError> {
    let product = product_in(precision);
    let (x, weight, targets) = (a.rows::<f32>(0), a.rows::<f32>(1), a.slice::<i32>(2));
    let (dx, mut dw, scratch) = (a.slice_mut::<f32>(1), a.rows_mut::<f32>(2), a.slice_mut::<f32>(3));
    let (classes, cols) = (weight.rows(), x.cols());
    let counted = count(targets, classes).map_err(|e| KernelError(e.to_string()))?;
    let mut total = Loss { sum: 0.0, counted };
    for (from, to) in blocks(x.rows(), scratch.len() / classes) {
        let (x, targets) = (x.slice_rows(from, to), &targets[from..to]);
        let logits = &mut scratch[..(to - from) * classes];
        product(RowsMut::contiguous(logits, classes), Mat::Normal(x), Mat::Transposed(weight), Init::Zero);
        let loss = forward_backward_in_place(RowsMut::contiguous(logits, classes), targets, upstream, Some(counted));
        total.sum += loss.map_err(|e| KernelError(e.to_string()))?.sum;
        let dlogits = Rows::contiguous(logits, classes);
        let dx = RowsMut::contiguous(&mut dx[from * cols..to * cols], cols);
        product(dx, Mat::Normal(dlogits), Mat::Normal(weight), Init::Zero);
        let init = if from == 0 { Init::Zero } else { Init::Accumulate };
        product(dw.reborrow(), Mat::Transposed(dlogits), Mat::Normal(x), init);
    }
    Ok(total)
}

fn evaluate(a: &Arguments<'_>, precision: Precision) -> Result<Loss, KernelError> {
    let product = product_in(precision);
    let (x, weight, targets) = (a.rows::<f32>(0), a.rows::<f32>(1), a.slice::<i32>(2));
    let (lse, scratch) = (a.slice_mut::<f32>(1), a.slice_mut::<f32>(2));
    let classes = weight.rows();
    let counted = count(targets, classes).map_err(|e| KernelError(e.to_string()))?;
    let mut total = Loss { sum: 0.0, counted };
    for (from, to) in blocks(x.rows(), lse.len()) {
        let logits = &mut scratch[..(to - from) * classes];
        let x = Mat::Normal(x.slice_rows(from, to));
        product(RowsMut::contiguous(logits, classes), x, Mat::Transposed(weight), Init::Zero);
        let loss = forward(Rows::contiguous(logits, classes), &targets[from..to], &mut lse[..to - from]);
        total.sum += loss.map_err(|e| KernelError(e.to_string()))?.sum;
    }
    Ok(total)
}

/// The logits of the rows of `x`, in `scratch`.
fn logits_on_cuda(
    c: &mut Calls<'_>,
    x: cuda::Tensor,
    weight: cuda::Tensor,
    scratch: cuda::Tensor,
    bf16: bool,
) -> Result<cuda::Tensor, KernelError> {
    let y = scratch.slice_rows(0, x.rows);
    let (a, b) = (cuda::Mat::normal(x), cuda::Mat::transposed(weight));
    c.product(Product { a, b, y, start: Start::Zero, batches: 1, bf16 })?;
    Ok(y)
}

fn train_on_cuda(c: &mut Calls<'_>, upstream: f32, bf16: bool) -> Result<(), KernelError> {
    let (x, weight, targets) = (c.input(0), c.input(1), c.input(2));
    let (loss, dx, dw, scratch) = (c.output(0), c.output(1), c.output(2), c.output(3));
    let (classes, targets) = (weight.rows, targets.reshape(1)?);
    let counted = cross_entropy::count(c, targets, classes)?;
    let losses = cross_entropy::losses(c, x.rows);
    for (from, to) in blocks(x.rows, scratch.rows) {
        let rows = x.slice_rows(from, to);
        let logits = logits_on_cuda(c, rows, weight, scratch, bf16)?;
        let (targets, losses) = (targets.slice_rows(from, to), losses.slice_cols(from, to));
        cross_entropy::rows_in_place(c, logits, targets, counted, upstream, losses)?;
        let (dlogits, b) = (cuda::Mat::normal(logits), cuda::Mat::normal(weight));
        let dx = dx.slice_rows(from, to);
        c.product(Product { a: dlogits, b, y: dx, start: Start::Zero, batches: 1, bf16 })?;
        let (a, b) = (cuda::Mat::transposed(logits), cuda::Mat::normal(rows));
        let start = if from == 0 { Start::Zero } else { Start::Add(dw) };
        c.product(Product { a, b, y: dw, start, batches: 1, bf16 })?;
    }
    cross_entropy::mean(c, losses, counted, loss)
}

fn evaluate_on_cuda(c: &mut Calls<'_>, bf16: bool) -> Result<(), KernelError> {
    let (x, weight, targets) = (c.input(0), c.input(1), c.input(2));
    let (loss, lse, scratch) = (c.output(0), c.output(1), c.output(2));
    let targets = targets.reshape(1)?;
    let counted = cross_entropy::count(c, targets, weight.rows)?;
    let losses = cross_entropy::losses(c, x.rows);
    for (from, to) in blocks(x.rows, scratch.rows) {
        let logits = logits_on_cuda(c, x.slice_rows(from, to), weight, scratch, bf16)?;
        let (targets, losses) = (targets.slice_rows(from, to), losses.slice_cols(from, to));
        cross_entropy::rows(c, logits, targets, lse.slice_cols(0, to - from), losses)?;
    }
    cross_entropy::mean(c, losses, counted, loss)
}
