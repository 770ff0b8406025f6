//! One-token forms of sequence ops: what they share.

use std::fmt;
use std::ops::RangeInclusive;
use std::sync::Arc;

use dataflow_graph::op::{NodeView, Op, OpError, Recurrent};
use dataflow_graph::types::TensorType;
use dataflow_kernels::device::{Arguments, Kernel, KernelError, Target};

type Run = dyn Fn(&Arguments<'_>) -> Result<(), KernelError> + Send + Sync;

/// An op of `inputs` inputs and then its states; its outputs are the results and then the states, which it updates.
#[derive(Clone)]
struct OneToken {
    name: &'static str,
    inputs: usize,
    results: Vec<TensorType>,
    states: usize,
    cpu: Arc<Run>,
}

impl fmt::Debug for OneToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}OneToken", self.name)
    }
}

impl Op for OneToken {
    fn arity(&self) -> RangeInclusive<usize> {
        let n = self.inputs + self.states;
        n..=n
    }
    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, OpError> {
        Ok(self.results.iter().chain(&inputs[self.inputs..]).cloned().collect())
    }
    fn lower(&self, _: &NodeView<'_>, target: Target) -> Result<Kernel, OpError> {
        let run = self.cpu.clone();
        match target {
            Target::Cuda => Err(OpError::no_kernel(target)),
            Target::Cpu => Ok(Kernel::cpu(move |a| run(a))),
        }
    }
    fn updates(&self) -> Vec<(usize, usize)> {
        (0..self.states).map(|i| (self.results.len() + i, self.inputs + i)).collect()
    }
}

/// The one-token form of the op `name`: `inputs` counts its parameters too, and `cpu` finds the states behind the
/// results among its outputs.
pub(crate) fn one_token(
    name: &'static str,
    inputs: usize,
    results: Vec<TensorType>,
    states: Vec<(&'static str, TensorType)>,
    cpu: impl Fn(&Arguments<'_>) -> Result<(), KernelError> + Send + Sync + 'static,
) -> Recurrent {
    let op = OneToken { name, inputs, results, states: states.len(), cpu: Arc::new(cpu) };
    Recurrent { op: Arc::new(op), states }
}

/// A counter of tokens, `i32[1]`.
pub(crate) fn counter() -> (&'static str, TensorType) {
    ("position", TensorType::i32([1]))
}

/// The position of this token, counted on; an error past `capacity`.
pub(crate) fn next_position(a: &Arguments<'_>, output: usize, capacity: usize) -> Result<usize, KernelError> {
    let counter = &mut a.slice_mut::<i32>(output)[0];
    let position = *counter as usize;
    if position >= capacity {
        return Err(KernelError(format!("there is room for {capacity} tokens, and this is one more")));
    }
    *counter += 1;
    Ok(position)
}
