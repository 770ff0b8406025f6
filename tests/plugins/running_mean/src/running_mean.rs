//! An op with a shape rule, a gradient and a kernel of its own.

use dataflow::graph::gradient::Gradient;
use dataflow::graph::op::{Cost, NodeView, Op, OpError};
use dataflow::graph::types::{DType, TensorType};
use dataflow::kernels::cpu::threads::with_scratch;
use dataflow::kernels::device::{Kernel, Target};
use dataflow::kernels::{Rows, RowsMut};
use serde::{Deserialize, Serialize};

/// `y_t = (x_0 + … + x_t) / (t + 1)` in every channel; x, y `[B, T, C]`. It looks back only, so a model that
/// mixes time steps by it alone is causal.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RunningMean {}

/// B, T and C, or what is wrong. The compiler adds the row, the line, and the shapes of all inputs.
fn sizes(x: &TensorType) -> Result<[usize; 3], OpError> {
    match (&x.shape[..], x.dtype) {
        (&[batch, time, channels], DType::F32) => Ok([batch, time, channels]),
        _ => Err(format!("expected f32[B, T, C], found {x}").into()),
    }
}

impl Op for RunningMean {
    /// The types of the outputs from those of the inputs. An op takes one input unless it says otherwise by `arity`;
    /// trained tensors would come from `parameters`, and become further inputs.
    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, OpError> {
        sizes(&inputs[0])?;
        Ok(vec![inputs[0].clone()])
    }

    /// The backward pass is ordinary graph: emit the op that computes the gradient, and say which input it belongs to.
    /// What the forward pass has computed can be used too: `g.input(i)`, `g.output(o)`; here it is not needed.
    fn gradient(&self, g: &mut Gradient<'_>) -> Result<(), OpError> {
        let dy = g.output_gradient_or_zeros(0)?;
        let dx = g.emit(RunningMeanGradient, &[dy])?[0];
        g.set(0, dx)
    }

    /// The code that runs. What does not change from step to step is computed here, once.
    fn lower(&self, node: &NodeView<'_>, target: Target) -> Result<Kernel, OpError> {
        let [_, time, _] = sizes(&node.inputs[0])?;
        match target {
            Target::Cuda => Err(OpError::no_kernel(target)),
            Target::Cpu => Ok(Kernel::cpu(move |arguments| {
                forward(arguments.rows(0), time, arguments.rows_mut(0));
                Ok(())
            })),
        }
    }

    /// The kernel below goes through `row`, which knows of gaps between rows.
    fn strided(&self) -> bool {
        true
    }

    /// For `dataflow plan`: an addition and a product for each element.
    fn cost(&self, node: &NodeView<'_>) -> Cost {
        Cost { flops: 2.0 * node.outputs[0].elements() as f64, bytes: node.bytes() }
    }
}

/// dy to dx, `dx_t = dy_t / (t + 1) + … + dy_(T-1) / T`. It is not registered: no row can name it, only the gradient
/// above makes it. Having no gradient itself is right: nothing is differentiated twice.
#[derive(Debug)]
struct RunningMeanGradient;

impl Op for RunningMeanGradient {
    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, OpError> {
        sizes(&inputs[0])?;
        Ok(vec![inputs[0].clone()])
    }

    fn lower(&self, node: &NodeView<'_>, target: Target) -> Result<Kernel, OpError> {
        let [_, time, _] = sizes(&node.inputs[0])?;
        match target {
            Target::Cuda => Err(OpError::no_kernel(target)),
            Target::Cpu => Ok(Kernel::cpu(move |arguments| {
                backward(arguments.rows(0), time, arguments.rows_mut(0));
                Ok(())
            })),
        }
    }

    fn strided(&self) -> bool {
        true
    }

    fn cost(&self, node: &NodeView<'_>) -> Cost {
        Cost { flops: 2.0 * node.outputs[0].elements() as f64, bytes: node.bytes() }
    }
}

/// A kernel sees a tensor as a matrix: `[B, T, C]` has `B T` rows of `C` columns. Each sequence is a task of its own, so
/// the threads share the work, and the result does not depend on how many there are.
fn forward(x: Rows<'_>, time: usize, mut y: RowsMut<'_>) {
    y.for_each_block(time, |sequence, mut y| {
        // scratch memory is kept from step to step: a kernel must not allocate
        with_scratch(x.cols(), |sum| {
            sum.fill(0.0);
            for t in 0..time {
                let factor = 1.0 / (t + 1) as f32;
                for ((sum, x), y) in sum.iter_mut().zip(x.row(sequence * time + t)).zip(y.row(t)) {
                    *sum += x;
                    *y = factor * *sum;
                }
            }
        });
    });
}

/// The same from the last step to the first.
fn backward(dy: Rows<'_>, time: usize, mut dx: RowsMut<'_>) {
    dx.for_each_block(time, |sequence, mut dx| {
        with_scratch(dy.cols(), |sum| {
            sum.fill(0.0);
            for t in (0..time).rev() {
                let factor = 1.0 / (t + 1) as f32;
                for ((sum, dy), dx) in sum.iter_mut().zip(dy.row(sequence * time + t)).zip(dx.row(t)) {
                    *sum += factor * dy;
                    *dx = *sum;
                }
            }
        });
    });
}
