//! Causal softmax attention.

use std::ops::RangeInclusive;
use std::sync::Arc;

use dataflow_graph::components::{Precision, Recurrence};
use dataflow_graph::format::number::{Real, Size};
use dataflow_graph::gradient::Gradient;
use dataflow_graph::op::{Activations, Cost, NodeView, Op, OpError, Recurrent};
use dataflow_graph::registry::{Info, Registry};
use dataflow_graph::types::TensorType;
use dataflow_kernels::cpu::attention::{self, Dims, Factors};
use dataflow_kernels::cuda::attention as cuda;
use dataflow_kernels::device::{Arguments, Kernel, Target};
use dataflow_kernels::random::Keep;
use serde::{Deserialize, Serialize};

use crate::elementwise::{check_probability, site_of};
use crate::packed::{One, Packing};
use crate::recurrent::{Continuation, flat, flat_mut};
use crate::sequence::{head_dim, same, sizes};

/// `y_i = sum over j <= i of softmax_j(D^-1/2 q_i . k_j) v_j` in every head; q, k, v, y `[B, T, heads D]`. The
/// T x T probabilities are never stored (FlashAttention, arXiv:2205.14135). With `dropout` they are dropped
/// at random while training.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CausalAttention {
    heads: Size,
    #[serde(default)]
    dropout: Real,
    #[serde(skip)]
    site: u32,
}

impl CausalAttention {
    fn dims(&self, q: &TensorType) -> Result<Dims, OpError> {
        let (batch, time, cols) = sizes(q)?;
        Ok(Dims { batch, time, heads: *self.heads, head_dim: head_dim(cols, *self.heads)? })
    }

    /// The mask of this step, drawn from the step counter in input `tick`.
    fn mask(p: f32, seed: u64, site: u32, a: &Arguments<'_>, tick: usize) -> Option<Keep> {
        (p > 0.0).then(|| Keep::new(seed, a.slice::<i32>(tick)[0] as u64, site, p))
    }

    /// Multiply-adds are two for each of `products` products of the causal half.
    fn work(&self, node: &NodeView<'_>, products: f64) -> Cost {
        let q = &node.inputs[0];
        let time = sizes(q).map_or(0, |s| s.1) as f64;
        Cost { flops: products * time * q.elements() as f64, bytes: node.bytes() }
    }
}

impl Op for CausalAttention {
    fn arity(&self) -> RangeInclusive<usize> {
        3..=3
    }
    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, OpError> {
        check_probability(self.dropout.0)?;
        let dims = self.dims(&inputs[0])?;
        same("queries and keys", &inputs[0], &inputs[1])?;
        same("queries and values", &inputs[0], &inputs[2])?;
        Ok(vec![inputs[0].clone(), TensorType::f32([dims.batch, dims.heads, dims.time])])
    }
    fn gradient(&self, g: &mut Gradient<'_>) -> Result<(), OpError> {
        let Some(dy) = g.output_gradient(0) else { return Ok(()) };
        let inputs = [g.input(0), g.input(1), g.input(2), g.output(0), g.output(1), dy];
        let made = g.emit(CausalAttentionGradient(self.clone()), &inputs)?;
        (0..3).try_for_each(|i| g.set(i, made[i]))
    }
    fn lower(&self, node: &NodeView<'_>, target: Target) -> Result<Kernel, OpError> {
        let (dims, p, seed, site) = (self.dims(&node.inputs[0])?, self.dropout.0 as f32, node.seed, self.site);
        let factors = Factors::rounded(node.precision == Precision::Bf16);
        match target {
            Target::Cuda => Ok(Kernel::cuda(move |c| {
                let dropout = (p > 0.0).then(|| cuda::Dropout { seed, site, p, step: c.input(3) });
                let (q, k, v) = (c.input(0), c.input(1), c.input(2));
                cuda::forward(c, dims, q, k, v, dropout, c.output(0), c.output(1))
            })),
            Target::Cpu => Ok(Kernel::cpu(move |a| {
                let mask = Self::mask(p, seed, site, a, 3);
                attention::forward(dims, factors, a.rows(0), a.rows(1), a.rows(2), mask, a.rows_mut(0), a.slice_mut(1));
                Ok(())
            })),
        }
    }
    /// Keys and values of all tokens so far are kept, as many as the capacity allows.
    fn recurrent(&self, inputs: &[TensorType], recurrence: &Recurrence) -> Result<Option<Recurrent>, OpError> {
        let Dims { time, heads, .. } = self.dims(&inputs[0])?;
        let cache = TensorType::f32([recurrence.slots, recurrence.capacity, inputs[0].cols()]);
        let form = Continuation {
            op: self,
            recurrence,
            inputs: 3,
            time,
            results: vec![inputs[0].clone()],
            states: vec![("keys", cache.clone()), ("values", cache)],
            limit: Some(recurrence.capacity),
            cache: true,
        };
        Ok(Some(form.on(
            move |[q, k, v], s, [y], [mut keys, mut values]| {
                for (cache, new) in [(&mut keys, s.of(*k)), (&mut values, s.of(*v))] {
                    (0..s.len).for_each(|t| cache.row(s.position + t).copy_from_slice(new.row(t)));
                }
                attention::extend(heads, s.position, s.of(*q), keys.as_rows(), values.as_rows(), y);
            },
            move |c, s| {
                let (given, caches) = ([c.input(0), c.input(1), c.input(2)], [c.output(1), c.output(2)]);
                dataflow_kernels::cuda::recurrent::attention(c, s, heads, given, caches, c.output(0))
            },
        )))
    }
    fn packed(&self, inputs: &[TensorType]) -> Result<Option<Arc<dyn Op>>, OpError> {
        let (dims, p, site) = (self.dims(&inputs[0])?, self.dropout.0 as f32, self.site);
        let form = Packing {
            op: Arc::new(self.clone()),
            inputs,
            activations: 3,
            parameters: 0,
            results: vec![inputs[0].clone()],
            kept: Some(dims.heads),
        };
        let mask = move |one: &One| (p > 0.0).then(|| Keep::new(one.seed, one.draw, site, p));
        Ok(Some(form.on_cpu(
            move |one, [q, k, v], [y, mut lse]| {
                let dims = Dims { batch: 1, time: one.len, ..dims };
                attention::forward(dims, Factors::Single, q, k, v, mask(&one), y, flat_mut(&mut lse));
            },
            move |one, [q, k, v], [y, lse], [dy, _], [dq, dk, dv]| {
                let dims = Dims { batch: 1, time: one.len, ..dims };
                attention::backward(dims, Factors::Single, q, k, v, mask(&one), y, flat(&lse), dy, dq, dk, dv);
            },
        )))
    }
    fn products(&self) -> bool {
        true
    }
    fn activations(&self, _: usize) -> Activations {
        Activations::new(0..3, [0])
    }
    fn strided(&self) -> bool {
        true
    }
    fn uses_step(&self) -> bool {
        self.dropout.0 > 0.0
    }
    fn placed(&self, path: &str) -> Option<Arc<dyn Op>> {
        Some(Arc::new(Self { site: site_of(path), ..self.clone() }))
    }
    fn evaluation(&self) -> Option<Arc<dyn Op>> {
        // a wrong probability stays, to be reported in evaluation too
        check_probability(self.dropout.0).ok()?;
        Some(Arc::new(Self { dropout: Real(0.0), ..self.clone() }))
    }
    fn cost(&self, node: &NodeView<'_>) -> Cost {
        self.work(node, 2.0)
    }
}

/// (q, k, v, y, lse, dy) to (dq, dk, dv).
#[derive(Clone, Debug)]
struct CausalAttentionGradient(CausalAttention);

impl Op for CausalAttentionGradient {
    fn arity(&self) -> RangeInclusive<usize> {
        6..=6
    }
    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, OpError> {
        Ok(inputs[..3].to_vec())
    }
    fn lower(&self, node: &NodeView<'_>, target: Target) -> Result<Kernel, OpError> {
        let op = &self.0;
        let (dims, p, seed, site) = (op.dims(&node.inputs[0])?, op.dropout.0 as f32, node.seed, op.site);
        let factors = Factors::rounded(node.precision == Precision::Bf16);
        match target {
            Target::Cuda => Ok(Kernel::cuda(move |c| {
                let dropout = (p > 0.0).then(|| cuda::Dropout { seed, site, p, step: c.input(6) });
                let (q, k, v, y, lse, dy) = (c.input(0), c.input(1), c.input(2), c.input(3), c.input(4), c.input(5));
                let (dq, dk, dv) = (c.output(0), c.output(1), c.output(2));
                cuda::backward(c, dims, q, k, v, dropout, y, lse, dy, dq, dk, dv)
            })),
            Target::Cpu => Ok(Kernel::cpu(move |a| {
                let mask = CausalAttention::mask(p, seed, site, a, 6);
                let (dq, dk, dv) = (a.rows_mut(0), a.rows_mut(1), a.rows_mut(2));
                let (q, k, v, y, dy) = (a.rows(0), a.rows(1), a.rows(2), a.rows(3), a.rows(5));
                attention::backward(dims, factors, q, k, v, mask, y, a.slice(4), dy, dq, dk, dv);
                Ok(())
            })),
        }
    }
    fn products(&self) -> bool {
        true
    }
    fn activations(&self, _: usize) -> Activations {
        Activations::new([0, 1, 2, 3, 5], 0..3)
    }
    fn strided(&self) -> bool {
        true
    }
    fn uses_step(&self) -> bool {
        self.0.uses_step()
    }
    fn cost(&self, node: &NodeView<'_>) -> Cost {
        self.0.work(node, 5.0)
    }
}

pub(crate) fn register(registry: &mut Registry) {
    registry.op::<CausalAttention>(Info {
        name: "CausalAttention",
        about: "Softmax attention to the present and the past, without storing the T x T probabilities.",
        inputs: &["q [B, T, heads D]", "k", "v"],
        formula: "sum over j <= i of softmax_j(D^-1/2 q_i . k_j) v_j",
        source: "arXiv:2205.14135",
        example: "(heads: 4)",
    });
}
