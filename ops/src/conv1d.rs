//! Causal depthwise convolution over time.

use std::ops::RangeInclusive;
use std::sync::Arc;

use dataflow_graph::builtin::Elementwise;
use dataflow_graph::components::Recurrence;
use dataflow_graph::format::number::{Flag, Real, Size};
use dataflow_graph::gradient::Gradient;
use dataflow_graph::initializer::Initializer;
use dataflow_graph::op::{Activations, Cost, NodeView, Op, OpError, Parameter, Recurrent};
use dataflow_graph::registry::{Info, Registry};
use dataflow_graph::systems::compound::Decomposition;
use dataflow_graph::types::TensorType;
use dataflow_kernels::Rows;
use dataflow_kernels::cpu::conv1d::{self, Conv, MAX_TAPS};
use dataflow_kernels::cpu::threads::with_scratch;
use dataflow_kernels::cuda::conv1d as cuda;
use dataflow_kernels::device::{Kernel, Target};
use serde::{Deserialize, Serialize};

use crate::elementwise::Activation;
use crate::packed::Packing;
use crate::recurrent::{Continuation, flat, flat_mut};
use crate::sequence::sizes;

fn yes() -> Flag {
    Flag(true)
}

/// `y_t = activation(b + sum over j of w_j x_(t - width + 1 + j))` in each channel; x, y `[B, T, D]`,
/// w `[D, 1, width]`, b `[D]`. Initialised as PyTorch's `Conv1d`: uniform on `±width^-1/2`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CausalConv1d {
    width: Size,
    #[serde(default = "yes")]
    bias: Flag,
    /// `Identity` or `Silu`.
    #[serde(default)]
    activation: Activation,
    #[serde(default)]
    init: Option<Initializer>,
    #[serde(default)]
    bias_init: Option<Initializer>,
}

impl Op for CausalConv1d {
    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, OpError> {
        sizes(&inputs[0])?;
        if !(1..=MAX_TAPS).contains(&*self.width) {
            return Err(format!("the width {} is not between 1 and {MAX_TAPS}", self.width).into());
        }
        if !matches!(self.activation, Activation::Identity | Activation::Silu) {
            return Err("the activation must be Identity or Silu; use a row of its own for others".into());
        }
        Ok(vec![inputs[0].clone()])
    }
    fn parameters(&self, inputs: &[TensorType]) -> Result<Vec<Parameter>, OpError> {
        let (width, channels) = (*self.width, inputs[0].cols());
        let default = Initializer::Uniform { bound: Real((width as f64).powf(-0.5)) };
        let init = self.init.clone().unwrap_or(default.clone());
        let mut parameters = vec![Parameter::new("weight", [channels, 1, width], init)];
        if *self.bias {
            parameters.push(Parameter::new("bias", [channels], self.bias_init.clone().unwrap_or(default)));
        }
        Ok(parameters)
    }
    fn gradient(&self, g: &mut Gradient<'_>) -> Result<(), OpError> {
        let Some(dy) = g.output_gradient(0) else { return Ok(()) };
        let mut inputs = vec![dy];
        inputs.extend(g.all_inputs());
        let made = g.emit(CausalConv1dGradient(self.clone()), &inputs)?;
        (0..g.inputs()).try_for_each(|i| g.set(i, made[i]))
    }
    fn decompose(&self, d: &mut Decomposition<'_>) -> Result<bool, OpError> {
        if self.activation == Activation::Identity {
            return Ok(false);
        }
        let inputs = d.inputs().to_vec();
        let sums = d.emit(Self { activation: Activation::Identity, ..self.clone() }, &inputs)?;
        let y = d.emit(Elementwise::of(1, |b, x| self.activation.write(b, x[0])), &[sums])?;
        d.set(0, y);
        Ok(true)
    }
    fn lower(&self, node: &NodeView<'_>, target: Target) -> Result<Kernel, OpError> {
        let (_, time, _) = sizes(&node.inputs[0])?;
        let (bias, silu) = (*self.bias, self.activation == Activation::Silu);
        match target {
            Target::Cuda => Ok(Kernel::cuda(move |c| {
                let conv = cuda::Conv { weight: c.input(1), bias: bias.then(|| c.input(2)), silu };
                cuda::forward(c, conv, c.input(0), time, c.output(0))
            })),
            Target::Cpu => Ok(Kernel::cpu(move |a| {
                let conv = Conv { weight: a.slice(1), bias: bias.then(|| a.slice(2)), silu };
                conv1d::forward(conv, a.rows(0), time, None, a.rows_mut(0), None);
                Ok(())
            })),
        }
    }
    fn recurrent(&self, inputs: &[TensorType], recurrence: &Recurrence) -> Result<Option<Recurrent>, OpError> {
        let ((_, time, channels), width) = (sizes(&inputs[0])?, *self.width);
        let (bias, silu) = (*self.bias, self.activation == Activation::Silu);
        let form = Continuation {
            op: self,
            recurrence,
            inputs: 2 + usize::from(bias),
            time,
            results: vec![inputs[0].clone()],
            states: vec![("window", TensorType::f32([recurrence.slots, width - 1, channels]))],
            limit: None,
            cache: false,
        };
        Ok(Some(form.on(
            move |[x, weight, b], s, [y], [mut window]| {
                let conv = Conv { weight: flat(weight), bias: bias.then(|| flat(b)), silu };
                // the kernel reads the old window while it writes the new one
                with_scratch((width - 1) * channels, |old| {
                    old.copy_from_slice(flat_mut(&mut window));
                    conv1d::forward(conv, s.of(*x), s.len, Some(Rows::contiguous(old, channels)), y, Some(window));
                });
            },
            move |c, s| {
                let conv = cuda::Conv { weight: c.input(1), bias: bias.then(|| c.input(2)), silu };
                let (x, y, window) = (c.input(0), c.output(0), c.output(1));
                dataflow_kernels::cuda::recurrent::conv1d(c, s, conv, x, window, y)
            },
        )))
    }
    fn packed(&self, inputs: &[TensorType]) -> Result<Option<Arc<dyn Op>>, OpError> {
        let (bias, silu) = (*self.bias, self.activation == Activation::Silu);
        let form = Packing {
            op: Arc::new(self.clone()),
            inputs,
            activations: 1,
            parameters: 1 + usize::from(bias),
            results: vec![inputs[0].clone()],
            kept: None,
        };
        Ok(Some(form.on_cpu(
            move |one, [x, weight, b], [y]| {
                let conv = Conv { weight: flat(&weight), bias: bias.then(|| flat(&b)), silu };
                conv1d::forward(conv, x, one.len, None, y, None);
            },
            move |one, [x, weight, b], _, [dy], [dx, mut dweight, mut db]| {
                let conv = Conv { weight: flat(&weight), bias: bias.then(|| flat(&b)), silu };
                let (dweight, db) = (flat_mut(&mut dweight), bias.then(|| flat_mut(&mut db)));
                conv1d::backward(conv, x, one.len, None, dy, dx, dweight, db);
            },
        )))
    }
    fn activations(&self, _: usize) -> Activations {
        Activations::new([0], [0])
    }
    fn strided(&self) -> bool {
        true
    }
    fn cost(&self, node: &NodeView<'_>) -> Cost {
        Cost { flops: 2.0 * *self.width as f64 * node.outputs[0].elements() as f64, bytes: node.bytes() }
    }
}

/// (dy, x, weight, bias?) to (dx, dweight, dbias?).
#[derive(Clone, Debug)]
struct CausalConv1dGradient(CausalConv1d);

impl Op for CausalConv1dGradient {
    fn arity(&self) -> RangeInclusive<usize> {
        3..=4
    }
    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, OpError> {
        Ok(inputs[1..].to_vec())
    }
    fn lower(&self, node: &NodeView<'_>, target: Target) -> Result<Kernel, OpError> {
        let (_, time, _) = sizes(&node.inputs[1])?;
        let (bias, silu) = (*self.0.bias, self.0.activation == Activation::Silu);
        match target {
            Target::Cuda => Ok(Kernel::cuda(move |c| {
                let conv = cuda::Conv { weight: c.input(2), bias: bias.then(|| c.input(3)), silu };
                let dbias = bias.then(|| c.output(2));
                cuda::backward(c, conv, c.input(1), time, c.input(0), c.output(0), c.output(1), dbias)
            })),
            Target::Cpu => Ok(Kernel::cpu(move |a| {
                let conv = Conv { weight: a.slice(2), bias: bias.then(|| a.slice(3)), silu };
                let dbias = bias.then(|| a.slice_mut(2));
                conv1d::backward(conv, a.rows(1), time, None, a.rows(0), a.rows_mut(0), a.slice_mut(1), dbias);
                Ok(())
            })),
        }
    }
    fn activations(&self, _: usize) -> Activations {
        Activations::new([0, 1], [0])
    }
    fn strided(&self) -> bool {
        true
    }
    fn cost(&self, node: &NodeView<'_>) -> Cost {
        Cost { flops: 6.0 * *self.0.width as f64 * node.outputs[0].elements() as f64, bytes: node.bytes() }
    }
}

pub(crate) fn register(registry: &mut Registry) {
    registry.op::<CausalConv1d>(Info {
        name: "CausalConv1d",
        about: "A short convolution over time in every channel, looking back only.",
        inputs: &["x [B, T, D]"],
        formula: "activation(b + sum over j of w_j x_(t - width + 1 + j))",
        source: "arXiv:2312.00752",
        example: "(width: 4)",
    });
}
