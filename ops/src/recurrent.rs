//! Recurrent forms of sequence ops: what they share.

use std::fmt;
use std::ops::RangeInclusive;
use std::sync::Arc;

use dataflow_graph::components::Recurrence;
use dataflow_graph::op::{Cost, NodeView, Op, OpError, Recurrent};
use dataflow_graph::types::TensorType;
use dataflow_kernels::cpu::sequences::{Sequence, Sequences};
use dataflow_kernels::cuda::recurrent as cuda;
use dataflow_kernels::device::{Arguments, Calls, DType, Kernel, KernelError, Target};
use dataflow_kernels::{Rows, RowsMut};

type Describe = dyn Fn(&mut Calls<'_>, &cuda::Sequences) -> Result<(), KernelError> + Send + Sync;

type Run = dyn Fn(&Arguments<'_>, Sequences<'_>) -> Result<(), KernelError> + Send + Sync;

/// An op of `inputs` inputs, then its states, then what tells about the sequences; its outputs are the results and then
/// the states, which it updates.
#[derive(Clone)]
struct Continuing {
    /// The op and its attributes.
    op: String,
    inputs: usize,
    results: Vec<TensorType>,
    states: usize,
    time: usize,
    slots: usize,
    limit: Option<usize>,
    cpu: Arc<Run>,
    cuda: Arc<Describe>,
}

impl fmt::Debug for Continuing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Continuing({})", self.op)
    }
}

impl Op for Continuing {
    fn arity(&self) -> RangeInclusive<usize> {
        let n = self.inputs + self.states + 3;
        n..=n
    }
    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, OpError> {
        Ok(self.results.iter().chain(&inputs[self.inputs..self.inputs + self.states]).cloned().collect())
    }
    fn lower(&self, _: &NodeView<'_>, target: Target) -> Result<Kernel, OpError> {
        let (run, time, first) = (self.cpu.clone(), self.time, self.inputs + self.states);
        match target {
            Target::Cuda => {
                let (describe, pool, limit) = (self.cuda.clone(), self.slots, self.limit);
                Ok(Kernel::cuda(move |c| {
                    let [slots, positions, lengths] = [0, 1, 2].map(|i| c.input(first + i));
                    describe(c, &cuda::Sequences { slots, positions, lengths, time, pool, limit })
                }))
            }
            Target::Cpu => Ok(Kernel::cpu(move |a| {
                let [slots, positions, lengths] = [0, 1, 2].map(|i| a.slice(first + i));
                run(a, Sequences { time, slots, positions, lengths })
            })),
        }
    }
    fn updates(&self) -> Vec<(usize, usize)> {
        (0..self.states).map(|i| (self.results.len() + i, self.inputs + i)).collect()
    }
    fn strided(&self) -> bool {
        true
    }
    fn cost(&self, node: &NodeView<'_>) -> Cost {
        let tensors = node.inputs[..self.inputs].iter().chain(&node.outputs[..self.results.len()]);
        Cost { flops: 0.0, bytes: tensors.map(|t| t.bytes() as f64).sum() }
    }
}

/// What a recurrent form is made of, besides its kernel.
pub(crate) struct Continuation<'a> {
    /// The op.
    pub op: &'a dyn Op,
    /// What it is made for.
    pub recurrence: &'a Recurrence,
    /// Number of inputs, parameters included.
    pub inputs: usize,
    /// Tokens of a sequence in the batch.
    pub time: usize,
    /// Types of the results.
    pub results: Vec<TensorType>,
    /// Name and type of each state.
    pub states: Vec<(&'static str, TensorType)>,
    /// The most tokens that a sequence can have.
    pub limit: Option<usize>,
    /// Whether states are caches: rows are written before they are read, so that nothing is to be cleared.
    pub cache: bool,
}

impl Continuation<'_> {
    /// The form, whose kernel for the processor is run for each sequence with the inputs, its tokens' rows of the results and
    /// its slot's rows of the states. There may be fewer than `I` inputs or `R` results, and tokens are not handed on: such
    /// have no rows. The one for a CUDA device has inputs, results and states in the same order, of all sequences.
    pub fn on<const I: usize, const R: usize, const S: usize>(
        self,
        task: impl Fn(&[Rows<'_>; I], Sequence, [RowsMut<'_>; R], [RowsMut<'_>; S]) + Send + Sync + 'static,
        describe: impl Fn(&mut Calls<'_>, &cuda::Sequences) -> Result<(), KernelError> + Send + Sync + 'static,
    ) -> Recurrent {
        let (inputs, results, states) = (self.inputs, self.results.len(), self.states.len());
        assert!(inputs <= I && results <= R && states == S, "a kernel for other inputs, results or states");
        let (limit, cache, slots) = (self.limit, self.cache, self.recurrence.slots);
        let cpu = move |a: &Arguments<'_>, sequences: Sequences<'_>| {
            let given: [Rows<'_>; I] = std::array::from_fn(|i| match i < inputs && a.input_dtype(i) == DType::F32 {
                true => a.rows(i),
                false => Rows::contiguous(&[], 1),
            });
            let rows: [RowsMut<'_>; R] =
                std::array::from_fn(|o| if o < results { a.rows_mut(o) } else { RowsMut::contiguous(&mut [], 1) });
            let states: [RowsMut<'_>; S] = std::array::from_fn(|i| a.rows_mut(results + i));
            sequences.run(slots, limit, cache, rows, states, |s, results, states| task(&given, s, results, states))
        };
        let op = Continuing {
            op: format!("{:?}", self.op),
            inputs,
            results: self.results,
            states,
            time: self.time,
            slots,
            limit,
            cpu: Arc::new(cpu),
            cuda: Arc::new(describe),
        };
        Recurrent { op: Arc::new(op), states: self.states, limit }
    }
}

/// A tensor without gaps between its rows: parameters and states.
pub(crate) fn flat<'a>(tensor: &Rows<'a>) -> &'a [f32] {
    tensor.as_slice().expect("parameters lie without gaps")
}

/// As [`flat`], for writing.
pub(crate) fn flat_mut<'a>(tensor: &'a mut RowsMut<'_>) -> &'a mut [f32] {
    tensor.as_slice_mut().expect("states lie without gaps")
}
