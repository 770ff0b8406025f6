//! Programs as formulas: `a * sigmoid(a)`, `t0 = exp(a); t0 + b, t0 * c`.

use std::fmt;

use super::{Binary, Instruction, Program, Register, Unary};

/// Strength of binding of a formula's outermost operation.
#[derive(Clone, Copy, PartialEq, PartialOrd)]
enum Level {
    Sum,
    Product,
    Prefix,
    Atom,
}

impl Unary {
    /// As it is written in formulas.
    pub fn name(self) -> &'static str {
        match self {
            Unary::Neg => "neg",
            Unary::Abs => "abs",
            Unary::Exp => "exp",
            Unary::Log => "log",
            Unary::Sqrt => "sqrt",
            Unary::Rsqrt => "rsqrt",
            Unary::Recip => "recip",
            Unary::Sigmoid => "sigmoid",
            Unary::Tanh => "tanh",
            Unary::Erf => "erf",
            Unary::Softplus => "softplus",
            Unary::LogSigmoid => "log_sigmoid",
            Unary::Relu => "relu",
            Unary::Sin => "sin",
            Unary::Cos => "cos",
            Unary::Step => "step",
        }
    }
}

/// The name of an input in a formula: `a`, `b`, … `z`, `x26`, `x27`, …
pub fn input_name(i: u32) -> String {
    if i < 26 { char::from(b'a' + i as u8).to_string() } else { format!("x{i}") }
}

/// Renders registers, of which those in `names` go by a name.
struct Writer<'a> {
    program: &'a Program,
    names: Vec<Option<String>>,
}

impl Writer<'_> {
    fn operand(&self, r: Register, least: Level) -> String {
        let (text, level) = match &self.names[r as usize] {
            Some(name) => (name.clone(), Level::Atom),
            None => self.formula(r),
        };
        if level < least { format!("({text})") } else { text }
    }

    fn formula(&self, r: Register) -> (String, Level) {
        let all = Level::Sum;
        match self.program.instructions()[r as usize] {
            Instruction::Input(i) => (input_name(i), Level::Atom),
            Instruction::Constant(c) => {
                (format!("{}", c.get()), if c.get() < 0.0 { Level::Prefix } else { Level::Atom })
            }
            Instruction::Unary(Unary::Neg, a) => (format!("-{}", self.operand(a, Level::Product)), Level::Prefix),
            Instruction::Unary(op, a) => (format!("{}({})", op.name(), self.operand(a, all)), Level::Atom),
            Instruction::Binary(op, a, b) => {
                let infix = |symbol, level, right| {
                    (format!("{} {symbol} {}", self.operand(a, level), self.operand(b, right)), level)
                };
                let call = |name| (format!("{name}({}, {})", self.operand(a, all), self.operand(b, all)), Level::Atom);
                match op {
                    Binary::Add => infix("+", Level::Sum, Level::Product),
                    Binary::Sub => infix("-", Level::Sum, Level::Product),
                    Binary::Mul => infix("*", Level::Product, Level::Prefix),
                    Binary::Div => infix("/", Level::Product, Level::Prefix),
                    Binary::Max => call("max"),
                    Binary::Min => call("min"),
                    Binary::Greater => call("greater"),
                }
            }
            Instruction::Select(c, a, b) => {
                let [c, a, b] = [c, a, b].map(|r| self.operand(r, all));
                (format!("select({c}, {a}, {b})"), Level::Atom)
            }
            Instruction::Keep { site, p } => (format!("keep({site}, {})", p.get()), Level::Atom),
        }
    }
}

impl fmt::Display for Program {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut uses = vec![0; self.instructions().len()];
        let read = self.instructions().iter().flat_map(|i| i.operands());
        read.chain(self.outputs().iter().copied()).for_each(|r| uses[r as usize] += 1);
        let mut writer = Writer { program: self, names: vec![None; uses.len()] };
        let mut temporaries = 0;
        for (i, &instruction) in self.instructions().iter().enumerate() {
            let leaf =
                matches!(instruction, Instruction::Input(_) | Instruction::Constant(_) | Instruction::Keep { .. });
            if uses[i] > 1 && !leaf {
                let name = format!("t{temporaries}");
                write!(f, "{name} = {}; ", writer.formula(i as Register).0)?;
                writer.names[i] = Some(name);
                temporaries += 1;
            }
        }
        for (i, &r) in self.outputs().iter().enumerate() {
            write!(f, "{}{}", if i > 0 { ", " } else { "" }, writer.operand(r, Level::Sum))?;
        }
        Ok(())
    }
}
