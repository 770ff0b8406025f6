//! The three products of a linear layer, and what is computed from their results while these are in the cache.

use std::fmt;
use std::ops::RangeInclusive;
use std::sync::Arc;

use dataflow_graph::builtin::Elementwise;
use dataflow_graph::components::Precision;
use dataflow_graph::elementwise::Bound;
use dataflow_graph::op::{Activations, Cost, Epilogue, NodeView, Op, OpError, Recompute, Slot};
use dataflow_graph::types::{DType, TensorType};
use dataflow_kernels::RowsMut;
use dataflow_kernels::cpu::interpreter::Operand;
use dataflow_kernels::cpu::matmul::{self, Factor, Init, Mat, matmul, matmul_bf16, matmul_then};
use dataflow_kernels::cpu::matvec::{self, Weights};
use dataflow_kernels::cpu::reduce::copy_rows;
use dataflow_kernels::cuda::call::{self as cuda, Product, Start};
use dataflow_kernels::cuda::layout;
use dataflow_kernels::device::{Arguments, Bf16, Element, Kernel, KernelError, Target};
use dataflow_kernels::expression::Instruction;

/// Which product, with the inputs of its node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Factors {
    /// (x, W, b?) to `x W^T + b`
    Forward { bias: bool },
    /// (dy, W, base?) to `dy W + base`
    Input { adding: bool },
    /// (dy, x) to `dy^T x`
    Weight,
}

impl Factors {
    /// Number of inputs.
    fn inputs(self) -> usize {
        2 + usize::from(matches!(self, Self::Forward { bias: true } | Self::Input { adding: true }))
    }

    fn adding(self) -> bool {
        self == Self::Input { adding: true }
    }

    /// The type of the result.
    pub(crate) fn result(self, inputs: &[TensorType]) -> TensorType {
        match self {
            Self::Forward { .. } => inputs[0].with_cols(inputs[1].rows()),
            Self::Input { .. } => inputs[0].with_cols(inputs[1].cols()),
            Self::Weight => TensorType::f32([inputs[0].cols(), inputs[1].cols()]),
        }
    }

    /// The work of the product alone.
    pub(crate) fn cost(self, node: &NodeView<'_>) -> Cost {
        let inner = if self == Self::Weight { node.inputs[0].rows() } else { node.inputs[0].cols() };
        Cost { flops: 2.0 * self.result(node.inputs).elements() as f64 * inner as f64, bytes: node.bytes() }
    }

    /// The kernel, with or without an epilogue.
    pub(crate) fn lower(self, node: &NodeView<'_>, target: Target, then: Option<&Epilogue>) -> Result<Kernel, OpError> {
        match target {
            Target::Cuda if then.is_some() => Err("epilogues are for the processor".into()),
            Target::Cuda => Ok(self.cuda(node)),
            Target::Cpu => {
                // weights in half precision are for decoding alone
                let narrow = matches!(self, Self::Forward { .. }) && node.inputs[1].dtype == DType::Bf16;
                self.cpu(node, narrow, then)
            }
        }
    }

    fn cuda(self, node: &NodeView<'_>) -> Kernel {
        let bf16 = node.precision == Precision::Bf16;
        Kernel::cuda(move |c| {
            let (mut first, second) = (c.input(0), c.input(1));
            if first.dtype != second.dtype {
                // generation with narrow weights: factors of a product are of one type
                let rounded = c.scratch(first.rows, first.cols, second.dtype);
                layout::copy_rows(c, first, rounded)?;
                first = rounded;
            }
            let (a, b) = match self {
                Self::Forward { .. } => (cuda::Mat::normal(first), cuda::Mat::transposed(second)),
                Self::Input { .. } => (cuda::Mat::normal(first), cuda::Mat::normal(second)),
                Self::Weight => (cuda::Mat::transposed(first), cuda::Mat::normal(second)),
            };
            let start = match self {
                Self::Forward { bias: true } => Start::Bias(c.input(2)),
                Self::Input { adding: true } => Start::Add(c.input(2)),
                _ => Start::Zero,
            };
            c.product(Product { a, b, y: c.output(0), start, batches: 1, bf16 })
        })
    }

    /// The input of the launch that is input `i` of the program; none for the result of the product.
    fn port(self, then: &Epilogue, i: usize) -> Option<usize> {
        (i != then.result).then(|| self.inputs() + i - usize::from(i > then.result))
    }

    /// The types of the program's inputs.
    fn then_inputs(self, node: &NodeView<'_>, then: &Epilogue) -> Vec<TensorType> {
        let tensor = |i| self.port(then, i).map_or_else(|| self.result(node.inputs), |port| node.inputs[port].clone());
        (0..then.program.inputs()).map(tensor).collect()
    }

    fn cpu(self, node: &NodeView<'_>, narrow: bool, then: Option<&Epilogue>) -> Result<Kernel, OpError> {
        let pairs = node.precision == Precision::Bf16;
        let few = node.inputs[0].rows() <= matvec::MOST_ROWS && !pairs && matches!(self, Self::Forward { .. });
        let thin = narrow || few;
        let Some(then) = then else {
            return Ok(Kernel::cpu(move |a| {
                let mut y = a.rows_mut(0);
                if thin {
                    self.few(a, narrow, y);
                } else {
                    let (init, (m, n)) = (self.init(a, 0, Some(&mut y)), self.factors(a));
                    if pairs { matmul_bf16(y, m, n, init) } else { matmul(y, m, n, init) }
                }
                Ok(())
            }));
        };
        let bound = Bound::new(&then.program, &self.then_inputs(node, then), &node.outputs[0], node.seed)?;
        let then = then.clone();
        Ok(Kernel::cpu(move |a| self.cpu_then(a, &bound, &then, thin.then_some(narrow), pairs)))
    }

    fn cpu_then(
        self,
        a: &Arguments<'_>,
        bound: &Bound,
        then: &Epilogue,
        few: Option<bool>,
        pairs: bool,
    ) -> Result<(), KernelError> {
        let (n_inputs, n_outputs) = bound.sizes();
        let mut inputs = bound.inputs(a, |i| self.port(then, i));
        let mut outputs = bound.outputs(a);
        let mut kept = then.kept.then(|| a.rows_mut::<f32>(n_outputs));
        let step = bound.step(a, a.inputs() - 1);
        let (inputs, outputs) = (&mut inputs[..n_inputs], &mut outputs[..n_outputs]);
        let mut holding = kept.as_mut().map(RowsMut::reborrow).or_else(|| outputs[0].single());
        if let Some(narrow) = few {
            self.few(a, narrow, holding.expect("outputs are rounded where factors are, which few rows are not"));
            inputs[then.result] = kept.as_ref().map_or(Operand::InPlace(0), |y| Operand::Full(y.as_rows()));
            bound.compiled.run(inputs, outputs, bound.seed, step);
            return Ok(());
        }
        let holder = if then.kept { n_outputs } else { 0 };
        let init = self.init(a, holder, holding.as_mut());
        let epilogue =
            matmul::Epilogue { program: &bound.compiled, inputs, result: then.result, outputs, seed: bound.seed, step };
        matmul_then(kept, self.factors(a), init, pairs, epilogue);
        Ok(())
    }
}

impl Factors {
    /// The factors on the processor.
    fn factors<'a>(self, a: &Arguments<'a>) -> (Factor<'a>, Factor<'a>) {
        fn mat<'a, T: Element>(a: &Arguments<'a>, i: usize, transposed: bool) -> Mat<'a, T> {
            if transposed { Mat::Transposed(a.rows(i)) } else { Mat::Normal(a.rows(i)) }
        }
        let factor = |i, transposed| match a.input_dtype(i) {
            DType::Bf16 => mat::<Bf16>(a, i, transposed).into(),
            _ => mat::<f32>(a, i, transposed).into(),
        };
        (factor(0, self == Self::Weight), factor(1, matches!(self, Self::Forward { .. })))
    }

    /// The inputs that may be in `bf16`.
    pub(crate) fn rounds(self) -> Activations {
        Activations::new(if self == Self::Weight { 0..2 } else { 0..1 }, [])
    }

    /// What the product is added to; a base that does not lie in `y`, which is output `holder`, is copied there.
    fn init<'a>(self, a: &Arguments<'a>, holder: usize, y: Option<&mut RowsMut<'_>>) -> Init<'a> {
        match self {
            Self::Forward { bias: true } => Init::Bias(a.slice(2)),
            Self::Input { adding: true } => {
                if let (false, Some(y)) = (a.in_place(holder) == Some(2), y) {
                    copy_rows(a.rows(2), y.reborrow());
                }
                Init::Accumulate
            }
            _ => Init::Zero,
        }
    }

    /// The product of a few rows, as in decoding, or of weights in half precision.
    fn few(self, a: &Arguments<'_>, narrow: bool, y: RowsMut<'_>) {
        let weights = if narrow { Weights::Bf16(a.rows(1)) } else { Weights::F32(a.rows(1)) };
        let bias = (self == Self::Forward { bias: true }).then(|| a.slice(2));
        matvec::product(a.rows(0), weights, bias, y);
    }
}

/// The product of two matrices with factors of this precision.
pub(crate) fn product_in(precision: Precision) -> fn(RowsMut<'_>, Mat<'_>, Mat<'_>, Init<'_>) {
    match precision {
        Precision::F32 => |c, a, b, init| matmul(c, a, b, init),
        Precision::Bf16 => |c, a, b, init| matmul_bf16(c, a, b, init),
    }
}

/// A product and an elementwise program over its result. Its outputs are those of the program, then the result if that is
/// kept.
pub(crate) struct ProductThen {
    factors: Factors,
    epilogue: Epilogue,
}

impl ProductThen {
    pub(crate) fn of(factors: Factors, epilogue: Epilogue) -> Option<Arc<dyn Op>> {
        Some(Arc::new(Self { factors, epilogue }))
    }

    fn outputs(&self) -> usize {
        self.epilogue.program.outputs().len()
    }
}

impl fmt::Debug for ProductThen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = match self.factors {
            Factors::Forward { .. } => "LinearElementwise",
            Factors::Input { .. } => "LinearInputElementwise",
            Factors::Weight => "LinearWeightElementwise",
        };
        f.debug_tuple(name).field(&self.factors).field(&self.epilogue).finish()
    }
}

impl Op for ProductThen {
    fn arity(&self) -> RangeInclusive<usize> {
        let n = self.factors.inputs() + self.epilogue.program.inputs() - 1;
        n..=n
    }
    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, OpError> {
        let result = self.factors.result(inputs);
        Ok(vec![result; self.outputs() + usize::from(self.epilogue.kept)])
    }
    fn products(&self) -> bool {
        true
    }
    /// All outputs but one that the product is added to.
    fn rounds(&self, _: usize) -> Activations {
        let first = usize::from(!self.epilogue.kept && self.factors.adding());
        let outputs = if self.epilogue.updates { 0..0 } else { first..self.outputs() };
        Activations { outputs: outputs.collect(), ..self.factors.rounds() }
    }
    fn epilogue(&self) -> Option<&Epilogue> {
        Some(&self.epilogue)
    }
    fn lower(&self, node: &NodeView<'_>, target: Target) -> Result<Kernel, OpError> {
        self.factors.lower(node, target, Some(&self.epilogue))
    }
    /// The output that holds the product's result until the program runs can be nothing else.
    fn in_place(&self) -> Vec<(usize, usize)> {
        if self.epilogue.updates {
            return Vec::new();
        }
        let holder = if self.epilogue.kept { self.outputs() } else { 0 };
        let base = self.factors.adding().then_some((holder, 2));
        let others = self.factors.inputs()..*self.arity().start();
        let free = (0..self.outputs()).filter(|o| *o != holder);
        base.into_iter().chain(free.flat_map(|o| others.clone().map(move |i| (o, i)))).collect()
    }
    fn updates(&self) -> Vec<(usize, usize)> {
        if self.epilogue.updates { vec![(0, self.factors.inputs())] } else { Vec::new() }
    }
    fn strided(&self) -> bool {
        true
    }
    fn uses_step(&self) -> bool {
        self.epilogue.program.is_random()
    }
    fn recompute(&self) -> Option<Recompute> {
        let Epilogue { program, kept, .. } = &self.epilogue;
        if !kept || program.is_random() {
            return None;
        }
        let port = |i| self.factors.port(&self.epilogue, i).map_or(Slot::Output(self.outputs()), Slot::Input);
        let inputs = (0..program.inputs()).map(port).collect();
        let op = Arc::new(Elementwise { program: program.clone(), shape: None });
        Some(Recompute { op, inputs, outputs: (0..self.outputs()).collect() })
    }
    fn cost(&self, node: &NodeView<'_>) -> Cost {
        let works = |i: &&Instruction| !matches!(i, Instruction::Input(_) | Instruction::Constant(_));
        let per_element = self.epilogue.program.instructions().iter().filter(works).count() as f64;
        let elements = node.outputs[0].elements() as f64;
        let product = self.factors.cost(node);
        Cost { flops: product.flops + per_element * elements, ..product }
    }
}
