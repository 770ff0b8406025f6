//! Elementwise computations as data: what every element of the outputs is, as a function of the elements of
//! the inputs at the same place.
//!
//! A [`Program`] is written once, differentiated symbolically, fused with its neighbours by substitution, and
//! compiled for each device (for the CPU by [`cpu::interpreter`](crate::cpu::interpreter)). It is in static
//! single assignment form: instruction `i` defines register `i` from earlier registers. The [`Builder`]
//! folds constants and never makes the same instruction twice.

mod builder;
mod display;
mod gradient;
mod scalar;

pub use builder::Builder;
pub use display::input_name;
#[cfg(test)]
pub(crate) use scalar::erf;

/// Number of an instruction, and so of its result.
pub type Register = u32;

/// An `f32` that compares by its bits.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Value(u32);

impl Value {
    /// The number.
    pub fn get(self) -> f32 {
        f32::from_bits(self.0)
    }
}

impl From<f32> for Value {
    fn from(x: f32) -> Self {
        Value(x.to_bits())
    }
}

impl std::fmt::Debug for Value {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.get().fmt(f)
    }
}

/// A function of one number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Unary {
    /// `-x`
    Neg,
    /// `|x|`; derivative 0 at 0
    Abs,
    /// `e^x`
    Exp,
    /// Natural logarithm
    Log,
    /// Square root
    Sqrt,
    /// `1 / sqrt(x)`
    Rsqrt,
    /// `1 / x`
    Recip,
    /// `1 / (1 + e^-x)`
    Sigmoid,
    /// Hyperbolic tangent
    Tanh,
    /// Error function
    Erf,
    /// `log(1 + e^x)`; `x` above 20
    Softplus,
    /// `log(sigmoid(x))`
    LogSigmoid,
    /// `max(x, 0)`; derivative 0 at 0
    Relu,
    /// Sine
    Sin,
    /// Cosine
    Cos,
    /// 1 where `x > 0`, else 0; derivative 0
    Step,
}

/// A function of two numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Binary {
    /// `a + b`
    Add,
    /// `a - b`
    Sub,
    /// `a * b`
    Mul,
    /// `a / b`
    Div,
    /// The larger; at a tie each gets half of the gradient
    Max,
    /// The smaller; at a tie each gets half of the gradient
    Min,
    /// 1 where `a > b`, else 0; derivative 0
    Greater,
}

/// One step of a [`Program`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Instruction {
    /// The element of an input.
    Input(u32),
    /// A number.
    Constant(Value),
    /// A function of one register.
    Unary(Unary, Register),
    /// A function of two registers.
    Binary(Binary, Register, Register),
    /// `cond != 0 ? a : b`
    Select(Register, Register, Register),
    /// A dropout mask: 0 with probability `p`, else `1 / (1 - p)`, by [`Keep`](crate::random::Keep) at the
    /// element's index `row * cols + col`. The same site gives the same mask wherever it occurs.
    Keep {
        /// Which mask of the training step.
        site: u32,
        /// Probability of 0.
        p: Value,
    },
}

impl Instruction {
    /// The registers it reads.
    pub fn operands(self) -> impl Iterator<Item = Register> {
        let list = match self {
            Instruction::Input(_) | Instruction::Constant(_) | Instruction::Keep { .. } => [None; 3],
            Instruction::Unary(_, a) => [Some(a), None, None],
            Instruction::Binary(_, a, b) => [Some(a), Some(b), None],
            Instruction::Select(c, a, b) => [Some(c), Some(a), Some(b)],
        };
        list.into_iter().flatten()
    }
}

/// An elementwise computation. Programs are equal if their instructions are.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Program {
    inputs: usize,
    instructions: Vec<Instruction>,
    outputs: Vec<Register>,
}

/// What an input becomes in [`Program::compose`].
#[derive(Clone, Copy, Debug)]
pub enum Argument<'a> {
    /// An input of the new program.
    Input(usize),
    /// A number.
    Constant(f32),
    /// Output `output` of a program that is given these inputs of the new program.
    Output {
        /// The program that computes it.
        program: &'a Program,
        /// For each input of `program`, an input of the new program.
        inputs: &'a [usize],
        /// Which output.
        output: usize,
    },
}

impl Program {
    /// The program that `body` makes of its inputs: `Program::new(1, |b, x| vec![b.silu(x[0])])`.
    pub fn new(inputs: usize, body: impl FnOnce(&mut Builder, &[Register]) -> Vec<Register>) -> Self {
        let mut b = Builder::new();
        let registers: Vec<Register> = (0..inputs).map(|i| b.input(i)).collect();
        let outputs = body(&mut b, &registers);
        b.finish(inputs, &outputs)
    }

    /// Number of inputs, whether used or not.
    pub fn inputs(&self) -> usize {
        self.inputs
    }

    /// The instructions, in order of execution.
    pub fn instructions(&self) -> &[Instruction] {
        &self.instructions
    }

    /// The register of each output.
    pub fn outputs(&self) -> &[Register] {
        &self.outputs
    }

    /// Whether the only output is the only input.
    pub fn is_identity(&self) -> bool {
        self.inputs == 1 && self.outputs.len() == 1 && self.instructions == [Instruction::Input(0)]
    }

    /// Whether input `i` has any influence.
    pub fn uses_input(&self, i: usize) -> bool {
        self.instructions.contains(&Instruction::Input(i as u32))
    }

    /// Whether there is a dropout mask in it.
    pub fn is_random(&self) -> bool {
        self.instructions.iter().any(|i| matches!(i, Instruction::Keep { .. }))
    }

    /// Floating-point operations per element; a function such as `exp` counts as the dozen that it takes.
    pub fn flops(&self) -> usize {
        let cost = |i: &Instruction| match i {
            Instruction::Input(_) | Instruction::Constant(_) => 0,
            Instruction::Unary(op, _) => match op {
                Unary::Neg | Unary::Abs | Unary::Relu | Unary::Step | Unary::Sqrt | Unary::Recip => 1,
                Unary::Rsqrt => 2,
                Unary::Exp => 13,
                Unary::Sigmoid => 16,
                Unary::Log | Unary::Tanh | Unary::Sin | Unary::Cos => 24,
                Unary::Erf | Unary::Softplus | Unary::LogSigmoid => 32,
            },
            Instruction::Binary(..) | Instruction::Select(..) => 1,
            Instruction::Keep { .. } => 16,
        };
        self.instructions.iter().map(cost).sum()
    }

    /// This program with its inputs replaced, over `inputs` new inputs: how a chain of programs becomes one.
    ///
    /// # Panics
    /// If there is not one argument for each input.
    pub fn compose(&self, inputs: usize, arguments: &[Argument<'_>]) -> Program {
        Program::new(inputs, |b, x| {
            let registers: Vec<Register> = arguments
                .iter()
                .map(|argument| match argument {
                    Argument::Input(i) => x[*i],
                    Argument::Constant(c) => b.constant(*c),
                    Argument::Output { program, inputs, output } => {
                        let inner: Vec<Register> = inputs.iter().map(|&i| x[i]).collect();
                        b.inline(program, &inner)[*output]
                    }
                })
                .collect();
            b.inline(self, &registers)
        })
    }

    /// This program with only some of its outputs, in the given order.
    pub fn select_outputs(&self, outputs: &[usize]) -> Program {
        Program::new(self.inputs, |b, x| {
            let all = b.inline(self, x);
            outputs.iter().map(|&o| all[o]).collect()
        })
    }
}
