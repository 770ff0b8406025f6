//! Objectives: functions of logits and targets.

use std::ops::RangeInclusive;

use dataflow_graph::gradient::Gradient;
use dataflow_graph::op::{Cost, Merged, NodeView, Op, OpError, Pair};
use dataflow_graph::registry::{Info, Registry};
use dataflow_graph::types::{DType, TensorType};
use dataflow_kernels::cpu::cross_entropy;
use dataflow_kernels::cuda;
use dataflow_kernels::device::{Kernel, KernelError, Target};
use serde::{Deserialize, Serialize};

use crate::head;

/// The mean over the rows whose target is not -1 of `log sum exp(logits) - logits[target]`, in nats; 0 if there are
/// none. logits `[.., V]`, targets `[..]`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CrossEntropy {}

fn check(inputs: &[TensorType]) -> Result<(), OpError> {
    let (logits, targets) = (&inputs[0], &inputs[1]);
    if targets.dtype != DType::I32 || logits.dtype != DType::F32 || logits.rows() != targets.elements() {
        return Err("the logits need a row for every target, and targets must be i32".into());
    }
    Ok(())
}

impl Op for CrossEntropy {
    fn tokenwise(&self) -> bool {
        true
    }
    fn arity(&self) -> RangeInclusive<usize> {
        2..=2
    }
    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, OpError> {
        check(inputs)?;
        Ok(vec![TensorType::f32([]), TensorType::f32([inputs[0].rows()])])
    }
    fn gradient(&self, g: &mut Gradient<'_>) -> Result<(), OpError> {
        let Some(dy) = g.output_gradient(0) else { return Ok(()) };
        let inputs = [g.input(0), g.input(1), g.output(1), dy];
        let dx = g.emit(CrossEntropyGradient, &inputs)?[0];
        g.set(0, dx)
    }
    fn merge(&self, pair: &Pair<'_>) -> Option<Merged> {
        head::merge(pair)
    }
    fn lower(&self, _: &NodeView<'_>, target: Target) -> Result<Kernel, OpError> {
        match target {
            Target::Cuda => {
                Ok(Kernel::cuda(|c| cuda::cross_entropy::forward(c, c.input(0), c.input(1), c.output(0), c.output(1))))
            }
            Target::Cpu => Ok(Kernel::cpu(|a| {
                let loss = cross_entropy::forward(a.rows(0), a.slice(1), a.slice_mut(1));
                a.slice_mut(0)[0] = loss.map_err(|e| KernelError(e.to_string()))?.mean();
                Ok(())
            })),
        }
    }
    fn strided(&self) -> bool {
        true
    }
    fn cost(&self, node: &NodeView<'_>) -> Cost {
        Cost { flops: 15.0 * node.inputs[0].elements() as f64, bytes: node.bytes() }
    }
}

/// (logits, targets, lse, upstream) to dlogits, which may overwrite the logits.
#[derive(Clone, Debug)]
struct CrossEntropyGradient;

impl Op for CrossEntropyGradient {
    fn arity(&self) -> RangeInclusive<usize> {
        4..=4
    }
    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, OpError> {
        Ok(vec![inputs[0].clone()])
    }
    fn lower(&self, _: &NodeView<'_>, target: Target) -> Result<Kernel, OpError> {
        match target {
            Target::Cuda => Ok(Kernel::cuda(|c| {
                let (logits, targets, lse, upstream) = (c.input(0), c.input(1), c.input(2), c.input(3));
                cuda::cross_entropy::backward(c, logits, targets, lse, upstream, c.output(0))
            })),
            Target::Cpu => Ok(Kernel::cpu(|a| {
                let (targets, lse, upstream) = (a.slice(1), a.slice(2), a.slice::<f32>(3)[0]);
                let done = match a.in_place(0) {
                    Some(_) => cross_entropy::backward_in_place(a.rows_mut(0), targets, lse, upstream),
                    None => cross_entropy::backward(a.rows(0), targets, lse, upstream, a.rows_mut(0)),
                };
                done.map_err(|e| KernelError(e.to_string()))
            })),
        }
    }
    fn in_place(&self) -> Vec<(usize, usize)> {
        vec![(0, 0)]
    }
    fn strided(&self) -> bool {
        true
    }
    fn cost(&self, node: &NodeView<'_>) -> Cost {
        Cost { flops: 15.0 * node.inputs[0].elements() as f64, bytes: node.bytes() }
    }
}

/// The share of rows, among those whose target is not -1, whose largest logit is the target's. No gradient.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Accuracy {}

impl Op for Accuracy {
    fn tokenwise(&self) -> bool {
        true
    }
    fn arity(&self) -> RangeInclusive<usize> {
        2..=2
    }
    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, OpError> {
        check(inputs)?;
        Ok(vec![TensorType::f32([])])
    }
    fn lower(&self, _: &NodeView<'_>, target: Target) -> Result<Kernel, OpError> {
        match target {
            Target::Cuda => Ok(Kernel::cuda(|c| cuda::cross_entropy::accuracy(c, c.input(0), c.input(1), c.output(0)))),
            Target::Cpu => Ok(Kernel::cpu(|a| {
                let counts = cross_entropy::accuracy(a.rows(0), a.slice(1));
                let (correct, counted) = counts.map_err(|e| KernelError(e.to_string()))?;
                a.slice_mut(0)[0] = correct as f32 / counted.max(1) as f32;
                Ok(())
            })),
        }
    }
    fn strided(&self) -> bool {
        true
    }
}

pub(crate) fn register(registry: &mut Registry) {
    registry.op::<CrossEntropy>(Info {
        name: "CrossEntropy",
        about: "The mean negative log-likelihood of the targets, in nats; rows of target -1 do not count.",
        inputs: &["logits [.., V]", "targets [..]"],
        formula: "mean(log sum exp(logits) - logits[target])",
        source: "",
        example: "",
    });
    registry.op::<Accuracy>(Info {
        name: "Accuracy",
        about: "The share of rows whose largest logit is the target's; rows of target -1 do not count.",
        inputs: &["logits [.., V]", "targets [..]"],
        formula: "mean(argmax(logits) = target)",
        source: "",
        example: "",
    });
}
