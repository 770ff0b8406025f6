//! Packed forms of sequence ops, for batches whose rows hold several documents: what they share.

use std::fmt;
use std::ops::RangeInclusive;
use std::sync::Arc;

use dataflow_graph::gradient::Gradient;
use dataflow_graph::op::{Cost, NodeView, Op, OpError};
use dataflow_graph::types::TensorType;
use dataflow_kernels::cpu::documents::{Document, Documents};
use dataflow_kernels::device::{Arguments, Kernel, KernelError, Target};
use dataflow_kernels::{Rows, RowsMut};

use crate::sequence::sizes;

/// One document of a launch.
pub(crate) struct One {
    /// Number of its tokens.
    pub len: usize,
    /// The seed of the run, of which random masks are drawn.
    pub seed: u64,
    /// What tells the masks of this document and step from others.
    pub draw: u64,
}

/// What a packed form is made of, besides its kernels.
pub(crate) struct Packing<'a> {
    /// The op.
    pub op: Arc<dyn Op>,
    /// Types of its data inputs.
    pub inputs: &'a [TensorType],
    /// How many of the first inputs are activations. The other ones, and the parameters behind them, are the same for all
    /// documents.
    pub activations: usize,
    /// Number of parameters.
    pub parameters: usize,
    /// Types of the results, `[B, T, C]`.
    pub results: Vec<TensorType>,
    /// How many numbers of each token are kept for the backward pass, if any. They are one more result, of which each
    /// document has a matrix without gaps.
    pub kept: Option<usize>,
}

type Run = dyn Fn(&Arguments<'_>, usize, u64) -> Result<(), KernelError> + Send + Sync;

/// An op whose kernels run once for each document. Its inputs are those of the op, then `positions`, then the step counter
/// if it uses it.
#[derive(Clone)]
struct Packed {
    op: Arc<dyn Op>,
    inputs: usize,
    /// Types of the results, and of what is kept.
    outputs: Vec<TensorType>,
    /// How many of them are results.
    results: usize,
    forward: Arc<Run>,
    backward: Arc<Run>,
}

/// (inputs, positions, outputs, gradients of the results) to the gradients of the inputs.
#[derive(Clone, Debug)]
struct PackedGradient(Packed);

impl Packing<'_> {
    /// The form. `forward` is run for each document with its rows of the activations, the other inputs, and its rows of the
    /// results; `backward` with these, the gradients of the results, and those of the inputs, which it writes. There may be
    /// fewer than `I` inputs or `R` results: such have no rows.
    pub fn on_cpu<const I: usize, const R: usize>(
        self,
        forward: impl Fn(One, [Rows<'_>; I], [RowsMut<'_>; R]) + Send + Sync + 'static,
        backward: impl Fn(One, [Rows<'_>; I], [Rows<'_>; R], [Rows<'_>; R], [RowsMut<'_>; I]) + Send + Sync + 'static,
    ) -> Arc<dyn Op> {
        let (inputs, activations) = (self.inputs.len() + self.parameters, self.activations);
        let (results, draws, mut outputs) = (self.results.len(), self.op.uses_step(), self.results);
        outputs.extend(self.kept.map(|kept| outputs[0].with_cols(kept)));
        let count = outputs.len();
        assert!(inputs <= I && count <= R && activations <= inputs, "a kernel for other inputs or results");
        // the step counter is the last input
        let step = move |a: &Arguments<'_>| if draws { a.slice::<i32>(a.inputs() - 1)[0] as u32 } else { 0 };
        let one = move |seed: u64, step: u32, document: Document| {
            let draw = u64::from(step) | (document.first as u64) << 32;
            One { len: document.len, seed, draw }
        };
        let forward = move |a: &Arguments<'_>, time: usize, seed: u64| {
            let (given, step) = (rows::<I>(a, 0, inputs), step(a));
            let documents = Documents { time, positions: a.slice(inputs) };
            documents.run(rows_mut::<R>(a, count), R, |document, results| {
                forward(one(seed, step, document), of(document, &given, activations), results);
            })
        };
        let backward = move |a: &Arguments<'_>, time: usize, seed: u64| {
            let (given, step) = (rows::<I>(a, 0, inputs), step(a));
            let outputs = rows::<R>(a, inputs + 1, count);
            let gradients = rows::<R>(a, inputs + 1 + count, results);
            let documents = Documents { time, positions: a.slice(inputs) };
            documents.run(rows_mut::<I>(a, inputs), activations, |document, made| {
                let [outputs, gradients] =
                    [&outputs, &gradients].map(|all| all.map(|x| if x.rows() == 0 { x } else { document.of(x) }));
                backward(one(seed, step, document), of(document, &given, activations), outputs, gradients, made);
            })
        };
        Arc::new(Packed {
            op: self.op,
            inputs,
            outputs,
            results,
            forward: Arc::new(forward),
            backward: Arc::new(backward),
        })
    }
}

/// What a kernel gets of the inputs for a document: its rows of the activations, the others whole.
fn of<'a, const N: usize>(document: Document, inputs: &[Rows<'a>; N], activations: usize) -> [Rows<'a>; N] {
    std::array::from_fn(|i| if i < activations { document.of(inputs[i]) } else { inputs[i] })
}

/// `count` inputs from `first` on.
fn rows<'a, const N: usize>(a: &Arguments<'a>, first: usize, count: usize) -> [Rows<'a>; N] {
    std::array::from_fn(|i| if i < count { a.rows(first + i) } else { Rows::contiguous(&[], 1) })
}

/// The first `count` outputs.
fn rows_mut<'a, const N: usize>(a: &Arguments<'a>, count: usize) -> [RowsMut<'a>; N] {
    std::array::from_fn(|o| if o < count { a.rows_mut(o) } else { RowsMut::contiguous(&mut [], 1) })
}

/// The kernel for the processor, whose rows are those of the first output.
fn lower(run: &Arc<Run>, node: &NodeView<'_>, target: Target) -> Result<Kernel, OpError> {
    if target == Target::Cuda {
        return Err("packed batches are for the processor so far: use `--device cpu`, or the batches `Sequential`, \
                    which let the model see the documents before"
            .into());
    }
    let (run, seed, (_, time, _)) = (run.clone(), node.seed, sizes(&node.outputs[0])?);
    Ok(Kernel::cpu(move |a| run(a, time, seed)))
}

impl fmt::Debug for Packed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Packed({:?})", self.op)
    }
}

impl Op for Packed {
    fn arity(&self) -> RangeInclusive<usize> {
        self.inputs + 1..=self.inputs + 1
    }
    fn infer(&self, _: &[TensorType]) -> Result<Vec<TensorType>, OpError> {
        Ok(self.outputs.clone())
    }
    fn gradient(&self, g: &mut Gradient<'_>) -> Result<(), OpError> {
        let mut inputs = g.all_inputs()[..=self.inputs].to_vec();
        inputs.extend((0..self.outputs.len()).map(|o| g.output(o)));
        for o in 0..self.results {
            inputs.push(g.output_gradient_or_zeros(o)?);
        }
        let made = g.emit(PackedGradient(self.clone()), &inputs)?;
        (0..self.inputs).try_for_each(|i| g.set(i, made[i]))
    }
    fn lower(&self, node: &NodeView<'_>, target: Target) -> Result<Kernel, OpError> {
        lower(&self.forward, node, target)
    }
    fn strided(&self) -> bool {
        true
    }
    fn uses_step(&self) -> bool {
        self.op.uses_step()
    }
    fn cost(&self, node: &NodeView<'_>) -> Cost {
        // no more than that: documents are shorter than rows
        self.op.cost(node)
    }
}

impl Op for PackedGradient {
    fn arity(&self) -> RangeInclusive<usize> {
        let n = self.0.inputs + 1 + self.0.outputs.len() + self.0.results;
        n..=n
    }
    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, OpError> {
        Ok(inputs[..self.0.inputs].to_vec())
    }
    fn lower(&self, node: &NodeView<'_>, target: Target) -> Result<Kernel, OpError> {
        lower(&self.0.backward, node, target)
    }
    fn strided(&self) -> bool {
        true
    }
    fn uses_step(&self) -> bool {
        self.0.op.uses_step()
    }
    fn cost(&self, node: &NodeView<'_>) -> Cost {
        // the forward pass is run again where it keeps nothing
        let Cost { flops, bytes } = self.0.op.cost(node);
        Cost { flops: 3.5 * flops, bytes }
    }
}
