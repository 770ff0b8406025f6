//! Matrix products: the linear layer and the batched product.

use std::ops::RangeInclusive;
use std::sync::Arc;

use dataflow_graph::builtin::{SumTo, sum};
use dataflow_graph::format::number::{Flag, Real, Size};
use dataflow_graph::gradient::Gradient;
use dataflow_graph::initializer::Initializer;
use dataflow_graph::op::{Activations, Axes, Cost, Epilogue, Merged, NodeView, Of, Op, OpError, Pair, Parameter};
use dataflow_graph::registry::{Info, Registry};
use dataflow_graph::systems::compound::Decomposition;
use dataflow_graph::types::TensorType;
use dataflow_kernels::cpu::matmul::{Init, Mat, matmul, matmul_on_this_thread};
use dataflow_kernels::cuda::call::{self as cuda, Product, Start};
use dataflow_kernels::device::{Kernel, Target};
use dataflow_kernels::{Rows, RowsMut};
use serde::{Deserialize, Serialize};

use crate::norm::is_sum;
use crate::product::{Factors, ProductThen};

/// `y = x W^T + b` on the last dimension: x `[.., in]`, W `[out, in]`, b `[out]`, y `[.., out]`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Linear {
    out: Size,
    #[serde(default)]
    bias: Flag,
    /// The parameter to use as W, below the model's prefix: `embedding.weight`.
    #[serde(default)]
    tie: Option<String>,
    /// Of W; uniform on `±in^-1/2` by default, as in PyTorch.
    #[serde(default)]
    init: Option<Initializer>,
    /// Of b; uniform on `±in^-1/2` by default, as in PyTorch.
    #[serde(default)]
    bias_init: Option<Initializer>,
}

impl Op for Linear {
    fn tokenwise(&self) -> bool {
        true
    }
    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, OpError> {
        if inputs[0].shape.is_empty() || inputs[0].cols() == 0 {
            return Err("the input needs a last dimension of at least 1".into());
        }
        if *self.out == 0 {
            return Err("`out` must be at least 1".into());
        }
        Ok(vec![inputs[0].with_cols(*self.out)])
    }
    fn parameters(&self, inputs: &[TensorType]) -> Result<Vec<Parameter>, OpError> {
        let input = inputs[0].cols();
        let default = Initializer::Uniform { bound: Real((input as f64).powf(-0.5)) };
        let init = self.init.clone().unwrap_or(default.clone());
        let mut parameters =
            vec![Parameter { tie: self.tie.clone(), ..Parameter::new("weight", [*self.out, input], init) }];
        if *self.bias {
            parameters.push(Parameter::new("bias", [*self.out], self.bias_init.clone().unwrap_or(default)));
        }
        Ok(parameters)
    }
    fn narrow(&self, parameter: usize) -> bool {
        parameter == 0
    }
    fn gradient(&self, g: &mut Gradient<'_>) -> Result<(), OpError> {
        let (x, weight) = (g.input(0), g.input(1));
        let Some(dy) = g.output_gradient(0) else { return Ok(()) };
        if g.wants(0) {
            let dx = g.emit(LinearInput { adding: false }, &[dy, weight])?[0];
            g.set(0, dx)?;
        }
        if g.wants(1) {
            let dw = g.emit(LinearWeight, &[dy, x])?[0];
            g.set(1, dw)?;
        }
        if g.inputs() > 2 && g.wants(2) {
            let db = g.emit(SumTo { shape: vec![*self.out] }, &[dy])?[0];
            g.set(2, db)?;
        }
        Ok(())
    }
    fn decompose(&self, d: &mut Decomposition<'_>) -> Result<bool, OpError> {
        let &[x, weight, bias] = d.inputs() else { return Ok(false) };
        let product = d.emit(Self { bias: Flag(false), ..self.clone() }, &[x, weight])?;
        let y = d.emit(sum(2), &[product, bias])?;
        d.set(0, y);
        Ok(true)
    }
    fn products(&self) -> bool {
        true
    }
    fn lower(&self, node: &NodeView<'_>, target: Target) -> Result<Kernel, OpError> {
        self.factors().lower(node, target, None)
    }
    fn with_epilogue(&self, epilogue: Epilogue) -> Option<Arc<dyn Op>> {
        ProductThen::of(self.factors(), epilogue)
    }
    fn axes(&self, inputs: usize) -> Option<Axes> {
        let all = vec![['m', 'k'], ['n', 'k'], ['1', 'n']];
        Some(Axes { inputs: all.into_iter().take(inputs).collect(), outputs: vec![['m', 'n']] })
    }
    fn activations(&self, inputs: usize) -> Activations {
        Activations::new(0..inputs, [0])
    }
    fn rounds(&self, _: usize) -> Activations {
        self.factors().rounds()
    }
    fn strided(&self) -> bool {
        true
    }
    fn cost(&self, node: &NodeView<'_>) -> Cost {
        self.factors().cost(node)
    }
}

impl Linear {
    fn factors(&self) -> Factors {
        Factors::Forward { bias: *self.bias }
    }
}

fn product_cost(node: &NodeView<'_>, inner: usize) -> Cost {
    Cost { flops: 2.0 * node.outputs[0].elements() as f64 * inner as f64, bytes: node.bytes() }
}

/// `dx = dy W + base`: the gradient of [`Linear`] with respect to its input, added to another gradient if it is
/// `adding`. (dy, W, base?) to dx, which may overwrite the base.
#[derive(Clone, Debug)]
struct LinearInput {
    adding: bool,
}

impl LinearInput {
    fn factors(&self) -> Factors {
        Factors::Input { adding: self.adding }
    }
}

impl Op for LinearInput {
    fn arity(&self) -> RangeInclusive<usize> {
        2..=3
    }
    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, OpError> {
        Ok(vec![self.factors().result(inputs)])
    }
    fn merge(&self, pair: &Pair<'_>) -> Option<Merged> {
        let own = pair.producer.downcast::<Self>()?;
        let dx = pair.producer_inputs[0].with_cols(pair.producer_inputs[1].cols());
        if own.adding || pair.shared || !is_sum(pair.consumer, pair.consumer_inputs, &dx) {
            return None;
        }
        let inputs = vec![Of::Producer(0), Of::Producer(1), Of::Consumer(1 - pair.input)];
        Some(Merged { op: Arc::new(Self { adding: true }), inputs, outputs: vec![Of::Consumer(0)] })
    }
    fn products(&self) -> bool {
        true
    }
    fn lower(&self, node: &NodeView<'_>, target: Target) -> Result<Kernel, OpError> {
        self.factors().lower(node, target, None)
    }
    fn with_epilogue(&self, epilogue: Epilogue) -> Option<Arc<dyn Op>> {
        ProductThen::of(self.factors(), epilogue)
    }
    fn in_place(&self) -> Vec<(usize, usize)> {
        if self.adding { vec![(0, 2)] } else { Vec::new() }
    }
    fn axes(&self, inputs: usize) -> Option<Axes> {
        let all = vec![['m', 'n'], ['n', 'k'], ['m', 'k']];
        Some(Axes { inputs: all.into_iter().take(inputs).collect(), outputs: vec![['m', 'k']] })
    }
    fn activations(&self, inputs: usize) -> Activations {
        Activations::new(0..inputs, [0])
    }
    fn rounds(&self, _: usize) -> Activations {
        self.factors().rounds()
    }
    fn strided(&self) -> bool {
        true
    }
    fn cost(&self, node: &NodeView<'_>) -> Cost {
        self.factors().cost(node)
    }
}

/// `dW = dy^T x`: the gradient of [`Linear`] with respect to its weight.
#[derive(Clone, Debug)]
struct LinearWeight;

impl Op for LinearWeight {
    fn arity(&self) -> RangeInclusive<usize> {
        2..=2
    }
    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, OpError> {
        Ok(vec![Factors::Weight.result(inputs)])
    }
    fn products(&self) -> bool {
        true
    }
    fn lower(&self, node: &NodeView<'_>, target: Target) -> Result<Kernel, OpError> {
        Factors::Weight.lower(node, target, None)
    }
    fn with_epilogue(&self, epilogue: Epilogue) -> Option<Arc<dyn Op>> {
        ProductThen::of(Factors::Weight, epilogue)
    }
    fn axes(&self, _: usize) -> Option<Axes> {
        Some(Axes { inputs: vec![['m', 'n'], ['m', 'k']], outputs: vec![['n', 'k']] })
    }
    fn activations(&self, _: usize) -> Activations {
        Activations::new([0, 1], [])
    }
    fn rounds(&self, _: usize) -> Activations {
        Factors::Weight.rounds()
    }
    fn strided(&self) -> bool {
        true
    }
    fn cost(&self, node: &NodeView<'_>) -> Cost {
        Factors::Weight.cost(node)
    }
}

/// `y = op(a) op(b)` for equal leading dimensions: a `[.., m, k]`, b `[.., k, n]`, y `[.., m, n]`, of which
/// each may be given transposed.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MatMul {
    #[serde(default)]
    transpose_a: Flag,
    #[serde(default)]
    transpose_b: Flag,
}

impl MatMul {
    /// Rows and columns of an operand as it enters the product.
    fn sides(tensor: &TensorType, transposed: bool) -> Result<(usize, usize), OpError> {
        let [.., m, n] = tensor.shape[..] else { return Err("the inputs need two dimensions at least".into()) };
        Ok(if transposed { (n, m) } else { (m, n) })
    }
}

impl Op for MatMul {
    fn arity(&self) -> RangeInclusive<usize> {
        2..=2
    }
    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, OpError> {
        let (m, k) = Self::sides(&inputs[0], *self.transpose_a)?;
        let (l, n) = Self::sides(&inputs[1], *self.transpose_b)?;
        let leading = |t: &TensorType| t.shape[..t.shape.len() - 2].to_vec();
        let mut shape = leading(&inputs[0]);
        if k != l || shape != leading(&inputs[1]) {
            return Err("the inner or leading dimensions differ".into());
        }
        shape.extend([m, n]);
        Ok(vec![TensorType::f32(shape)])
    }
    fn gradient(&self, g: &mut Gradient<'_>) -> Result<(), OpError> {
        let (a, b, ta, tb) = (g.input(0), g.input(1), *self.transpose_a, *self.transpose_b);
        let Some(dy) = g.output_gradient(0) else { return Ok(()) };
        let op = |transpose_a: bool, transpose_b: bool| MatMul {
            transpose_a: Flag(transpose_a),
            transpose_b: Flag(transpose_b),
        };
        if g.wants(0) {
            // d op(a) = dy op(b)^T, and transposed again where a was
            let da = if ta { g.emit(op(tb, true), &[b, dy])? } else { g.emit(op(false, !tb), &[dy, b])? };
            g.set(0, da[0])?;
        }
        if g.wants(1) {
            let db = if tb { g.emit(op(true, ta), &[dy, a])? } else { g.emit(op(!ta, false), &[a, dy])? };
            g.set(1, db[0])?;
        }
        Ok(())
    }
    fn lower(&self, node: &NodeView<'_>, target: Target) -> Result<Kernel, OpError> {
        let (ta, tb) = (*self.transpose_a, *self.transpose_b);
        let rows = |t: &TensorType| t.shape[t.shape.len() - 2];
        let (ra, rb, ry) = (rows(&node.inputs[0]), rows(&node.inputs[1]), rows(&node.outputs[0]));
        let batches = node.outputs[0].shape[..node.outputs[0].shape.len() - 2].iter().product();
        match target {
            Target::Cuda => Ok(Kernel::cuda(move |c| {
                let a = cuda::Mat { tensor: c.input(0), transposed: ta };
                let b = cuda::Mat { tensor: c.input(1), transposed: tb };
                c.product(Product { a, b, y: c.output(0), start: Start::Zero, batches, bf16: false })
            })),
            Target::Cpu => Ok(Kernel::cpu(move |args| {
                let (a, b, y) = (args.rows::<f32>(0), args.rows::<f32>(1), args.rows_mut::<f32>(0));
                batched(batches, (a, ra, ta), (b, rb, tb), y, ry);
                Ok(())
            })),
        }
    }
    fn strided(&self) -> bool {
        true
    }
    fn cost(&self, node: &NodeView<'_>) -> Cost {
        product_cost(node, Self::sides(&node.inputs[0], *self.transpose_a).map_or(0, |s| s.1))
    }
}

/// One product for each of `batches` blocks of rows.
fn batched(
    batches: usize,
    (a, rows_a, transpose_a): (Rows<'_>, usize, bool),
    (b, rows_b, transpose_b): (Rows<'_>, usize, bool),
    mut y: RowsMut<'_>,
    rows_y: usize,
) {
    fn mat(m: Rows<'_>, transposed: bool) -> Mat<'_> {
        if transposed { Mat::Transposed(m) } else { Mat::Normal(m) }
    }
    let block = |i: usize| {
        let a = mat(a.slice_rows(i * rows_a, (i + 1) * rows_a), transpose_a);
        (a, mat(b.slice_rows(i * rows_b, (i + 1) * rows_b), transpose_b))
    };
    if batches == 1 {
        let (a, b) = block(0);
        return matmul(y, a, b, Init::Zero);
    }
    y.for_each_block(rows_y, |i, y| {
        let (a, b) = block(i);
        matmul_on_this_thread(y, a, b, Init::Zero);
    });
}

pub(crate) fn register(registry: &mut Registry) {
    registry.op::<Linear>(Info {
        name: "Linear",
        about: "A linear layer on the last dimension.",
        inputs: &["x [.., in]"],
        formula: "x W^T + b",
        source: "",
        example: "(out: 8)",
    });
    registry.op::<MatMul>(Info {
        name: "MatMul",
        about: "The matrix product of the last two dimensions, for equal leading ones.",
        inputs: &["a [.., m, k]", "b [.., k, n]"],
        formula: "a b",
        source: "",
        example: "",
    });
}
