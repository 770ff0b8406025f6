//! Reverse-mode derivatives of elementwise programs.

use super::{Binary, Builder, Instruction, Program, Register, Unary};

impl Program {
    /// The program of the gradient: it takes the inputs of this one, then one cotangent per output, and gives
    /// the sum over outputs of `cotangent * d output / d input` for each of the `wanted` inputs. Dropout masks
    /// keep their sites, so they are those of the forward computation.
    ///
    /// # Panics
    /// If a wanted input does not exist.
    pub fn gradient(&self, wanted: &[usize]) -> Program {
        Program::new(self.inputs() + self.outputs().len(), |b, x| {
            let (inputs, cotangents) = x.split_at(self.inputs());
            // a copy of the forward program; simplifications map several of its registers to one
            let mut forward: Vec<Register> = Vec::with_capacity(self.instructions().len());
            for &instruction in self.instructions() {
                let at = |r: Register| forward[r as usize];
                let register = match instruction {
                    Instruction::Input(i) => inputs[i as usize],
                    Instruction::Constant(c) => b.constant(c.get()),
                    Instruction::Unary(op, a) => b.unary(op, at(a)),
                    Instruction::Binary(op, l, r) => b.binary(op, at(l), at(r)),
                    Instruction::Select(c, l, r) => b.select(at(c), at(l), at(r)),
                    Instruction::Keep { site, p } => b.keep(site, p.get()),
                };
                forward.push(register);
            }
            let mut gradients: Vec<Option<Register>> = vec![None; forward.len()];
            let add = |gradients: &mut Vec<Option<Register>>, b: &mut Builder, to: Register, term: Register| {
                let slot = &mut gradients[to as usize];
                *slot = Some(slot.map_or(term, |sum| b.add(sum, term)));
            };
            for (&output, &cotangent) in self.outputs().iter().zip(cotangents) {
                add(&mut gradients, b, output, cotangent);
            }
            for (i, &instruction) in self.instructions().iter().enumerate().rev() {
                let (Some(g), y) = (gradients[i], forward[i]) else { continue };
                match instruction {
                    Instruction::Input(_) | Instruction::Constant(_) | Instruction::Keep { .. } => {}
                    Instruction::Unary(op, a) => {
                        let term = unary(b, op, forward[a as usize], y, g);
                        add(&mut gradients, b, a, term);
                    }
                    Instruction::Binary(op, l, r) => {
                        let (left, right) = binary(b, op, forward[l as usize], forward[r as usize], y, g);
                        add(&mut gradients, b, l, left);
                        add(&mut gradients, b, r, right);
                    }
                    Instruction::Select(c, l, r) => {
                        let (c, zero) = (forward[c as usize], b.constant(0.0));
                        let left = b.select(c, g, zero);
                        let right = b.select(c, zero, g);
                        add(&mut gradients, b, l, left);
                        add(&mut gradients, b, r, right);
                    }
                }
            }
            wanted
                .iter()
                .map(|&i| {
                    assert!(i < self.inputs(), "gradient of input {i} of {}", self.inputs());
                    let at = self.instructions().iter().position(|&k| k == Instruction::Input(i as u32));
                    at.and_then(|at| gradients[at]).unwrap_or_else(|| b.constant(0.0))
                })
                .collect()
        })
    }
}

/// `g dy/dx` of `y = op(x)`.
fn unary(b: &mut Builder, op: Unary, x: Register, y: Register, g: Register) -> Register {
    match op {
        Unary::Neg => b.neg(g),
        Unary::Abs => {
            let minus = b.neg(x);
            let (positive, negative) = (b.step(x), b.step(minus));
            let sign = b.sub(positive, negative);
            b.mul(g, sign)
        }
        Unary::Exp => b.mul(g, y),
        Unary::Log => b.div(g, x),
        Unary::Sqrt => {
            let half = b.scale(g, 0.5);
            b.div(half, y)
        }
        Unary::Rsqrt => {
            let square = b.square(y);
            let cube = b.mul(square, y);
            let slope = b.scale(cube, -0.5);
            b.mul(g, slope)
        }
        Unary::Recip => {
            let square = b.square(y);
            let term = b.mul(g, square);
            b.neg(term)
        }
        Unary::Sigmoid => {
            let rest = b.one_minus(y);
            let slope = b.mul(y, rest);
            b.mul(g, slope)
        }
        Unary::Tanh => {
            let square = b.square(y);
            let slope = b.one_minus(square);
            b.mul(g, slope)
        }
        Unary::Erf => {
            let square = b.square(x);
            let minus = b.neg(square);
            let bell = b.exp(minus);
            let slope = b.scale(bell, std::f32::consts::FRAC_2_SQRT_PI);
            b.mul(g, slope)
        }
        Unary::Softplus => {
            let slope = b.sigmoid(x);
            b.mul(g, slope)
        }
        Unary::LogSigmoid => {
            let minus = b.neg(x);
            let slope = b.sigmoid(minus);
            b.mul(g, slope)
        }
        Unary::Relu => {
            let slope = b.step(x);
            b.mul(g, slope)
        }
        Unary::Sin => {
            let slope = b.cos(x);
            b.mul(g, slope)
        }
        Unary::Cos => {
            let slope = b.sin(x);
            let term = b.mul(g, slope);
            b.neg(term)
        }
        Unary::Step => b.constant(0.0),
    }
}

/// `g dy/da` and `g dy/db` of `y = op(a, b)`.
fn binary(b: &mut Builder, op: Binary, l: Register, r: Register, y: Register, g: Register) -> (Register, Register) {
    match op {
        Binary::Add => (g, g),
        Binary::Sub => (g, b.neg(g)),
        Binary::Mul => (b.mul(g, r), b.mul(g, l)),
        Binary::Div => {
            let left = b.div(g, r);
            let right = b.mul(left, y);
            (left, b.neg(right))
        }
        Binary::Max | Binary::Min => {
            // 1, 1/2 at a tie, or 0
            let (above, below) = (b.greater(l, r), b.greater(r, l));
            let difference = b.sub(above, below);
            let half = b.scale(difference, if op == Binary::Max { 0.5 } else { -0.5 });
            let share = b.offset(half, 0.5);
            let left = b.mul(g, share);
            let rest = b.one_minus(share);
            (left, b.mul(g, rest))
        }
        Binary::Greater => (b.constant(0.0), b.constant(0.0)),
    }
}
