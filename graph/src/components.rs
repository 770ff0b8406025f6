//! The components and resources that the systems share. A component that only one system knows lives there.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

pub use dataflow_kernels::device::Target;

use crate::diagnostic::Span;
use crate::op::{Op, Parameter};
use crate::optimizer::Optimizer;
use crate::types::DType;
use crate::world::ValueId;

/// Of nodes: the path of row names. Of values: what people call it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Name(pub String);

/// Of nodes, and of parameter values: where the row stands.
#[derive(Clone, Debug)]
pub struct Place(pub Span);

/// Of nodes: what it does.
#[derive(Clone, Debug)]
pub struct OpRef(pub Arc<dyn Op>);

/// Of values: what it is for. Values of nodes are `Activation` until `differentiate` makes gradients.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Written by the host before a run.
    Input,
    /// Trained.
    Parameter,
    /// Kept from step to step: optimizer moments, counters.
    State,
    /// Made and used within a step.
    Activation,
    /// Likewise, in the backward pass.
    Gradient,
}

/// Of parameter values: full name, shape and initialiser. `Parameter::name` is the full path here.
#[derive(Clone, Debug)]
pub struct ParameterOf(pub Parameter);

/// Of parameter values: whether weight decay applies. The rule of nanoGPT: two dimensions or more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Decays(pub bool);

/// Of parameter values: their gradient.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GradientOf(pub ValueId);

/// Of nodes: when they run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Phase {
    /// Once for every micro-batch.
    Step,
    /// Once for every update, after the micro-batches.
    Update,
}

/// Resource: what is compiled, and for what.
#[derive(Clone)]
pub struct Options {
    /// Sequences in a micro-batch.
    pub batch: usize,
    /// Tokens in a sequence.
    pub block: usize,
    /// Micro-batches in an update.
    pub micro_batches: usize,
    /// For random masks.
    pub seed: u64,
    /// Whether the model is trained: backward pass, update, dropout.
    pub training: bool,
    /// For generation: every op that looks back continues a state. See [`Recurrence`].
    pub recurrent: Option<Recurrence>,
    /// The kind of device that it is for.
    pub target: Target,
    /// Whether a row holds several documents, one behind the other, and ops that look back start anew at each. The program
    /// has one more input, `positions`, `i32[batch, block]`: how many tokens of its document are before each token in its
    /// row, 0 where a document starts.
    pub packed: bool,
}

impl Options {
    /// A program that evaluates a batch of independent rows on the processor, without random masks.
    pub fn new(batch: usize, block: usize) -> Self {
        let target = Target::Cpu;
        Self { batch, block, micro_batches: 1, seed: 0, training: false, recurrent: None, target, packed: false }
    }
}

/// Resource: the most bytes that activations and gradients may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryBudget(pub usize);

/// Resource: the precision that training wants. Of nodes: the one in which its matrix products take their factors;
/// without it, `f32`. Sums are in `f32` always, and so are parameters, statistics and states.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Precision {
    /// Single precision throughout.
    #[default]
    F32,
    /// Factors of matrix products in `bf16`, with those of attention and retention.
    Bf16,
}

impl fmt::Display for Precision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
        })
    }
}

/// A program that takes sequences piece by piece. It has three more inputs, `i32[batch]`: `slots`, where the states of the
/// sequences lie in a pool; `positions`, the tokens that each had before (at 0 its state counts as empty); `lengths`, how
/// many of `block` tokens of each count, 0 for a sequence that rests. With a `block` of 1 it decodes, with a longer one it
/// takes in prompts; programs of equal slots and capacity can share a pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Recurrence {
    /// Sequences that the pool has room for.
    pub slots: usize,
    /// Tokens of a sequence that a state which grows with the context has room for.
    pub capacity: usize,
    /// Whether the logits are wanted, or the states alone.
    pub logits: bool,
    /// The element type of the large parameters: `f32` or `bf16`.
    pub weights: DType,
}

/// Resource: the most tokens that a sequence can have in a recurrent program, where there is such a limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TokenLimit(pub Option<usize>);

/// Resource: the loss and other figures, each an op of (logits, targets) with a name. The first is the loss.
#[derive(Clone, Default)]
pub struct Objectives(pub Vec<(String, Arc<dyn Op>)>);

/// Resource: what updates the parameters.
#[derive(Clone)]
pub struct OptimizerRef(pub Arc<dyn Optimizer>);

/// Resource: values that the host writes, by name: `tokens`, `targets`.
#[derive(Clone, Debug, Default)]
pub struct Inputs(pub BTreeMap<String, ValueId>);

/// Resource: values that the host reads, by name: `logits`, `loss`, `grad_norm`.
#[derive(Clone, Debug, Default)]
pub struct Outputs(pub BTreeMap<String, ValueId>);

/// Resource: state values by name: `step`, `weight.m`.
#[derive(Clone, Debug, Default)]
pub struct States(pub BTreeMap<String, ValueId>);

/// Resource: all parameters, in the order of the model file.
#[derive(Clone, Debug, Default)]
pub struct Parameters(pub Vec<ValueId>);
