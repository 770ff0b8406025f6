//! Values of single elements in double precision: for constants, and as the meaning of each instruction.

use super::{Binary, Instruction, Program, Unary};
use crate::random::Keep;

/// The error function.
pub(crate) fn erf(x: f64) -> f64 {
    if x.is_nan() || x.abs() > 6.0 {
        return if x.is_nan() { x } else { x.signum() };
    }
    // 2/sqrt(pi) e^-x² times the sum of 2^n x^(2n+1) / (2n+1)!!: all terms of one sign
    let (mut term, mut sum, mut n) = (x, x, 0.0);
    while term.abs() > sum.abs() * 1e-17 {
        n += 1.0;
        term *= 2.0 * x * x / (2.0 * n + 1.0);
        sum += term;
    }
    std::f64::consts::FRAC_2_SQRT_PI * (-x * x).exp() * sum
}

impl Unary {
    /// Its value.
    pub fn evaluate(self, x: f64) -> f64 {
        match self {
            Unary::Neg => -x,
            Unary::Abs => x.abs(),
            Unary::Exp => x.exp(),
            Unary::Log => x.ln(),
            Unary::Sqrt => x.sqrt(),
            Unary::Rsqrt => 1.0 / x.sqrt(),
            Unary::Recip => 1.0 / x,
            Unary::Sigmoid => 1.0 / (1.0 + (-x).exp()),
            Unary::Tanh => x.tanh(),
            Unary::Erf => erf(x),
            Unary::Softplus if x > 20.0 => x,
            Unary::Softplus => x.exp().ln_1p(),
            Unary::LogSigmoid => (if x < 0.0 { x } else { 0.0 }) - (-x.abs()).exp().ln_1p(),
            Unary::Relu => {
                if x > 0.0 || x.is_nan() {
                    x
                } else {
                    0.0
                }
            }
            Unary::Sin => x.sin(),
            Unary::Cos => x.cos(),
            Unary::Step => f64::from(x > 0.0),
        }
    }
}

impl Binary {
    /// Its value.
    pub fn evaluate(self, a: f64, b: f64) -> f64 {
        match self {
            Binary::Add => a + b,
            Binary::Sub => a - b,
            Binary::Mul => a * b,
            Binary::Div => a / b,
            Binary::Max => {
                if a > b {
                    a
                } else {
                    b
                }
            }
            Binary::Min => {
                if a < b {
                    a
                } else {
                    b
                }
            }
            Binary::Greater => f64::from(a > b),
        }
    }
}

impl Program {
    /// The outputs at one element, in double precision; `index` is the element's place for dropout masks.
    /// Slow: the meaning of the program, to test against.
    ///
    /// # Panics
    /// If there is not one value for each input.
    pub fn evaluate(&self, inputs: &[f64], seed: u64, step: u64, index: u64) -> Vec<f64> {
        assert_eq!(inputs.len(), self.inputs(), "one value for each input");
        let mut values: Vec<f64> = Vec::with_capacity(self.instructions().len());
        for instruction in self.instructions() {
            let at = |r: u32| values[r as usize];
            let value = match *instruction {
                Instruction::Input(i) => inputs[i as usize],
                Instruction::Constant(c) => f64::from(c.get()),
                Instruction::Unary(op, a) => op.evaluate(at(a)),
                Instruction::Binary(op, a, b) => op.evaluate(at(a), at(b)),
                Instruction::Select(c, a, b) => {
                    if at(c) != 0.0 {
                        at(a)
                    } else {
                        at(b)
                    }
                }
                Instruction::Keep { site, p } => f64::from(Keep::new(seed, step, site, p.get()).at(index)),
            };
            values.push(value);
        }
        self.outputs().iter().map(|&r| values[r as usize]).collect()
    }
}
