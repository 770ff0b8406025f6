//! Row lookup by token, and learned positions.

use std::ops::RangeInclusive;
use std::sync::Arc;

use dataflow_graph::components::Recurrence;
use dataflow_graph::format::number::{Real, Size};
use dataflow_graph::gradient::Gradient;
use dataflow_graph::initializer::Initializer;
use dataflow_graph::op::{Activations, Cost, Merged, NodeView, Of, Op, OpError, Pair, Parameter, Recurrent};
use dataflow_graph::registry::{Info, Registry};
use dataflow_graph::types::{DType, TensorType};
use dataflow_kernels::cpu::embedding;
use dataflow_kernels::cpu::reduce::copy_rows;
use dataflow_kernels::cuda;
use dataflow_kernels::device::{Kernel, KernelError, Target};
use serde::{Deserialize, Serialize};

use crate::norm::is_sum;
use crate::recurrent::Continuation;

fn normal() -> Initializer {
    Initializer::Normal { std: Real(0.02) }
}

/// `y = W[tokens]`: tokens `[B, T]`, W `[rows, dim]`, y `[B, T, dim]`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Embedding {
    rows: Size,
    dim: Size,
    #[serde(default = "normal")]
    init: Initializer,
}

impl Op for Embedding {
    fn tokenwise(&self) -> bool {
        true
    }
    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, OpError> {
        if inputs[0].dtype != DType::I32 {
            return Err("the input must be token ids (i32)".into());
        }
        if *self.rows == 0 || *self.dim == 0 {
            return Err("`rows` and `dim` must be at least 1".into());
        }
        let mut shape = inputs[0].shape.clone();
        shape.push(*self.dim);
        Ok(vec![TensorType::f32(shape)])
    }
    fn parameters(&self, _: &[TensorType]) -> Result<Vec<Parameter>, OpError> {
        Ok(vec![Parameter::new("weight", [*self.rows, *self.dim], self.init.clone())])
    }
    fn gradient(&self, g: &mut Gradient<'_>) -> Result<(), OpError> {
        let tokens = g.input(0);
        let Some(dy) = g.output_gradient(0) else { return Ok(()) };
        let dw = g.emit(EmbeddingGradient { rows: *self.rows, adding: false }, &[tokens, dy])?[0];
        g.set(1, dw)
    }
    fn narrow(&self, _: usize) -> bool {
        true
    }
    fn lower(&self, node: &NodeView<'_>, target: Target) -> Result<Kernel, OpError> {
        match target {
            Target::Cuda => Ok(Kernel::cuda(|c| cuda::embedding::forward(c, c.input(0), c.input(1), c.output(0)))),
            Target::Cpu if node.inputs[1].dtype == DType::Bf16 => Ok(Kernel::cpu(|a| {
                embedding::forward_narrow(a.slice(0), a.rows(1), a.rows_mut(0)).map_err(|e| KernelError(e.to_string()))
            })),
            Target::Cpu => Ok(Kernel::cpu(|a| {
                embedding::forward(a.slice(0), a.slice(1), a.rows_mut(0)).map_err(|e| KernelError(e.to_string()))
            })),
        }
    }
    fn activations(&self, _: usize) -> Activations {
        Activations::new([], [0])
    }
    fn strided(&self) -> bool {
        true
    }
    fn cost(&self, node: &NodeView<'_>) -> Cost {
        Cost { flops: 0.0, bytes: 2.0 * node.outputs[0].bytes() as f64 }
    }
}

/// The gradient of [`Embedding`] with respect to its table, added to another one (that of a tied head) if it is
/// `adding`. (tokens, dy, base?) to dW, which may overwrite the base.
#[derive(Clone, Debug)]
struct EmbeddingGradient {
    rows: usize,
    adding: bool,
}

impl Op for EmbeddingGradient {
    fn arity(&self) -> RangeInclusive<usize> {
        2..=3
    }
    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, OpError> {
        Ok(vec![TensorType::f32([self.rows, inputs[1].cols()])])
    }
    fn merge(&self, pair: &Pair<'_>) -> Option<Merged> {
        let own = pair.producer.downcast::<Self>()?;
        let dw = TensorType::f32([own.rows, pair.producer_inputs[1].cols()]);
        if own.adding || pair.shared || !is_sum(pair.consumer, pair.consumer_inputs, &dw) {
            return None;
        }
        let inputs = vec![Of::Producer(0), Of::Producer(1), Of::Consumer(1 - pair.input)];
        let op = Arc::new(Self { adding: true, ..own.clone() });
        Some(Merged { op, inputs, outputs: vec![Of::Consumer(0)] })
    }
    fn lower(&self, _: &NodeView<'_>, target: Target) -> Result<Kernel, OpError> {
        let adding = self.adding;
        match target {
            Target::Cuda => Ok(Kernel::cuda(move |c| {
                let base = adding.then(|| c.input(2));
                cuda::embedding::backward(c, c.input(0), c.input(1), base, c.output(0))
            })),
            Target::Cpu => Ok(Kernel::cpu(move |a| {
                let mut dw = a.rows_mut(0);
                if adding && a.in_place(0).is_none() {
                    copy_rows(a.rows(2), dw.reborrow());
                }
                let dw = dw.as_slice_mut().ok_or_else(|| KernelError("the gradient has gaps between rows".into()))?;
                let done = match adding {
                    true => embedding::backward_add(a.slice(0), a.rows(1), dw),
                    false => embedding::backward(a.slice(0), a.rows(1), dw),
                };
                done.map_err(|e| KernelError(e.to_string()))
            })),
        }
    }
    fn in_place(&self) -> Vec<(usize, usize)> {
        if self.adding { vec![(0, 2)] } else { Vec::new() }
    }
    fn activations(&self, _: usize) -> Activations {
        Activations::new([1], [])
    }
    fn cost(&self, node: &NodeView<'_>) -> Cost {
        let dy = &node.inputs[1];
        let table = if self.adding { 0 } else { node.outputs[0].bytes() };
        Cost { flops: dy.elements() as f64, bytes: (3 * dy.bytes() + table) as f64 }
    }
}

/// The first T rows of a learned table: tokens `[B, T]`, W `[rows, dim]`, y `[T, dim]`. Added to the token
/// embedding it marks positions; T may not exceed `rows`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PositionEmbedding {
    rows: Size,
    dim: Size,
    #[serde(default = "normal")]
    init: Initializer,
}

impl Op for PositionEmbedding {
    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, OpError> {
        let time = inputs[0].cols();
        if time > *self.rows {
            let message = format!("{time} tokens exceed the {} learned positions", self.rows);
            return Err(format!("{message}: use a shorter block, or set the config name `block`").into());
        }
        Ok(vec![TensorType::f32([time, *self.dim])])
    }
    fn parameters(&self, _: &[TensorType]) -> Result<Vec<Parameter>, OpError> {
        Ok(vec![Parameter::new("weight", [*self.rows, *self.dim], self.init.clone())])
    }
    fn gradient(&self, g: &mut Gradient<'_>) -> Result<(), OpError> {
        let Some(dy) = g.output_gradient(0) else { return Ok(()) };
        let dw = g.emit(PadRows { rows: *self.rows }, &[dy])?[0];
        g.set(1, dw)
    }
    fn lower(&self, node: &NodeView<'_>, target: Target) -> Result<Kernel, OpError> {
        let time = node.outputs[0].rows();
        match target {
            Target::Cuda => {
                Ok(Kernel::cuda(move |c| cuda::layout::copy_rows(c, c.input(1).slice_rows(0, time), c.output(0))))
            }
            Target::Cpu => Ok(Kernel::cpu(move |a| {
                copy_rows(a.rows(1).slice_rows(0, time), a.rows_mut(0));
                Ok(())
            })),
        }
    }
    fn recurrent(&self, inputs: &[TensorType], recurrence: &Recurrence) -> Result<Option<Recurrent>, OpError> {
        let (time, limit) = (inputs[0].cols(), Some(*self.rows));
        let mut shape = inputs[0].shape.clone();
        shape.push(*self.dim);
        let results = vec![TensorType::f32(shape)];
        let form = Continuation { op: self, recurrence, inputs: 2, time, results, states: vec![], limit, cache: false };
        Ok(Some(form.on(
            move |[_, table], s, [y], []| {
                copy_rows(table.slice_rows(s.position, s.position + s.len), y);
            },
            |c, s| cuda::recurrent::positions(c, s, c.input(1), c.output(0)),
        )))
    }
    fn packed(&self, inputs: &[TensorType]) -> Result<Option<Arc<dyn Op>>, OpError> {
        let mut shape = inputs[0].shape.clone();
        shape.push(*self.dim);
        Ok(Some(Arc::new(PackedPositions { rows: *self.rows, result: TensorType::f32(shape) })))
    }
    fn strided(&self) -> bool {
        true
    }
}

/// Learned positions that start anew at each document: (tokens, W, positions) to `W[positions]`.
#[derive(Clone, Debug)]
struct PackedPositions {
    rows: usize,
    result: TensorType,
}

impl Op for PackedPositions {
    fn arity(&self) -> RangeInclusive<usize> {
        3..=3
    }
    fn infer(&self, _: &[TensorType]) -> Result<Vec<TensorType>, OpError> {
        Ok(vec![self.result.clone()])
    }
    fn gradient(&self, g: &mut Gradient<'_>) -> Result<(), OpError> {
        let positions = g.input(2);
        let Some(dy) = g.output_gradient(0) else { return Ok(()) };
        let dw = g.emit(EmbeddingGradient { rows: self.rows, adding: false }, &[positions, dy])?[0];
        g.set(1, dw)
    }
    fn lower(&self, _: &NodeView<'_>, target: Target) -> Result<Kernel, OpError> {
        match target {
            Target::Cuda => Ok(Kernel::cuda(|c| cuda::embedding::forward(c, c.input(2), c.input(1), c.output(0)))),
            Target::Cpu => Ok(Kernel::cpu(|a| {
                embedding::forward(a.slice(2), a.slice(1), a.rows_mut(0)).map_err(|e| KernelError(e.to_string()))
            })),
        }
    }
    fn strided(&self) -> bool {
        true
    }
    fn cost(&self, node: &NodeView<'_>) -> Cost {
        Cost { flops: 0.0, bytes: 2.0 * node.outputs[0].bytes() as f64 }
    }
}

/// A matrix with rows of zeros below it.
#[derive(Clone, Debug)]
struct PadRows {
    rows: usize,
}

impl Op for PadRows {
    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, OpError> {
        Ok(vec![TensorType::f32([self.rows, inputs[0].cols()])])
    }
    fn lower(&self, _: &NodeView<'_>, target: Target) -> Result<Kernel, OpError> {
        match target {
            Target::Cuda => Ok(Kernel::cuda(|c| cuda::layout::copy_rows(c, c.input(0), c.output(0)))),
            Target::Cpu => Ok(Kernel::cpu(|a| {
                let (x, mut y) = (a.rows::<f32>(0), a.rows_mut::<f32>(0));
                for r in 0..y.rows() {
                    match r < x.rows() {
                        true => y.row(r).copy_from_slice(x.row(r)),
                        false => y.row(r).fill(0.0),
                    }
                }
                Ok(())
            })),
        }
    }
    fn strided(&self) -> bool {
        true
    }
}

pub(crate) fn register(registry: &mut Registry) {
    registry.op::<Embedding>(Info {
        name: "Embedding",
        about: "A row of a trained table for every token.",
        inputs: &["tokens [B, T]"],
        formula: "W[tokens]",
        source: "",
        example: "(rows: 256, dim: 8)",
    });
    registry.op::<PositionEmbedding>(Info {
        name: "PositionEmbedding",
        about: "Learned positions: the first T rows of a trained table.",
        inputs: &["tokens [B, T]"],
        formula: "W[0..T]",
        source: "",
        example: "(rows: 256, dim: 8)",
    });
}
