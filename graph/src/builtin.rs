//! The ops that the compiler itself writes into a graph.

use std::ops::RangeInclusive;

use dataflow_kernels::cpu::reduce;
use dataflow_kernels::cuda;
use dataflow_kernels::device::{Kernel, KernelError, Target};
use dataflow_kernels::expression::{Argument, Builder, Program, Register};

use crate::elementwise::{self, Broadcast};
use crate::gradient::Gradient;
use crate::op::{Activations, NodeView, Op, OpError, View};
use crate::types::{DType, TensorType};

/// An expression over its inputs, all outputs of one shape.
#[derive(Clone, Debug)]
pub struct Elementwise {
    /// What it computes.
    pub program: Program,
    /// The shape of the outputs, if it is not what the inputs broadcast to.
    pub shape: Option<Vec<usize>>,
}

impl Elementwise {
    /// One result, of the shape that the inputs broadcast to.
    pub fn of(inputs: usize, form: impl FnOnce(&mut Builder, &[Register]) -> Register) -> Self {
        Self { program: Program::new(inputs, |b, x| vec![form(b, x)]), shape: None }
    }

    /// The op without the inputs that have no influence, and the numbers of those that stay.
    pub fn compact(program: Program, shape: Vec<usize>) -> (Self, Vec<usize>) {
        let used: Vec<usize> = (0..program.inputs()).filter(|&i| program.uses_input(i)).collect();
        let arguments: Vec<Argument<'_>> = (0..program.inputs())
            .map(|i| match used.iter().position(|&u| u == i) {
                Some(new) => Argument::Input(new),
                None => Argument::Constant(0.0),
            })
            .collect();
        (Self { program: program.compose(used.len(), &arguments), shape: Some(shape) }, used)
    }
}

/// The sum of `n` tensors of one shape.
pub fn sum(n: usize) -> Elementwise {
    let program = Program::new(n, |b, x| {
        let total = x[1..].iter().fold(x[0], |total, &x| b.add(total, x));
        vec![total]
    });
    Elementwise { program, shape: None }
}

impl Op for Elementwise {
    fn arity(&self) -> RangeInclusive<usize> {
        self.program.inputs()..=self.program.inputs()
    }
    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, OpError> {
        let one = match &self.shape {
            Some(shape) => TensorType::f32(shape.clone()),
            None => elementwise::infer(inputs)?.remove(0),
        };
        Ok(vec![one; self.program.outputs().len()])
    }
    fn expression(&self, _inputs: usize) -> Option<Program> {
        Some(self.program.clone())
    }
    fn strided(&self) -> bool {
        true
    }
    fn uses_step(&self) -> bool {
        self.program.is_random()
    }
}

/// A tensor of one number everywhere.
#[derive(Clone, Debug)]
pub struct Fill {
    /// The number.
    pub value: f32,
    /// The shape.
    pub shape: Vec<usize>,
}

impl Op for Fill {
    fn arity(&self) -> RangeInclusive<usize> {
        0..=0
    }
    fn infer(&self, _: &[TensorType]) -> Result<Vec<TensorType>, OpError> {
        Ok(vec![TensorType::f32(self.shape.clone())])
    }
    fn lower(&self, _: &NodeView<'_>, target: Target) -> Result<Kernel, OpError> {
        let value = self.value;
        match target {
            Target::Cuda => Ok(Kernel::cuda(move |c| cuda::layout::fill(c, c.output(0), value))),
            Target::Cpu => Ok(Kernel::cpu(move |a| {
                let mut out = a.rows_mut::<f32>(0);
                (0..out.rows()).for_each(|r| out.row(r).fill(value));
                Ok(())
            })),
        }
    }
    fn strided(&self) -> bool {
        true
    }
}

/// The sum over the dimensions in which a tensor of this shape was broadcast: the gradient of broadcasting.
#[derive(Clone, Debug)]
pub struct SumTo {
    /// The shape to sum to.
    pub shape: Vec<usize>,
}

impl Op for SumTo {
    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, OpError> {
        if Broadcast::new(&self.shape, &inputs[0].shape).is_none() {
            return Err(format!("cannot sum {} to {:?}", inputs[0], self.shape).into());
        }
        Ok(vec![TensorType::f32(self.shape.clone())])
    }
    fn activations(&self, _: usize) -> Activations {
        Activations::new([0], [])
    }
    fn gradient(&self, g: &mut Gradient<'_>) -> Result<(), OpError> {
        let Some(dy) = g.output_gradient(0) else { return Ok(()) };
        let shape = Some(g.type_of(g.input(0)).shape);
        let dx = g.emit(Elementwise { program: Program::new(1, |_, x| vec![x[0]]), shape }, &[dy])?[0];
        g.set(0, dx)
    }
    fn lower(&self, node: &NodeView<'_>, target: Target) -> Result<Kernel, OpError> {
        let rule = Broadcast::new(&self.shape, &node.inputs[0].shape).expect("checked by `infer`");
        match target {
            Target::Cuda => Ok(Kernel::cuda(move |c| cuda::reduce::sum_to(c, c.input(0), c.output(0), rule.into()))),
            Target::Cpu => Ok(Kernel::cpu(move |a| {
                let x = a.rows::<f32>(0);
                match (rule.column, rule.modulo, rule.div) {
                    (true, 1, _) => a.slice_mut(0)[0] = reduce::sum_all(x),
                    (true, _, 1) => reduce::sum_cols(x, a.slice_mut(0)),
                    (false, 1, _) => reduce::sum_rows(x, a.slice_mut(0)),
                    (false, _, 1) => reduce::sum_periodic(x, a.rows_mut(0)),
                    (false, ..) if rule.div * rule.modulo == x.rows() => reduce::sum_groups(x, a.rows_mut(0)),
                    _ => return Err(KernelError("this form of broadcasting has no gradient kernel".into())),
                }
                Ok(())
            })),
        }
    }
}

/// A tensor without gaps from one with gaps.
#[derive(Clone, Debug)]
pub struct Copy;

impl Op for Copy {
    fn expression(&self, _: usize) -> Option<Program> {
        Some(Program::new(1, |_, x| vec![x[0]]))
    }
    fn strided(&self) -> bool {
        true
    }
}

/// The same numbers in another type, rounded where that has fewer bits; for CUDA devices, see
/// [`mixed_precision`](crate::systems::mixed_precision).
#[derive(Clone, Debug)]
pub struct Cast {
    /// The type.
    pub to: DType,
}

impl Op for Cast {
    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, OpError> {
        Ok(vec![TensorType { shape: inputs[0].shape.clone(), dtype: self.to }])
    }
    fn lower(&self, node: &NodeView<'_>, target: Target) -> Result<Kernel, OpError> {
        match target {
            // code is generated for the types of the tensors
            Target::Cuda => elementwise::lower(&Program::new(1, |_, x| vec![x[0]]), node, target),
            Target::Cpu => Err(OpError::no_kernel(target)),
        }
    }
    fn strided(&self) -> bool {
        true
    }
}

/// A matrix in another type, with rows and columns of zeros behind its own; for CUDA devices, see
/// [`align_products`](crate::systems::align_products).
#[derive(Clone, Debug)]
pub struct Pad {
    /// The type.
    pub to: DType,
    /// The shape with the zeros.
    pub shape: Vec<usize>,
}

impl Op for Pad {
    fn infer(&self, _: &[TensorType]) -> Result<Vec<TensorType>, OpError> {
        Ok(vec![TensorType { shape: self.shape.clone(), dtype: self.to }])
    }
    fn lower(&self, _: &NodeView<'_>, target: Target) -> Result<Kernel, OpError> {
        match target {
            Target::Cuda => Ok(Kernel::cuda(|c| cuda::layout::copy_rows(c, c.input(0), c.output(0)))),
            Target::Cpu => Err(OpError::no_kernel(target)),
        }
    }
    fn strided(&self) -> bool {
        true
    }
}

/// The first rows and columns of a matrix, where they lie.
#[derive(Clone, Debug)]
pub struct Corner {
    /// The shape of that part.
    pub shape: Vec<usize>,
}

impl Op for Corner {
    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, OpError> {
        Ok(vec![TensorType { shape: self.shape.clone(), dtype: inputs[0].dtype }])
    }
    fn view(&self, _: &[TensorType]) -> Option<View> {
        Some(View::Columns(vec![0]))
    }
    fn strided(&self) -> bool {
        true
    }
}

/// Two matrices side by side, which are made there.
#[derive(Clone, Debug)]
pub struct Beside;

impl Op for Beside {
    fn arity(&self) -> RangeInclusive<usize> {
        2..=2
    }
    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, OpError> {
        Ok(vec![inputs[0].with_cols(inputs[0].cols() + inputs[1].cols())])
    }
    fn view(&self, inputs: &[TensorType]) -> Option<View> {
        Some(View::Gather(vec![0, inputs[0].cols()]))
    }
    fn strided(&self) -> bool {
        true
    }
}

/// Adds the second input to the first, in place: gradients of several micro-batches.
#[derive(Clone, Debug)]
pub struct Accumulate;

impl Op for Accumulate {
    fn arity(&self) -> RangeInclusive<usize> {
        2..=2
    }
    fn expression(&self, _: usize) -> Option<Program> {
        Some(sum(2).program)
    }
    fn updates(&self) -> Vec<(usize, usize)> {
        vec![(0, 0)]
    }
    fn strided(&self) -> bool {
        true
    }
}

/// Sets a state to 0.
#[derive(Clone, Debug)]
pub struct Clear;

impl Op for Clear {
    fn lower(&self, _: &NodeView<'_>, target: Target) -> Result<Kernel, OpError> {
        match target {
            Target::Cuda => Ok(Kernel::cuda(|c| cuda::layout::fill(c, c.output(0), 0.0))),
            Target::Cpu => Ok(Kernel::cpu(|a| {
                a.slice_mut::<f32>(0).fill(0.0);
                Ok(())
            })),
        }
    }
    fn updates(&self) -> Vec<(usize, usize)> {
        vec![(0, 0)]
    }
}

/// Adds 1 to a counter.
#[derive(Clone, Debug)]
pub struct Increment;

impl Op for Increment {
    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, OpError> {
        Ok(vec![inputs[0].clone()])
    }
    fn lower(&self, _: &NodeView<'_>, target: Target) -> Result<Kernel, OpError> {
        match target {
            Target::Cuda => Ok(Kernel::cuda(|c| cuda::layout::increment(c, c.output(0)))),
            Target::Cpu => Ok(Kernel::cpu(|a| {
                a.slice_mut::<i32>(0)[0] += 1;
                Ok(())
            })),
        }
    }
    fn updates(&self) -> Vec<(usize, usize)> {
        vec![(0, 0)]
    }
}
