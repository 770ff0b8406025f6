//! Building of elementwise programs.

use std::collections::HashMap;

use super::{Binary, Instruction, Program, Register, Unary};

/// Makes a [`Program`]: hands out registers, finds an instruction again that it has already made, and
/// simplifies (`x + 0`, `1 x`, `0 x` as 0, `--x`, constants, …).
#[derive(Clone, Debug, Default)]
pub struct Builder {
    instructions: Vec<Instruction>,
    known: HashMap<Instruction, Register>,
}

impl Builder {
    /// No instructions yet.
    pub fn new() -> Self {
        Self::default()
    }

    fn push(&mut self, instruction: Instruction) -> Register {
        *self.known.entry(instruction).or_insert_with(|| {
            self.instructions.push(instruction);
            (self.instructions.len() - 1) as Register
        })
    }

    fn value(&self, r: Register) -> Option<f32> {
        match self.instructions[r as usize] {
            Instruction::Constant(v) => Some(v.get()),
            _ => None,
        }
    }

    fn negated(&self, r: Register) -> Option<Register> {
        match self.instructions[r as usize] {
            Instruction::Unary(Unary::Neg, x) => Some(x),
            _ => None,
        }
    }

    /// Input number `i`.
    pub fn input(&mut self, i: usize) -> Register {
        self.push(Instruction::Input(i as u32))
    }

    /// A number.
    pub fn constant(&mut self, x: f32) -> Register {
        self.push(Instruction::Constant(x.into()))
    }

    /// A dropout mask, see [`Instruction::Keep`]; 1 where `p` is 0.
    pub fn keep(&mut self, site: u32, p: f32) -> Register {
        assert!((0.0..1.0).contains(&p), "dropout probability {p} is not in [0, 1)");
        if p == 0.0 { self.constant(1.0) } else { self.push(Instruction::Keep { site, p: p.into() }) }
    }

    /// `op(x)`
    pub fn unary(&mut self, op: Unary, x: Register) -> Register {
        if let Some(v) = self.value(x) {
            return self.constant(op.evaluate(f64::from(v)) as f32);
        }
        match (op, self.instructions[x as usize]) {
            (Unary::Neg, Instruction::Unary(Unary::Neg, inner)) => inner,
            (Unary::Neg, Instruction::Binary(Binary::Sub, a, b)) => self.binary(Binary::Sub, b, a),
            (Unary::Abs, Instruction::Unary(Unary::Neg, inner)) => self.unary(Unary::Abs, inner),
            (Unary::Abs | Unary::Relu, Instruction::Unary(Unary::Abs | Unary::Relu | Unary::Step, _)) => x,
            _ => self.push(Instruction::Unary(op, x)),
        }
    }

    /// `op(a, b)`
    pub fn binary(&mut self, op: Binary, a: Register, b: Register) -> Register {
        if let (Some(x), Some(y)) = (self.value(a), self.value(b)) {
            return self.constant(op.evaluate(f64::from(x), f64::from(y)) as f32);
        }
        // operands of commutative operations in one order, constants last
        let late = |s: &Self, r: Register| (s.value(r).is_some(), r);
        let (a, b) = match op {
            Binary::Add | Binary::Mul if late(self, a) > late(self, b) => (b, a),
            _ => (a, b),
        };
        match (op, self.value(a), self.value(b)) {
            (Binary::Add | Binary::Sub, _, Some(0.0)) => return a,
            (Binary::Sub, Some(0.0), _) => return self.unary(Unary::Neg, b),
            (Binary::Mul | Binary::Div, _, Some(1.0)) => return a,
            (Binary::Mul | Binary::Div, _, Some(-1.0)) => return self.unary(Unary::Neg, a),
            (Binary::Mul, _, Some(0.0)) => return self.constant(0.0),
            (Binary::Div, Some(0.0), _) => return self.constant(0.0),
            (Binary::Div, Some(1.0), _) => return self.unary(Unary::Recip, b),
            // exact for powers of two
            (Binary::Div, _, Some(c)) if c.is_normal() && c.to_bits() & 0x7f_ffff == 0 && (1.0 / c).is_normal() => {
                let inverse = self.constant(1.0 / c);
                return self.binary(Binary::Mul, a, inverse);
            }
            _ => {}
        }
        match (op, self.negated(a), self.negated(b)) {
            (Binary::Add, _, Some(y)) => self.binary(Binary::Sub, a, y),
            (Binary::Add, Some(x), _) => self.binary(Binary::Sub, b, x),
            (Binary::Sub, _, Some(y)) => self.binary(Binary::Add, a, y),
            (Binary::Mul | Binary::Div, Some(x), Some(y)) => self.binary(op, x, y),
            (Binary::Mul, Some(x), _) if self.value(b).is_some() => {
                let minus = self.neg(b);
                self.binary(Binary::Mul, x, minus)
            }
            (Binary::Sub, _, _) if a == b => self.constant(0.0),
            (Binary::Max | Binary::Min, _, _) if a == b => a,
            (Binary::Greater, _, _) if a == b => self.constant(0.0),
            _ => self.push(Instruction::Binary(op, a, b)),
        }
    }

    /// `cond != 0 ? a : b`
    pub fn select(&mut self, cond: Register, a: Register, b: Register) -> Register {
        match self.value(cond) {
            Some(c) => [a, b][usize::from(c == 0.0)],
            None if a == b => a,
            None => self.push(Instruction::Select(cond, a, b)),
        }
    }

    /// Adds the instructions of `program` on the given inputs; returns its outputs.
    ///
    /// # Panics
    /// If there is not one argument for each input.
    pub fn inline(&mut self, program: &Program, arguments: &[Register]) -> Vec<Register> {
        assert_eq!(arguments.len(), program.inputs, "one argument for each input");
        let mut map: Vec<Register> = Vec::with_capacity(program.instructions.len());
        for &instruction in &program.instructions {
            let at = |r: Register| map[r as usize];
            let register = match instruction {
                Instruction::Input(i) => arguments[i as usize],
                Instruction::Constant(v) => self.constant(v.get()),
                Instruction::Unary(op, a) => self.unary(op, at(a)),
                Instruction::Binary(op, a, b) => self.binary(op, at(a), at(b)),
                Instruction::Select(c, a, b) => self.select(at(c), at(a), at(b)),
                Instruction::Keep { site, p } => self.keep(site, p.get()),
            };
            map.push(register);
        }
        program.outputs.iter().map(|&r| map[r as usize]).collect()
    }

    /// The program of `inputs` inputs that computes `outputs`, without what they do not need.
    ///
    /// # Panics
    /// If it uses an input beyond `inputs`.
    pub fn finish(&self, inputs: usize, outputs: &[Register]) -> Program {
        // in the order in which the outputs first need them
        let mut map: Vec<Option<Register>> = vec![None; self.instructions.len()];
        let mut instructions = Vec::new();
        let mut stack: Vec<(Register, bool)> = outputs.iter().rev().map(|&r| (r, false)).collect();
        while let Some((r, ready)) = stack.pop() {
            if map[r as usize].is_some() {
                continue;
            }
            let instruction = self.instructions[r as usize];
            if !ready {
                stack.push((r, true));
                let first = stack.len();
                stack.extend(instruction.operands().map(|o| (o, false)));
                stack[first..].reverse();
                continue;
            }
            let at = |r: Register| map[r as usize].expect("operands come first");
            let instruction = match instruction {
                Instruction::Input(i) => {
                    assert!((i as usize) < inputs, "input {i} of a program of {inputs} inputs");
                    instruction
                }
                Instruction::Unary(op, a) => Instruction::Unary(op, at(a)),
                Instruction::Binary(op, a, b) => Instruction::Binary(op, at(a), at(b)),
                Instruction::Select(c, a, b) => Instruction::Select(at(c), at(a), at(b)),
                other => other,
            };
            instructions.push(instruction);
            map[r as usize] = Some((instructions.len() - 1) as Register);
        }
        let outputs = outputs.iter().map(|&r| map[r as usize].expect("outputs are made")).collect();
        Program { inputs, instructions, outputs }
    }
}

macro_rules! shorthands {
    (unary: $($u:ident $U:ident),*; binary: $($b:ident $B:ident),*) => {
        /// Shorthands.
        impl Builder {
            $(#[doc = concat!("[`Unary::", stringify!($U), "`]")]
            pub fn $u(&mut self, x: Register) -> Register {
                self.unary(Unary::$U, x)
            })*
            $(#[doc = concat!("[`Binary::", stringify!($B), "`]")]
            pub fn $b(&mut self, a: Register, b: Register) -> Register {
                self.binary(Binary::$B, a, b)
            })*
            /// `factor * x`
            pub fn scale(&mut self, x: Register, factor: f32) -> Register {
                let factor = self.constant(factor);
                self.mul(x, factor)
            }
            /// `x + term`
            pub fn offset(&mut self, x: Register, term: f32) -> Register {
                let term = self.constant(term);
                self.add(x, term)
            }
            /// `1 - x`
            pub fn one_minus(&mut self, x: Register) -> Register {
                let one = self.constant(1.0);
                self.sub(one, x)
            }
            /// `x²`
            pub fn square(&mut self, x: Register) -> Register {
                self.mul(x, x)
            }
            /// `x sigmoid(x)`
            pub fn silu(&mut self, x: Register) -> Register {
                let y = self.sigmoid(x);
                self.mul(x, y)
            }
            /// `x (1 + erf(x / sqrt 2)) / 2`, the exact form.
            pub fn gelu(&mut self, x: Register) -> Register {
                let y = self.scale(x, std::f32::consts::FRAC_1_SQRT_2);
                let y = self.erf(y);
                let y = self.offset(y, 1.0);
                let half = self.scale(x, 0.5);
                self.mul(half, y)
            }
            /// `max(x, 0)²`
            pub fn squared_relu(&mut self, x: Register) -> Register {
                let y = self.relu(x);
                self.square(y)
            }
            /// `x` times a dropout mask.
            pub fn dropout(&mut self, x: Register, site: u32, p: f32) -> Register {
                let mask = self.keep(site, p);
                self.mul(x, mask)
            }
        }
    };
}

shorthands! {
    unary: neg Neg, abs Abs, exp Exp, log Log, sqrt Sqrt, rsqrt Rsqrt, recip Recip, sigmoid Sigmoid, tanh Tanh,
        erf Erf, softplus Softplus, log_sigmoid LogSigmoid, relu Relu, sin Sin, cos Cos, step Step;
    binary: add Add, sub Sub, mul Mul, div Div, max Max, min Min, greater Greater
}
