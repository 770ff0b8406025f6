//! RWKV's token shift.

use std::ops::RangeInclusive;
use std::sync::Arc;

use dataflow_graph::components::Recurrence;
use dataflow_graph::gradient::Gradient;
use dataflow_graph::op::{Activations, Cost, NodeView, Op, OpError, Recurrent};
use dataflow_graph::registry::{Info, Registry};
use dataflow_graph::types::TensorType;
use dataflow_kernels::cpu::output::Output;
use dataflow_kernels::cpu::token_shift;
use dataflow_kernels::cuda::token_shift as cuda;
use dataflow_kernels::device::{Kernel, Target};
use dataflow_kernels::{Rows, RowsMut};
use serde::{Deserialize, Serialize};

use crate::packed::Packing;
use crate::recurrent::{Continuation, flat, flat_mut};
use crate::sequence::sizes;

/// Mixes each token with the one before it (arXiv:2305.13048): for every mix vector `m_j` of `[C]` an output
/// `y_j = x + (shift(x) - x) m_j`, where `shift(x)_t = x_(t-1)` and 0 at first. Without mix vectors the output is
/// `shift(x)`. x, y `[B, T, C]`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TokenShift {}

/// Most mix vectors of one row.
const MAX_MIXES: usize = 8;

impl Op for TokenShift {
    fn arity(&self) -> RangeInclusive<usize> {
        1..=1 + MAX_MIXES
    }
    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, OpError> {
        let (_, _, cols) = sizes(&inputs[0])?;
        if let Some(mix) = inputs[1..].iter().find(|t| t.elements() != cols || t.cols() != cols) {
            return Err(format!("a mix vector needs {cols} elements, found {mix}").into());
        }
        Ok(vec![inputs[0].clone(); (inputs.len() - 1).max(1)])
    }
    fn gradient(&self, g: &mut Gradient<'_>) -> Result<(), OpError> {
        let mixes = g.inputs() - 1;
        let dys = (0..mixes.max(1)).map(|o| g.output_gradient_or_zeros(o)).collect::<Result<Vec<_>, _>>()?;
        let mut inputs = if mixes == 0 { Vec::new() } else { g.all_inputs().to_vec() };
        inputs.extend(dys);
        let made = g.emit(TokenShiftGradient { mixes }, &inputs)?;
        (0..=mixes).try_for_each(|i| g.set(i, made[i]))
    }
    fn lower(&self, node: &NodeView<'_>, target: Target) -> Result<Kernel, OpError> {
        let (_, time, _) = sizes(&node.inputs[0])?;
        let mixes = node.inputs.len() - 1;
        match target {
            Target::Cuda => Ok(Kernel::cuda(move |c| {
                let mix: Vec<_> = (0..mixes).map(|j| c.input(1 + j)).collect();
                let ys: Vec<_> = (0..mixes.max(1)).map(|j| c.output(j)).collect();
                cuda::forward(c, c.input(0), time, &mix, &ys)
            })),
            Target::Cpu => Ok(Kernel::cpu(move |a| {
                if mixes == 0 {
                    token_shift::forward(a.rows(0), time, None, a.rows_mut(0));
                    return Ok(());
                }
                let mix: [&[f32]; MAX_MIXES] = std::array::from_fn(|j| if j < mixes { a.slice(1 + j) } else { &[] });
                let mut ys: [Output<'_>; MAX_MIXES] =
                    std::array::from_fn(|j| if j < mixes { a.output(j) } else { Output::default() });
                token_shift::mix_forward(a.rows(0), time, None, &mix[..mixes], &mut ys[..mixes]);
                Ok(())
            })),
        }
    }
    fn recurrent(&self, inputs: &[TensorType], recurrence: &Recurrence) -> Result<Option<Recurrent>, OpError> {
        let ((_, time, cols), mixes) = (sizes(&inputs[0])?, inputs.len() - 1);
        let form = Continuation {
            op: self,
            recurrence,
            inputs: inputs.len(),
            time,
            results: vec![inputs[0].clone(); mixes.max(1)],
            states: vec![("last", TensorType::f32([recurrence.slots, cols]))],
            limit: None,
            cache: false,
        };
        Ok(Some(form.on(
            move |given: &[Rows<'_>; 1 + MAX_MIXES], s, mut ys: [RowsMut<'_>; MAX_MIXES], [mut last]| {
                let x = s.of(given[0]);
                if mixes == 0 {
                    token_shift::forward(x, s.len, Some(last.as_rows()), ys[0].reborrow());
                } else {
                    let mix: [&[f32]; MAX_MIXES] = std::array::from_fn(|j| flat(&given[1 + j]));
                    let mut ys = ys.map(Output::from);
                    token_shift::mix_forward(x, s.len, Some(last.as_rows()), &mix[..mixes], &mut ys[..mixes]);
                }
                last.row(0).copy_from_slice(x.row(s.len - 1));
            },
            move |c, s| {
                let mix: Vec<_> = (0..mixes).map(|j| c.input(1 + j)).collect();
                let ys: Vec<_> = (0..mixes.max(1)).map(|j| c.output(j)).collect();
                let (x, last) = (c.input(0), c.output(ys.len()));
                dataflow_kernels::cuda::recurrent::token_shift(c, s, x, &mix, &ys, last)
            },
        )))
    }
    fn packed(&self, inputs: &[TensorType]) -> Result<Option<Arc<dyn Op>>, OpError> {
        let mixes = inputs.len() - 1;
        let form = Packing {
            op: Arc::new(self.clone()),
            inputs,
            activations: 1,
            parameters: 0,
            results: vec![inputs[0].clone(); mixes.max(1)],
            kept: None,
        };
        Ok(Some(form.on_cpu::<{ 1 + MAX_MIXES }, MAX_MIXES>(
            move |one, given, mut ys| {
                if mixes == 0 {
                    return token_shift::forward(given[0], one.len, None, ys[0].reborrow());
                }
                let mix: [&[f32]; MAX_MIXES] = std::array::from_fn(|j| flat(&given[1 + j]));
                let mut ys = ys.map(Output::from);
                token_shift::mix_forward(given[0], one.len, None, &mix[..mixes], &mut ys[..mixes]);
            },
            move |one, given, _, dys, mut made| {
                if mixes == 0 {
                    return token_shift::backward(dys[0], one.len, made[0].reborrow(), None);
                }
                let mix: [&[f32]; MAX_MIXES] = std::array::from_fn(|j| flat(&given[1 + j]));
                let [dx, rest @ ..] = &mut made;
                let mut dmix = rest.each_mut().map(flat_mut);
                let (mix, dys, dmix) = (&mix[..mixes], &dys[..mixes], &mut dmix[..mixes]);
                token_shift::mix_backward(given[0], one.len, None, mix, dys, dx.reborrow(), dmix, None);
            },
        )))
    }
    fn activations(&self, inputs: usize) -> Activations {
        Activations::new([0], 0..(inputs - 1).max(1))
    }
    fn rounds(&self, inputs: usize) -> Activations {
        Activations::new([], 0..inputs - 1)
    }
    fn strided(&self) -> bool {
        true
    }
    fn cost(&self, node: &NodeView<'_>) -> Cost {
        let elements: usize = node.outputs.iter().map(TensorType::elements).sum();
        Cost { flops: 3.0 * elements as f64, bytes: node.bytes() }
    }
}

/// (x, mixes, dys) to (dx, dmixes); without mixes (dy) to (dx).
#[derive(Clone, Debug)]
struct TokenShiftGradient {
    mixes: usize,
}

impl Op for TokenShiftGradient {
    fn arity(&self) -> RangeInclusive<usize> {
        1..=1 + 2 * MAX_MIXES
    }
    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, OpError> {
        Ok(inputs[..=self.mixes].to_vec())
    }
    fn lower(&self, node: &NodeView<'_>, target: Target) -> Result<Kernel, OpError> {
        let (_, time, _) = sizes(&node.inputs[0])?;
        let mixes = self.mixes;
        match target {
            Target::Cuda => Ok(Kernel::cuda(move |c| {
                let mix: Vec<_> = (0..mixes).map(|j| c.input(1 + j)).collect();
                // without mixes the only input is dy
                let first = if mixes == 0 { 0 } else { 1 + mixes };
                let dys: Vec<_> = (0..mixes.max(1)).map(|j| c.input(first + j)).collect();
                let dmix: Vec<_> = (0..mixes).map(|j| c.output(1 + j)).collect();
                cuda::backward(c, c.input(0), time, &mix, &dys, c.output(0), &dmix)
            })),
            Target::Cpu => Ok(Kernel::cpu(move |a| {
                if mixes == 0 {
                    token_shift::backward(a.rows(0), time, a.rows_mut(0), None);
                    return Ok(());
                }
                let empty = Rows::contiguous(&[], 1);
                let mix: [&[f32]; MAX_MIXES] = std::array::from_fn(|j| if j < mixes { a.slice(1 + j) } else { &[] });
                let dys: [Rows<'_>; MAX_MIXES] =
                    std::array::from_fn(|j| if j < mixes { a.rows(1 + mixes + j) } else { empty });
                let mut dmix: [&mut [f32]; MAX_MIXES] =
                    std::array::from_fn(|j| if j < mixes { a.slice_mut(1 + j) } else { &mut [] });
                let (dys, dmix) = (&dys[..mixes], &mut dmix[..mixes]);
                token_shift::mix_backward(a.rows(0), time, None, &mix[..mixes], dys, a.rows_mut(0), dmix, None);
                Ok(())
            })),
        }
    }
    fn activations(&self, _: usize) -> Activations {
        let dys = if self.mixes == 0 { 0..0 } else { 1 + self.mixes..1 + 2 * self.mixes };
        Activations::new([0].into_iter().chain(dys), [0])
    }
    fn strided(&self) -> bool {
        true
    }
    fn cost(&self, node: &NodeView<'_>) -> Cost {
        Cost { flops: 6.0 * (self.mixes * node.outputs[0].elements()) as f64, bytes: node.bytes() }
    }
}

pub(crate) fn register(registry: &mut Registry) {
    registry.op::<TokenShift>(Info {
        name: "TokenShift",
        about: "Mixes each token with the one before it, once for every mix vector.",
        inputs: &["x [B, T, C]", "m_1 [C]", "..."],
        formula: "y_j = x + (shift(x) - x) m_j; without mix vectors shift(x)",
        source: "arXiv:2305.13048",
        example: "",
    });
}
