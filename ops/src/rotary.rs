//! Rotary position embedding, in LLaMA's and RetNet's forms.

use std::sync::Arc;

use dataflow_graph::components::Recurrence;
use dataflow_graph::format::number::{Real, Size};
use dataflow_graph::gradient::Gradient;
use dataflow_graph::op::{Activations, Cost, NodeView, Op, OpError, Recurrent};
use dataflow_graph::registry::{Info, Registry};
use dataflow_graph::types::TensorType;
use dataflow_kernels::cpu::rotary::{self, Direction, Rotation, rotate, rotate_in_place};
use dataflow_kernels::cpu::threads::with_scratch;
use dataflow_kernels::cuda;
use dataflow_kernels::device::{Kernel, Target};
use dataflow_kernels::{Rows, RowsMut};
use serde::{Deserialize, Serialize};

use crate::packed::Packing;
use crate::recurrent::Continuation;
use crate::sequence::{head_dim, sizes};

/// Which channels of a head turn together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Pairing {
    /// Channel i with i + D/2, frequency `base^(-2i/D)`: LLaMA.
    #[default]
    Half,
    /// Channel 2i with 2i + 1, exponents from 0 to 1 inclusive: RetNet's theta shift.
    Interleaved,
}

fn base() -> Real {
    Real(10000.0)
}

fn unit() -> Real {
    Real(1.0)
}

/// Turns pairs of channels of every head by angles proportional to the position (arXiv:2104.09864), and
/// multiplies by `scale`. x, y `[B, T, heads D]`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rotary {
    heads: Size,
    #[serde(default)]
    pairing: Pairing,
    #[serde(default = "base")]
    base: Real,
    #[serde(default = "unit")]
    scale: Real,
    /// Turn back: the gradient.
    #[serde(skip)]
    backward: bool,
}

impl Rotary {
    /// How channels pair up, and the channels of a head.
    fn heads(&self, x: &TensorType) -> Result<(rotary::Pairing, usize), OpError> {
        let pairing = match self.pairing {
            Pairing::Half => rotary::Pairing::Half,
            Pairing::Interleaved => rotary::Pairing::Interleaved,
        };
        Ok((pairing, head_dim(sizes(x)?.2, *self.heads)?))
    }

    /// Cosines and sines of the first `time` positions.
    fn angles(&self, pairing: rotary::Pairing, dim: usize, time: usize) -> (Vec<f32>, Vec<f32>) {
        let (mut cos, mut sin) = (vec![0.0; time * dim / 2], vec![0.0; time * dim / 2]);
        rotary::angles(pairing, self.base.0, dim, 0, &mut cos, &mut sin);
        (cos, sin)
    }
}

impl Op for Rotary {
    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, OpError> {
        let (_, _, cols) = sizes(&inputs[0])?;
        let dim = head_dim(cols, *self.heads)?;
        if !dim.is_multiple_of(2) {
            return Err(format!("heads of {dim} channels have no pairs").into());
        }
        Ok(vec![inputs[0].clone()])
    }
    fn gradient(&self, g: &mut Gradient<'_>) -> Result<(), OpError> {
        let Some(dy) = g.output_gradient(0) else { return Ok(()) };
        let dx = g.emit(Self { backward: !self.backward, ..self.clone() }, &[dy])?[0];
        g.set(0, dx)
    }
    fn lower(&self, node: &NodeView<'_>, target: Target) -> Result<Kernel, OpError> {
        let (_, time, _) = sizes(&node.inputs[0])?;
        let (pairing, dim) = self.heads(&node.inputs[0])?;
        let direction = if self.backward { Direction::Backward } else { Direction::Forward };
        let scale = self.scale.0 as f32;
        match target {
            Target::Cuda => {
                let rotation = cuda::rotary::Rotation { pairing, base: self.base.0, head_dim: dim, scale };
                Ok(Kernel::cuda(move |c| {
                    cuda::rotary::rotate(c, rotation, direction, time, None, c.input(0), c.output(0))
                }))
            }
            Target::Cpu => {
                let (cos, sin) = self.angles(pairing, dim, time);
                Ok(Kernel::cpu(move |a| {
                    let rotation = Rotation { pairing, head_dim: dim, cos: &cos, sin: &sin, scale };
                    match a.in_place(0) {
                        Some(_) => rotate_in_place(rotation, direction, a.rows_mut(0)),
                        None => rotate(rotation, direction, a.rows(0), a.rows_mut(0)),
                    }
                    Ok(())
                }))
            }
        }
    }
    fn in_place(&self) -> Vec<(usize, usize)> {
        vec![(0, 0)]
    }
    fn recurrent(&self, inputs: &[TensorType], recurrence: &Recurrence) -> Result<Option<Recurrent>, OpError> {
        let (pairing, dim) = self.heads(&inputs[0])?;
        let (base, scale, half) = (self.base.0, self.scale.0 as f32, dim / 2);
        let (_, time, _) = sizes(&inputs[0])?;
        let results = vec![inputs[0].clone()];
        let form =
            Continuation { op: self, recurrence, inputs: 1, time, results, states: vec![], limit: None, cache: false };
        Ok(Some(form.on(
            move |[x], s, [y], []| {
                with_scratch(2 * s.len * half, |angles| {
                    let (cos, sin) = angles.split_at_mut(s.len * half);
                    rotary::angles(pairing, base, dim, s.position, cos, sin);
                    rotate(Rotation { pairing, head_dim: dim, cos, sin, scale }, Direction::Forward, s.of(*x), y);
                });
            },
            move |c, s| {
                let rotation = cuda::rotary::Rotation { pairing, base, head_dim: dim, scale };
                cuda::recurrent::rotary(c, s, rotation, c.input(0), c.output(0))
            },
        )))
    }
    fn packed(&self, inputs: &[TensorType]) -> Result<Option<Arc<dyn Op>>, OpError> {
        let (pairing, dim) = self.heads(&inputs[0])?;
        let (half, scale, (_, time, _)) = (dim / 2, self.scale.0 as f32, sizes(&inputs[0])?);
        let form = Packing {
            op: Arc::new(self.clone()),
            inputs,
            activations: 1,
            parameters: 0,
            results: vec![inputs[0].clone()],
            kept: None,
        };
        let (cos, sin) = self.angles(pairing, dim, time);
        let turn = move |direction, len: usize, x: Rows<'_>, y: RowsMut<'_>| {
            let (cos, sin) = (&cos[..len * half], &sin[..len * half]);
            rotate(Rotation { pairing, head_dim: dim, cos, sin, scale }, direction, x, y);
        };
        let back = turn.clone();
        Ok(Some(form.on_cpu(
            move |one, [x], [y]| turn(Direction::Forward, one.len, x, y),
            move |one, _, _, [dy], [dx]| back(Direction::Backward, one.len, dy, dx),
        )))
    }
    fn activations(&self, _: usize) -> Activations {
        Activations::new([0], [0])
    }
    fn strided(&self) -> bool {
        true
    }
    fn cost(&self, node: &NodeView<'_>) -> Cost {
        Cost { flops: 3.0 * node.outputs[0].elements() as f64, bytes: node.bytes() }
    }
}

pub(crate) fn register(registry: &mut Registry) {
    registry.op::<Rotary>(Info {
        name: "Rotary",
        about: "Rotary position embedding: turns pairs of channels by an angle proportional to the position.",
        inputs: &["x [B, T, heads D]"],
        formula: "(a cos - b sin, b cos + a sin) scale, angle t base^(-2i/D)",
        source: "arXiv:2104.09864; Interleaved: arXiv:2307.08621",
        example: "(heads: 4)",
    });
}
