//! What follows from an expression: shape rule, gradient and kernel of elementwise ops.

use dataflow_kernels::Rows;
use dataflow_kernels::cpu::interpreter::{Compiled, MAX_INPUTS, MAX_OUTPUTS, Operand};
use dataflow_kernels::cpu::output::Output;
use dataflow_kernels::cuda;
use dataflow_kernels::cuda::elementwise::Repeat;
use dataflow_kernels::device::{Arguments, Kernel, Target};
use dataflow_kernels::expression::{Instruction, Program};

use crate::builtin::{Elementwise, SumTo};
use crate::gradient::Gradient;
use crate::op::{NodeView, OpError};
use crate::types::{DType, TensorType, broadcast};

/// All inputs broadcast to one shape, which is that of every output.
///
/// # Errors
/// Shapes that do not broadcast, or numbers that are not `f32`.
pub fn infer(inputs: &[TensorType]) -> Result<Vec<TensorType>, OpError> {
    if let Some(i) = inputs.iter().position(|t| t.dtype != DType::F32) {
        return Err(format!("input {i} is {}, but must be f32", inputs[i]).into());
    }
    let shapes: Vec<&[usize]> = inputs.iter().map(|t| t.shape.as_slice()).collect();
    let shape = broadcast(&shapes).ok_or("the shapes of the inputs do not broadcast to one shape")?;
    for (i, input) in inputs.iter().enumerate() {
        if Broadcast::new(&input.shape, &shape).is_none() {
            let message = format!("input {i} of shape {:?} repeats in more than one place of {shape:?}", input.shape);
            return Err(message.into());
        }
    }
    Ok(vec![TensorType::f32(shape)])
}

/// How the rows of an input `[rows, cols]` repeat to those of an output: output row `r` reads row
/// `(r / div) % modulo`, and where `column` is set its only column.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Broadcast {
    /// Output rows that share an input row.
    pub div: usize,
    /// Input rows.
    pub modulo: usize,
    /// Whether the input has one column.
    pub column: bool,
}

impl Broadcast {
    /// From an input's shape to an output's; `None` if the repeated dimensions lie on both sides of the
    /// others' and no such rule exists.
    pub fn new(input: &[usize], output: &[usize]) -> Option<Self> {
        let (cols, leading) = output.split_last().map_or((1, &output[..0]), |(c, l)| (*c, l));
        let own_cols = input.last().copied().unwrap_or(1);
        let column = own_cols != cols;
        let offset = leading.len() - input.len().saturating_sub(1);
        let own = |d: usize| if d < offset { 1 } else { input[d - offset] };
        // dimensions in which the input has the output's size must be neighbours
        let kept: Vec<usize> = (0..leading.len()).filter(|&d| leading[d] != 1 && own(d) == leading[d]).collect();
        let (Some(&first), Some(&last)) = (kept.first(), kept.last()) else {
            return Some(Self { div: 1, modulo: 1, column });
        };
        let between_repeats = (first..=last).any(|d| leading[d] != 1 && own(d) != leading[d]);
        let div = leading[last + 1..].iter().product::<usize>().max(1);
        let modulo = leading[first..=last].iter().product();
        (!between_repeats).then_some(Self { div, modulo, column })
    }

    /// The operand of an elementwise program over `out_rows` rows.
    fn operand<'a>(&self, rows: Rows<'a>, out_rows: usize) -> Operand<'a> {
        match (self.column, self.div == 1 && self.modulo == out_rows, self.modulo == 1) {
            (false, true, _) => Operand::Full(rows),
            (false, false, true) => Operand::Row(rows.row(0)),
            (true, _, true) => Operand::Scalar(&rows.row(0)[0]),
            (true, true, false) => Operand::Column(rows),
            (_, false, false) => Operand::Mapped { rows, div: self.div },
        }
    }
}

impl From<Broadcast> for Repeat {
    fn from(rule: Broadcast) -> Self {
        Repeat { div: rule.div, modulo: rule.modulo, column: rule.column }
    }
}

/// The gradient of an op that computes `program`.
///
/// # Errors
/// As [`Gradient::emit`].
pub fn gradient(program: &Program, g: &mut Gradient<'_>) -> Result<(), OpError> {
    let wanted: Vec<usize> = (0..program.inputs()).filter(|&i| g.wants(i)).collect();
    let derivative = program.gradient(&wanted);
    let mut operands: Vec<_> = (0..program.inputs()).map(|i| g.input(i)).collect();
    for o in 0..program.outputs().len() {
        operands.push(g.output_gradient_or_zeros(o)?);
    }
    let full = g.type_of(g.output(0));
    // an output that is one of the operands as it stands, such as the gradient of a sum, needs no node
    let passed = |o: usize| match derivative.instructions()[derivative.outputs()[o] as usize] {
        Instruction::Input(i) => Some(operands[i as usize]),
        _ => None,
    };
    let passed: Vec<_> = (0..wanted.len()).map(|o| passed(o).filter(|v| g.type_of(*v) == full)).collect();
    let computed: Vec<usize> = (0..wanted.len()).filter(|&o| passed[o].is_none()).collect();
    let mut made = Vec::new();
    if !computed.is_empty() {
        let (op, used) = Elementwise::compact(derivative.select_outputs(&computed), full.shape.clone());
        let operands: Vec<_> = used.into_iter().map(|i| operands[i]).collect();
        made = g.emit(op, &operands)?;
    }
    for (o, &input) in wanted.iter().enumerate() {
        let mut value = match passed[o] {
            Some(value) => value,
            None => made[computed.iter().position(|&c| c == o).expect("computed where not passed")],
        };
        let shape = g.type_of(g.input(input)).shape;
        if shape != full.shape {
            value = g.emit(SumTo { shape }, &[value])?[0];
        }
        g.set(input, value)?;
    }
    Ok(())
}

/// The kernel of an op that computes `program`. A random program's last input is the step counter.
///
/// # Errors
/// If a device cannot take so many inputs or outputs.
pub fn lower(program: &Program, node: &NodeView<'_>, target: Target) -> Result<Kernel, OpError> {
    match target {
        Target::Cuda => cuda(program, node),
        Target::Cpu => cpu(program, node),
    }
}

/// How each input of `program` repeats.
///
/// # Errors
/// Inputs that do not broadcast.
fn rules(program: &Program, inputs: &[TensorType], output: &TensorType) -> Result<Vec<Broadcast>, OpError> {
    let rule = |t: &TensorType| Broadcast::new(&t.shape, &output.shape).ok_or_else(|| "cannot broadcast".into());
    inputs[..program.inputs()].iter().map(rule).collect()
}

fn cuda(program: &Program, node: &NodeView<'_>) -> Result<Kernel, OpError> {
    let repeats: Vec<Repeat> = rules(program, node.inputs, &node.outputs[0])?.into_iter().map(Repeat::from).collect();
    let (program, seed) = (program.clone(), node.seed);
    Ok(Kernel::cuda(move |c| cuda::elementwise::launch(c, &program, &repeats, seed)))
}

fn cpu(program: &Program, node: &NodeView<'_>) -> Result<Kernel, OpError> {
    let bound = Bound::new(program, node.inputs, &node.outputs[0], node.seed)?;
    Ok(Kernel::cpu(move |a| {
        let inputs = bound.inputs(a, Some);
        let mut outputs = bound.outputs(a);
        let (n_inputs, n_outputs) = bound.sizes();
        let step = bound.step(a, n_inputs);
        bound.compiled.run(&inputs[..n_inputs], &mut outputs[..n_outputs], bound.seed, step);
        Ok(())
    }))
}

/// A program for the processor, with the way in which its inputs repeat.
pub struct Bound {
    /// The program.
    pub compiled: Compiled,
    /// Of the run.
    pub seed: u64,
    rules: Vec<Broadcast>,
    rows: usize,
    outputs: usize,
    random: bool,
}

impl Bound {
    /// For inputs of these types and outputs of that one.
    ///
    /// # Errors
    /// Too many inputs or outputs, or inputs that do not broadcast.
    pub fn new(program: &Program, inputs: &[TensorType], output: &TensorType, seed: u64) -> Result<Self, OpError> {
        let (n_inputs, outputs) = (program.inputs(), program.outputs().len());
        if n_inputs > MAX_INPUTS || outputs > MAX_OUTPUTS {
            let message = format!("{n_inputs} inputs and {outputs} outputs exceed {MAX_INPUTS} and {MAX_OUTPUTS}");
            return Err(message.into());
        }
        let rules = rules(program, inputs, output)?;
        let (compiled, rows) = (Compiled::new(program), output.rows());
        Ok(Self { compiled, seed, rules, rows, outputs, random: program.is_random() })
    }

    /// Numbers of inputs and outputs.
    pub fn sizes(&self) -> (usize, usize) {
        (self.rules.len(), self.outputs)
    }

    /// The inputs, of which `i` is input `port(i)` of the launch; one that is none is left for the caller to set.
    pub fn inputs<'a>(&self, a: &Arguments<'a>, port: impl Fn(usize) -> Option<usize>) -> [Operand<'a>; MAX_INPUTS] {
        let updated = |port: usize| (0..self.outputs).find(|&o| a.in_place(o) == Some(port));
        std::array::from_fn(|i| match (self.rules.get(i), port(i)) {
            (Some(rule), Some(port)) => match updated(port) {
                Some(o) => Operand::InPlace(o),
                None => rule.operand(a.rows(port), self.rows),
            },
            _ => Operand::Scalar(&0.0),
        })
    }

    /// The outputs, which are the first ones of the launch.
    pub fn outputs<'a>(&self, a: &Arguments<'a>) -> [Output<'a>; MAX_OUTPUTS] {
        std::array::from_fn(|o| if o < self.outputs { a.output(o) } else { Output::default() })
    }

    /// The number of the step for dropout masks, which a random program finds in input `port` of the launch.
    pub fn step(&self, a: &Arguments<'_>, port: usize) -> u64 {
        if self.random { a.slice::<i32>(port)[0] as u64 } else { 0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn broadcasts_map_rows() {
        let b = |input: &[usize], output: &[usize]| Broadcast::new(input, output).map(|b| (b.div, b.modulo, b.column));
        assert_eq!(b(&[2, 3, 4], &[2, 3, 4]), Some((1, 6, false)));
        assert_eq!(b(&[4], &[2, 3, 4]), Some((1, 1, false)));
        assert_eq!(b(&[], &[2, 3, 4]), Some((1, 1, true)));
        assert_eq!(b(&[3, 4], &[2, 3, 4]), Some((1, 3, false)));
        assert_eq!(b(&[2, 1, 4], &[2, 3, 4]), Some((3, 2, false)));
        assert_eq!(b(&[2, 3, 1], &[2, 3, 4]), Some((1, 6, true)));
        assert_eq!(b(&[2, 1, 5, 4], &[2, 3, 5, 4]), None);
        assert_eq!(b(&[1, 1, 4], &[1, 1, 4]), Some((1, 1, false)));
    }
}
