//! What an op is: a serde struct that knows its shapes, parameters, gradient and kernels.
//!
//! An elementwise op only gives an [`expression`](Op::expression): its shape rule, gradient and kernels follow.
//! Any other op gives a shape rule, a gradient in terms of further ops, and a kernel.

use std::any::Any;
use std::fmt;
use std::ops::RangeInclusive;
use std::sync::Arc;

use dataflow_kernels::device::{Kernel, Target};
use dataflow_kernels::expression::{Instruction, Program};

use crate::components::{Options, Precision, Recurrence};
use crate::elementwise;
use crate::gradient::Gradient;
use crate::initializer::Initializer;
use crate::systems::compound::Decomposition;
use crate::types::TensorType;

/// Why an op cannot be used as a row uses it. The compiler adds the row and its place.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct OpError(pub String);

impl OpError {
    /// For [`Op::lower`], where there is no kernel for this kind of device.
    pub fn no_kernel(target: Target) -> Self {
        Self(format!("the op has no kernel for the device `{target}`"))
    }
}

impl From<String> for OpError {
    fn from(message: String) -> Self {
        Self(message)
    }
}

impl From<&str> for OpError {
    fn from(message: &str) -> Self {
        Self(message.to_string())
    }
}

/// A trained tensor that an op asks for.
#[derive(Clone, Debug)]
pub struct Parameter {
    /// The name behind the row's path: `weight` of row `h.0.attn` is `h.0.attn.weight`. Empty: the path itself.
    pub name: String,
    /// Its shape.
    pub shape: Vec<usize>,
    /// Its values before training.
    pub init: Initializer,
    /// The path (below the model's prefix) of another parameter to use instead of one of its own.
    pub tie: Option<String>,
}

impl Parameter {
    /// A parameter of its own.
    pub fn new(name: &str, shape: impl Into<Vec<usize>>, init: Initializer) -> Self {
        Self { name: name.to_string(), shape: shape.into(), init, tie: None }
    }
}

/// Where the outputs of an op that only moves data lie already.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum View {
    /// Output `o` is the columns of input 0 from the `o`th of these on.
    Columns(Vec<usize>),
    /// Input `i` lies in output 0 from the `i`th of these columns on.
    Gather(Vec<usize>),
}

/// Work of one launch.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Cost {
    /// Floating-point operations; a multiply-add counts two, a function such as `exp` one.
    pub flops: f64,
    /// Bytes read and written, each tensor once.
    pub bytes: f64,
}

/// What a kernel may know of its node.
pub struct NodeView<'a> {
    /// The path of row names.
    pub name: &'a str,
    /// Types of all inputs: data, then parameters, then the step counter if the op uses it.
    pub inputs: &'a [TensorType],
    /// Types of all outputs.
    pub outputs: &'a [TensorType],
    /// The seed of the run.
    pub seed: u64,
    /// Of the factors of its matrix products; `f32` unless the op has [`products`](Op::products).
    pub precision: Precision,
}

impl NodeView<'_> {
    /// Bytes of all inputs and outputs.
    pub fn bytes(&self) -> f64 {
        self.inputs.iter().chain(self.outputs).map(|t| t.bytes() as f64).sum()
    }
}

/// A node and one that reads its result: two that may become one.
pub struct Pair<'a> {
    /// What the first does.
    pub producer: &'a dyn Op,
    /// What the second does.
    pub consumer: &'a dyn Op,
    /// The output of the producer that the consumer reads.
    pub output: usize,
    /// The input of the consumer that it is.
    pub input: usize,
    /// Types of the producer's inputs, parameters included.
    pub producer_inputs: &'a [TensorType],
    /// Types of the consumer's inputs, parameters included.
    pub consumer_inputs: &'a [TensorType],
    /// Whether others read the result too, so that the merged node must give it.
    pub shared: bool,
    /// What is compiled.
    pub options: &'a Options,
}

/// An input or output of one of a [`Pair`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Of {
    /// The producer's.
    Producer(usize),
    /// The consumer's.
    Consumer(usize),
}

/// One op in place of a [`Pair`].
#[derive(Clone, Debug)]
pub struct Merged {
    /// What it does. Its shape rule sees all inputs, parameters included.
    pub op: Arc<dyn Op>,
    /// Its inputs: some of the pair's, without the step counter.
    pub inputs: Vec<Of>,
    /// Its first outputs, which take the place of the pair's. Those that its shape rule gives behind them are new.
    pub outputs: Vec<Of>,
}

/// An input or output of a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Slot {
    /// An input, parameters included.
    Input(usize),
    /// An output.
    Output(usize),
}

/// A way to make some outputs of a node again from others.
#[derive(Clone, Debug)]
pub struct Recompute {
    /// What makes them, with the same bits.
    pub op: Arc<dyn Op>,
    /// Its inputs, parameters included.
    pub inputs: Vec<Slot>,
    /// For each of its outputs, the number of the output that it is.
    pub outputs: Vec<usize>,
}

/// An elementwise program that reads the result of an op, and is computed together with it, see
/// [`Op::with_epilogue`].
#[derive(Clone, Debug)]
pub struct Epilogue {
    /// What is computed. All of its outputs have the type of the result.
    pub program: Program,
    /// The program's input that is the result. The others are further inputs of the op, behind its own.
    pub result: usize,
    /// Whether the result itself is an output too, behind those of the program.
    pub kept: bool,
    /// Whether the program's only output overwrites its only other input: a sum over micro-batches.
    pub updates: bool,
}

impl dyn Op {
    /// The op as what it is, if it is a `T`.
    pub fn downcast<T: Op>(&self) -> Option<&T> {
        (self as &dyn Any).downcast_ref()
    }
}

/// The form of an op that continues a state, see [`Recurrence`].
#[derive(Clone, Debug)]
pub struct Recurrent {
    /// What it does. Its inputs are those of the op, parameters included, then the states, then `slots`, `positions` and
    /// `lengths`; its outputs are those that a row names, then the states, which it [`updates`](Op::updates).
    pub op: Arc<dyn Op>,
    /// Name and type of each state, with a slot for each sequence of the pool in its first dimension.
    pub states: Vec<(&'static str, TensorType)>,
    /// The most tokens that a sequence can have, if there is such a limit.
    pub limit: Option<usize>,
}

/// The inputs and outputs of a node that are activations, or gradients of some. See [`Op::activations`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Activations {
    /// Numbers of inputs, parameters included.
    pub inputs: Vec<usize>,
    /// Numbers of outputs.
    pub outputs: Vec<usize>,
}

impl Activations {
    /// These.
    pub fn new(inputs: impl IntoIterator<Item = usize>, outputs: impl IntoIterator<Item = usize>) -> Self {
        Self { inputs: inputs.into_iter().collect(), outputs: outputs.into_iter().collect() }
    }
}

/// The axes of the matrices of a product: rows and columns of each input and output, by letters. See [`Op::axes`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Axes {
    /// Of the inputs; a vector has columns alone, and its rows are `'1'`.
    pub inputs: Vec<[char; 2]>,
    /// Of the outputs.
    pub outputs: Vec<[char; 2]>,
}

/// A registered kind of node.
pub trait Op: Any + fmt::Debug + Send + Sync + 'static {
    /// How many data inputs a row may give.
    fn arity(&self) -> RangeInclusive<usize> {
        1..=1
    }

    /// The types of the outputs, given those of the data inputs. The first ones are named by the row; further
    /// ones are what the backward pass wants to be saved.
    ///
    /// # Errors
    /// What does not fit, with the shapes.
    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, OpError> {
        elementwise::infer(inputs)
    }

    /// The trained tensors, which become further inputs behind the data.
    ///
    /// # Errors
    /// What does not fit.
    fn parameters(&self, _inputs: &[TensorType]) -> Result<Vec<Parameter>, OpError> {
        Ok(Vec::new())
    }

    /// Whether the kernels take this one of the [`parameters`](Self::parameters) in `bf16` too, for generation with fewer
    /// bytes to read.
    fn narrow(&self, _parameter: usize) -> bool {
        false
    }

    /// For an elementwise op of `inputs` inputs: what it computes.
    fn expression(&self, _inputs: usize) -> Option<Program> {
        None
    }

    /// Writes the gradient as further nodes.
    ///
    /// # Errors
    /// If the op has none; then it cannot stand on a path from a parameter to the loss.
    fn gradient(&self, g: &mut Gradient<'_>) -> Result<(), OpError> {
        match self.expression(g.inputs()) {
            Some(program) => elementwise::gradient(&program, g),
            None => Err("the op has no gradient, but lies on a path from a parameter to the loss".into()),
        }
    }

    /// The kernel for a device.
    ///
    /// # Errors
    /// If there is none for these types.
    fn lower(&self, node: &NodeView<'_>, target: Target) -> Result<Kernel, OpError> {
        match self.expression(node.inputs.len()) {
            Some(program) => elementwise::lower(&program, node, target),
            None => Err(OpError::no_kernel(target)),
        }
    }

    /// For an op that only moves data: where its outputs lie already. `lower` is used where a reader cannot
    /// follow.
    fn view(&self, _inputs: &[TensorType]) -> Option<View> {
        None
    }

    /// Pairs (output, input) that may be the same memory where the input is read for the last time. Elementwise
    /// ops allow all of them.
    fn in_place(&self) -> Vec<(usize, usize)> {
        Vec::new()
    }

    /// Pairs (output, input) that must be the same memory: the op updates the input.
    fn updates(&self) -> Vec<(usize, usize)> {
        Vec::new()
    }

    /// Whether the kernel takes inputs and outputs with gaps between their rows (see `Rows`). Elementwise ops
    /// do.
    fn strided(&self) -> bool {
        false
    }

    /// Whether the op wants the step counter (`i32[1]`) as its last input, such as for random masks.
    fn uses_step(&self) -> bool {
        false
    }

    /// The op for the node of this path, where nodes differ: dropout draws its own mask at each.
    fn placed(&self, _path: &str) -> Option<Arc<dyn Op>> {
        None
    }

    /// One op instead of this one and a neighbour, of which it is the producer or the consumer. Both are asked, the
    /// consumer first.
    fn merge(&self, _pair: &Pair<'_>) -> Option<Merged> {
        None
    }

    /// The op with an elementwise program over its only output, where its kernel can compute that part by part, while a part is
    /// in the cache.
    fn with_epilogue(&self, _: Epilogue) -> Option<Arc<dyn Op>> {
        None
    }

    /// The epilogue that it has.
    fn epilogue(&self) -> Option<&Epilogue> {
        None
    }

    /// Writes the op as primitive ops, a step of its formula each, for programs that are compiled without `compound`;
    /// `false` if it is primitive itself.
    ///
    /// # Errors
    /// What a shape rule says.
    fn decompose(&self, _: &mut Decomposition<'_>) -> Result<bool, OpError> {
        Ok(false)
    }

    /// A cheaper way than running the op once more to make outputs again from others, if there is one: the norm of a
    /// sum, given the sum.
    fn recompute(&self) -> Option<Recompute> {
        None
    }

    /// Whether what the op gives for a token follows from its inputs for that token alone. An elementwise op does; any other
    /// that says nothing here and has no [`recurrent`](Self::recurrent) form cannot be used in generation, since it
    /// may look back to tokens that a program of one token does not have.
    fn tokenwise(&self) -> bool {
        self.expression(*self.arity().start()).is_some()
    }

    /// The form for generation, given the types of the data inputs. `None` where no token depends on others, which
    /// [`tokenwise`](Self::tokenwise) confirms.
    ///
    /// # Errors
    /// What does not fit.
    fn recurrent(&self, _inputs: &[TensorType], _recurrence: &Recurrence) -> Result<Option<Recurrent>, OpError> {
        Ok(None)
    }

    /// The form for rows that hold several documents, at each of which the op starts anew, given the types of the data
    /// inputs (see [`Options::packed`]). Its inputs are those of the op, parameters included, then `positions`; its first
    /// outputs are those that a row names. `None` where no token depends on others ([`tokenwise`](Self::tokenwise)).
    ///
    /// # Errors
    /// What does not fit.
    fn packed(&self, _inputs: &[TensorType]) -> Result<Option<Arc<dyn Op>>, OpError> {
        Ok(None)
    }

    /// Whether its work is in matrix products, whose factors may be rounded to `bf16` (see [`NodeView::precision`]).
    fn products(&self) -> bool {
        false
    }

    /// For mixed precision on a CUDA device: which of this many inputs, and which outputs, the kernels take in `bf16` as well
    /// as in `f32`, all of a launch in one of the two. The others stay `f32`: statistics, states, what is summed over many
    /// tokens. Elementwise ops need not say: each tensor of theirs may be of either type.
    fn activations(&self, _inputs: usize) -> Activations {
        Activations::default()
    }

    /// For mixed precision on the processor: which of this many inputs the kernels take in `bf16` as well as in `f32`, and
    /// which outputs they can round to it, each on its own. Elementwise ops need not say: they can round any output.
    fn rounds(&self, _inputs: usize) -> Activations {
        Activations::default()
    }

    /// For a product of matrices, in whose inputs zeros may be added along the axes `n` and `k`: its axes.
    fn axes(&self, _inputs: usize) -> Option<Axes> {
        None
    }

    /// What stands in for the op when the model is evaluated: dropout becomes nothing.
    fn evaluation(&self) -> Option<Arc<dyn Op>> {
        None
    }

    /// The work of one launch.
    fn cost(&self, node: &NodeView<'_>) -> Cost {
        let works = |i: &&Instruction| !matches!(i, Instruction::Input(_) | Instruction::Constant(_));
        let count = |p: Program| p.instructions().iter().filter(works).count() as f64;
        let per_element = self.expression(node.inputs.len()).map_or(0.0, count);
        let elements = node.outputs.first().map_or(0, TensorType::elements) as f64;
        Cost { flops: per_element * elements, bytes: node.bytes() }
    }
}
