//! What follows from an expression: shape rule, gradient and kernel of elementwise ops.

use dataflow_kernels::cpu::interpreter::{Compiled, MAX_INPUTS, MAX_OUTPUTS, Operand};
use dataflow_kernels::cuda;
use dataflow_kernels::cuda::elementwise::Repeat;
use dataflow_kernels::device::{Kernel, Target};
use dataflow_kernels::expression::{Instruction, Program};
use dataflow_kernels::{Rows, RowsMut};

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
fn rules(program: &Program, node: &NodeView<'_>) -> Result<Vec<Broadcast>, OpError> {
    let shape = &node.outputs[0].shape;
    let rule = |t: &TensorType| Broadcast::new(&t.shape, shape).ok_or_else(|| "cannot broadcast".into());
    node.inputs[..program.inputs()].iter().map(rule).collect()
}

fn cuda(program: &Program, node: &NodeView<'_>) -> Result<Kernel, OpError> {
    let repeats: Vec<Repeat> = rules(program, node)?.into_iter().map(Repeat::from).collect();
    let (program, seed) = (program.clone(), node.seed);
    Ok(Kernel::cuda(move |c| cuda::elementwise::launch(c, &program, &repeats, seed)))
}

fn cpu(program: &Program, node: &NodeView<'_>) -> Result<Kernel, OpError> {
    let (n_inputs, n_outputs) = (program.inputs(), program.outputs().len());
    if n_inputs > MAX_INPUTS || n_outputs > MAX_OUTPUTS {
        let message = format!("{n_inputs} inputs and {n_outputs} outputs exceed {MAX_INPUTS} and {MAX_OUTPUTS}");
        return Err(message.into());
    }
    let rows = node.outputs[0].rows();
    let rules = rules(program, node)?;
    let compiled = Compiled::new(program);
    let (random, seed) = (program.is_random(), node.seed);
    Ok(Kernel::cpu(move |a| {
        let updated = |i: usize| (0..n_outputs).find(|&o| a.in_place(o) == Some(i));
        let inputs: [Operand<'_>; MAX_INPUTS] = std::array::from_fn(|i| match rules.get(i) {
            Some(rule) => match updated(i) {
                Some(o) => Operand::InPlace(o),
                None => rule.operand(a.rows(i), rows),
            },
            None => Operand::Scalar(&0.0),
        });
        let mut outputs: [RowsMut<'_>; MAX_OUTPUTS] =
            std::array::from_fn(|o| if o < n_outputs { a.rows_mut(o) } else { RowsMut::contiguous(&mut [], 1) });
        let step = if random { a.slice::<i32>(n_inputs)[0] as u64 } else { 0 };
        compiled.run(&inputs[..n_inputs], &mut outputs[..n_outputs], seed, step);
        Ok(())
    }))
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
