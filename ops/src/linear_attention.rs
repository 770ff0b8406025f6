//! Linear recurrences with a matrix state for every head: RWKV's WKV operator, retention, and gated linear
//! attention. They train in chunked form; what is kept for the backward pass are states at chunk boundaries.

use std::ops::RangeInclusive;
use std::sync::Arc;

use dataflow_graph::components::{Precision, Recurrence};
use dataflow_graph::format::number::{Flag, Real, Size};
use dataflow_graph::gradient::Gradient;
use dataflow_graph::op::{Activations, Cost, NodeView, Op, OpError, Recurrent};
use dataflow_graph::registry::{Info, Registry};
use dataflow_graph::types::TensorType;
use dataflow_kernels::RowsMut;
use dataflow_kernels::cpu::attention::Factors;
use dataflow_kernels::cpu::threads::with_scratch;
use dataflow_kernels::cpu::{gla, retention, wkv};
use dataflow_kernels::cuda;
use dataflow_kernels::cuda::linear_attention::Decay;
use dataflow_kernels::cuda::recurrent::Matrix;
use dataflow_kernels::device::{Kernel, Target};
use serde::{Deserialize, Serialize};

use crate::packed::Packing;
use crate::recurrent::{Continuation, flat, flat_mut};
use crate::sequence::{head_dim, same, sizes};

/// Rows of a chunk, for estimates of work.
const CHUNK: f64 = 64.0;

/// Floating-point operations of a chunked form: `products` products with the state and within a chunk.
fn work(node: &NodeView<'_>, keys: &TensorType, values: &TensorType, heads: usize, products: f64) -> Cost {
    let (rows, dk, dv) = (keys.rows() as f64, keys.cols() as f64, values.cols() as f64);
    let states = 2.0 * dk * dv / heads as f64;
    let within = CHUNK * (dk + dv) / 2.0;
    Cost { flops: products * rows * (2.0 * states + 2.0 * within), bytes: node.bytes() }
}

/// The recurrent form of an op with a matrix state `[heads, Dk, Dv]`, given the number of its inputs and tokens.
fn continuing<'a>(
    op: &'a dyn Op,
    recurrence: &'a Recurrence,
    (inputs, time): (usize, usize),
    result: &TensorType,
    [heads, dk, dv]: [usize; 3],
) -> Continuation<'a> {
    let states = vec![("state", TensorType::f32([recurrence.slots, heads, dk, dv]))];
    Continuation { op, recurrence, inputs, time, results: vec![result.clone()], states, limit: None, cache: false }
}

/// The packed form of an op whose first `activations` inputs are activations, and whose result is like `result`.
fn packing<'a>(
    op: impl Op,
    inputs: &'a [TensorType],
    activations: usize,
    result: &TensorType,
    kept: Option<usize>,
) -> Packing<'a> {
    Packing { op: Arc::new(op), inputs, activations, parameters: 0, results: vec![result.clone()], kept }
}

/// Runs the forward pass of a document again: `body` gets room for a result of `len` rows and `cols` columns, and for
/// `states` numbers at the boundaries of chunks, which packed forms do not keep. How many there are depends on the
/// lengths of the documents.
fn again<R>(len: usize, cols: usize, states: usize, body: impl FnOnce(RowsMut<'_>, &mut [f32]) -> R) -> R {
    with_scratch(len * cols + states, |scratch| {
        let (y, states) = scratch.split_at_mut(len * cols);
        body(RowsMut::new(y, len, cols, cols), states)
    })
}

/// A tensor of `len` elements that the forward pass keeps for the backward pass.
fn kept(len: usize) -> TensorType {
    TensorType::f32([len])
}

/// RWKV's x051a operator (arXiv:2404.05892, with one decay and one bonus for each head):
///
/// ```text
/// w = exp(-exp(time_decay)),  u = time_faaaa
/// y_t = r_t (S_(t-1) + u k_t^T v_t),  S_t = w S_(t-1) + k_t^T v_t
/// ```
/// r, k, v, y `[B, T, heads N]`; time_decay, time_faaaa `[heads, 1]`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Wkv {
    heads: Size,
}

impl Wkv {
    /// Of a launch whose first inputs are r, k and v.
    fn dims(&self, node: &NodeView<'_>) -> Result<retention::Dims, OpError> {
        dims(&node.inputs[0], &node.inputs[2], *self.heads)
    }
}

/// Sizes of keys like `keys` and values like `values`.
fn dims(keys: &TensorType, values: &TensorType, heads: usize) -> Result<retention::Dims, OpError> {
    let (batch, time, cols) = sizes(keys)?;
    let (key_dim, value_dim) = (head_dim(cols, heads)?, head_dim(values.cols(), heads)?);
    Ok(retention::Dims { batch, time, heads, key_dim, value_dim })
}

impl Op for Wkv {
    fn arity(&self) -> RangeInclusive<usize> {
        5..=5
    }
    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, OpError> {
        let (batch, time, cols) = sizes(&inputs[0])?;
        let dim = head_dim(cols, *self.heads)?;
        same("receptance and keys", &inputs[0], &inputs[1])?;
        same("receptance and values", &inputs[0], &inputs[2])?;
        if inputs[3..].iter().any(|t| t.elements() != *self.heads) {
            return Err(format!("time_decay and time_faaaa need one number for each of {} heads", self.heads).into());
        }
        Ok(vec![inputs[0].clone(), kept(wkv::wkv_boundaries_len(batch, time, *self.heads, dim))])
    }
    fn gradient(&self, g: &mut Gradient<'_>) -> Result<(), OpError> {
        let Some(dy) = g.output_gradient(0) else { return Ok(()) };
        let mut inputs = g.all_inputs().to_vec();
        inputs.extend([g.output(1), dy]);
        let made = g.emit(WkvGradient(self.clone()), &inputs)?;
        (0..5).try_for_each(|i| g.set(i, made[i]))
    }
    fn lower(&self, node: &NodeView<'_>, target: Target) -> Result<Kernel, OpError> {
        let (batch, ..) = sizes(&node.inputs[0])?;
        match target {
            Target::Cuda => {
                let dims = self.dims(node)?;
                Ok(Kernel::cuda(move |c| {
                    let decay = Decay::Wkv { time_decay: c.input(3), time_faaaa: c.input(4) };
                    let (r, k, v) = (c.input(0), c.input(1), c.input(2));
                    cuda::linear_attention::forward(c, dims, decay, r, k, v, c.output(0), c.output(1))
                }))
            }
            Target::Cpu => Ok(Kernel::cpu(move |a| {
                let (decay, bonus) = (a.slice(3), a.slice(4));
                let (y, kept) = (a.rows_mut(0), Some(a.slice_mut(1)));
                wkv::wkv_forward(y, a.rows(0), a.rows(1), a.rows(2), decay, bonus, batch, None, None, kept);
                Ok(())
            })),
        }
    }
    fn recurrent(&self, inputs: &[TensorType], recurrence: &Recurrence) -> Result<Option<Recurrent>, OpError> {
        let (_, time, cols) = sizes(&inputs[0])?;
        let (heads, dim) = (*self.heads, head_dim(cols, *self.heads)?);
        let form = continuing(self, recurrence, (5, time), &inputs[0], [heads, dim, dim]);
        Ok(Some(form.on(
            move |[r, k, v, decay, bonus], s, [y], [mut state]| {
                let (r, k, v, decay, bonus) = (s.of(*r), s.of(*k), s.of(*v), flat(decay), flat(bonus));
                let state = flat_mut(&mut state);
                if s.len == 1 {
                    return wkv::wkv_step(y, state, r, k, v, decay, bonus);
                }
                with_scratch(state.len(), |initial| {
                    initial.copy_from_slice(state);
                    wkv::wkv_forward(y, r, k, v, decay, bonus, 1, Some(initial), Some(state), None);
                });
            },
            move |c, s| {
                let form = Matrix::Wkv { decay: c.input(3), bonus: c.input(4) };
                let (given, y, state) = ([c.input(0), c.input(1), c.input(2)], c.output(0), c.output(1));
                cuda::recurrent::matrix(c, s, heads, form, given, state, y)
            },
        )))
    }
    fn packed(&self, inputs: &[TensorType]) -> Result<Option<Arc<dyn Op>>, OpError> {
        let (cols, heads) = (inputs[0].cols(), *self.heads);
        let dim = head_dim(cols, heads)?;
        let form = packing(self.clone(), inputs, 3, &inputs[0], None);
        Ok(Some(form.on_cpu(
            |_, [r, k, v, decay, bonus], [y]| {
                wkv::wkv_forward(y, r, k, v, flat(&decay), flat(&bonus), 1, None, None, None);
            },
            move |one, [r, k, v, decay, bonus], _, [dy], [dr, dk, dv, mut d_decay, mut d_bonus]| {
                let (decay, bonus) = (flat(&decay), flat(&bonus));
                again(one.len, cols, wkv::wkv_boundaries_len(1, one.len, heads, dim), |y, kept| {
                    wkv::wkv_forward(y, r, k, v, decay, bonus, 1, None, None, Some(kept));
                    let (d_decay, d_bonus) = (flat_mut(&mut d_decay), flat_mut(&mut d_bonus));
                    wkv::wkv_backward(dr, dk, dv, d_decay, d_bonus, dy, r, k, v, decay, bonus, 1, kept);
                });
            },
        )))
    }
    fn activations(&self, _: usize) -> Activations {
        Activations::new(0..3, [0])
    }
    fn strided(&self) -> bool {
        true
    }
    fn cost(&self, node: &NodeView<'_>) -> Cost {
        work(node, &node.inputs[1], &node.inputs[2], *self.heads, 1.0)
    }
}

/// (r, k, v, time_decay, time_faaaa, boundaries, dy) to the gradients of the first five.
#[derive(Clone, Debug)]
struct WkvGradient(Wkv);

impl Op for WkvGradient {
    fn arity(&self) -> RangeInclusive<usize> {
        7..=7
    }
    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, OpError> {
        Ok(inputs[..5].to_vec())
    }
    fn lower(&self, node: &NodeView<'_>, target: Target) -> Result<Kernel, OpError> {
        let (batch, ..) = sizes(&node.inputs[0])?;
        match target {
            Target::Cuda => {
                let dims = self.0.dims(node)?;
                Ok(Kernel::cuda(move |c| {
                    let decay = Decay::Wkv { time_decay: c.input(3), time_faaaa: c.input(4) };
                    let (r, k, v, kept, dy) = (c.input(0), c.input(1), c.input(2), c.input(5), c.input(6));
                    let (dr, dk, dv) = (c.output(0), c.output(1), c.output(2));
                    let parameters = Some((c.output(3), c.output(4)));
                    cuda::linear_attention::backward(c, dims, decay, r, k, v, kept, dy, dr, dk, dv, parameters)
                }))
            }
            Target::Cpu => Ok(Kernel::cpu(move |a| {
                let (r, k, v, decay, bonus) = (a.rows(0), a.rows(1), a.rows(2), a.slice(3), a.slice(4));
                let (dr, dk, dv) = (a.output(0), a.output(1), a.output(2));
                let (d_decay, d_bonus) = (a.slice_mut(3), a.slice_mut(4));
                let (kept, dy) = (a.slice(5), a.rows(6));
                wkv::wkv_backward(dr, dk, dv, d_decay, d_bonus, dy, r, k, v, decay, bonus, batch, kept);
                Ok(())
            })),
        }
    }
    fn activations(&self, _: usize) -> Activations {
        Activations::new([0, 1, 2, 6], 0..3)
    }
    fn rounds(&self, _: usize) -> Activations {
        Activations::new([], 0..3)
    }
    fn strided(&self) -> bool {
        true
    }
    fn cost(&self, node: &NodeView<'_>) -> Cost {
        work(node, &node.inputs[1], &node.inputs[2], *self.0.heads, 2.5)
    }
}

/// How retention is computed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "FormAttribute")]
pub enum Form {
    /// With the row normaliser that upstream trains with: time grows with T^2, memory with T.
    #[default]
    Exact,
    /// Without it, in linear time; the RMS norm behind it hides the difference up to its eps.
    Chunk,
}

/// A [`Form`] as a row gives it: by name, or by a flag of `config`.
#[derive(Deserialize)]
enum FormAttribute {
    Exact,
    Chunk,
    ExactIf(Flag),
}

impl From<FormAttribute> for Form {
    fn from(attribute: FormAttribute) -> Self {
        match attribute {
            FormAttribute::Exact | FormAttribute::ExactIf(Flag(true)) => Form::Exact,
            FormAttribute::Chunk | FormAttribute::ExactIf(Flag(false)) => Form::Chunk,
        }
    }
}

/// Retention (arXiv:2307.08621): `y_i = sum over j <= i of a_ij v_j / n_i` in every head, where
/// `a_ij = q_i . k_j D_ij`, D is `g^(i-j)` over the root of its row sum with `g = 1 - 2^(-5-head)`, and `n_i` is
/// `sum_j |a_ij|` clamped to `[1, 5e4]`, a constant for the gradient. q, k (rotated and scaled)
/// `[B, T, heads Dk]`, v and y `[B, T, heads Dv]`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Retention {
    heads: Size,
    /// `Exact`, `Chunk`, or `ExactIf(flag)`, where the flag may be an expression over `config`.
    #[serde(default)]
    form: Form,
}

impl Retention {
    fn dims(&self, q: &TensorType, v: &TensorType) -> Result<retention::Dims, OpError> {
        let (batch, time, cols) = sizes(q)?;
        let (key_dim, value_dim) = (head_dim(cols, *self.heads)?, head_dim(v.cols(), *self.heads)?);
        if sizes(v)?.0 != batch || sizes(v)?.1 != time {
            return Err("batch or time of keys and values differ".into());
        }
        Ok(retention::Dims { batch, time, heads: *self.heads, key_dim, value_dim })
    }

    fn cost(&self, node: &NodeView<'_>, products: f64) -> Cost {
        let (q, v) = (&node.inputs[0], &node.inputs[2]);
        match self.form {
            Form::Exact => {
                let time = sizes(q).map_or(0, |s| s.1) as f64;
                let cols = (q.cols() + v.cols()) as f64;
                Cost { flops: products * q.rows() as f64 * time * cols, bytes: node.bytes() }
            }
            Form::Chunk => work(node, q, v, *self.heads, products),
        }
    }
}

impl Op for Retention {
    fn arity(&self) -> RangeInclusive<usize> {
        3..=3
    }
    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, OpError> {
        same("queries and keys", &inputs[0], &inputs[1])?;
        let dims = self.dims(&inputs[0], &inputs[2])?;
        let kept = match self.form {
            Form::Exact => TensorType::f32([dims.batch, dims.heads, dims.time]),
            Form::Chunk => kept(retention::chunk_states_len(dims)),
        };
        Ok(vec![inputs[2].clone(), kept])
    }
    fn gradient(&self, g: &mut Gradient<'_>) -> Result<(), OpError> {
        let Some(dy) = g.output_gradient(0) else { return Ok(()) };
        let inputs = [g.input(0), g.input(1), g.input(2), g.output(1), dy];
        let made = g.emit(RetentionGradient(self.clone()), &inputs)?;
        (0..3).try_for_each(|i| g.set(i, made[i]))
    }
    fn lower(&self, node: &NodeView<'_>, target: Target) -> Result<Kernel, OpError> {
        let (dims, form) = (self.dims(&node.inputs[0], &node.inputs[2])?, self.form);
        let factors = Factors::rounded(node.precision == Precision::Bf16);
        match target {
            Target::Cuda => Ok(Kernel::cuda(move |c| {
                let (q, k, v, y, kept) = (c.input(0), c.input(1), c.input(2), c.output(0), c.output(1));
                match form {
                    Form::Exact => cuda::retention::forward(c, dims, q, k, v, y, kept),
                    Form::Chunk => cuda::linear_attention::forward(c, dims, Decay::Retention, q, k, v, y, kept),
                }
            })),
            Target::Cpu => Ok(Kernel::cpu(move |a| {
                let (q, k, v, y, kept) = (a.rows(0), a.rows(1), a.rows(2), a.rows_mut(0), a.slice_mut(1));
                match form {
                    Form::Exact => retention::parallel_forward(dims, factors, q, k, v, y, kept),
                    Form::Chunk => retention::chunk_forward(dims, q, k, v, y, kept),
                }
                Ok(())
            })),
        }
    }
    /// The published recurrent form, which has no row normaliser in either form.
    fn recurrent(&self, inputs: &[TensorType], recurrence: &Recurrence) -> Result<Option<Recurrent>, OpError> {
        let dims = self.dims(&inputs[0], &inputs[2])?;
        let state = [dims.heads, dims.key_dim, dims.value_dim];
        let form = continuing(self, recurrence, (3, dims.time), &inputs[2], state);
        Ok(Some(form.on(
            move |[q, k, v], s, [y], [mut state]| {
                let dims = retention::Dims { batch: 1, time: s.len, ..dims };
                retention::extend(dims, s.position, s.of(*q), s.of(*k), s.of(*v), flat_mut(&mut state), y);
            },
            move |c, s| {
                let (given, y, state) = ([c.input(0), c.input(1), c.input(2)], c.output(0), c.output(1));
                cuda::recurrent::matrix(c, s, dims.heads, Matrix::Retention, given, state, y)
            },
        )))
    }
    fn packed(&self, inputs: &[TensorType]) -> Result<Option<Arc<dyn Op>>, OpError> {
        let dims = self.dims(&inputs[0], &inputs[2])?;
        let of = move |len| retention::Dims { batch: 1, time: len, ..dims };
        let cols = inputs[2].cols();
        let kept = (self.form == Form::Exact).then_some(dims.heads);
        let form = packing(self.clone(), inputs, 3, &inputs[2], kept);
        Ok(Some(match self.form {
            Form::Exact => form.on_cpu(
                move |one, [q, k, v], [y, mut kept]| {
                    retention::parallel_forward(of(one.len), Factors::Single, q, k, v, y, flat_mut(&mut kept));
                },
                move |one, [q, k, v], [_, kept], [dy, _], [dq, dk, dv]| {
                    retention::parallel_backward(of(one.len), Factors::Single, q, k, v, flat(&kept), dy, dq, dk, dv);
                },
            ),
            Form::Chunk => form.on_cpu(
                move |one, [q, k, v], [y]| {
                    let dims = of(one.len);
                    again(0, 0, retention::chunk_states_len(dims), |_, states| {
                        retention::chunk_forward(dims, q, k, v, y, states);
                    });
                },
                move |one, [q, k, v], _, [dy], [dq, dk, dv]| {
                    let dims = of(one.len);
                    again(one.len, cols, retention::chunk_states_len(dims), |y, states| {
                        retention::chunk_forward(dims, q, k, v, y, states);
                        retention::chunk_backward(dims, q, k, v, states, dy, dq, dk, dv);
                    });
                },
            ),
        }))
    }
    fn products(&self) -> bool {
        self.form == Form::Exact
    }
    fn activations(&self, _: usize) -> Activations {
        Activations::new(0..3, [0])
    }
    fn strided(&self) -> bool {
        true
    }
    fn cost(&self, node: &NodeView<'_>) -> Cost {
        self.cost(node, 1.0)
    }
}

/// (q, k, v, kept, dy) to (dq, dk, dv).
#[derive(Clone, Debug)]
struct RetentionGradient(Retention);

impl Op for RetentionGradient {
    fn arity(&self) -> RangeInclusive<usize> {
        5..=5
    }
    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, OpError> {
        Ok(inputs[..3].to_vec())
    }
    fn lower(&self, node: &NodeView<'_>, target: Target) -> Result<Kernel, OpError> {
        let (dims, form) = (self.0.dims(&node.inputs[0], &node.inputs[2])?, self.0.form);
        let factors = Factors::rounded(node.precision == Precision::Bf16);
        match target {
            Target::Cuda => Ok(Kernel::cuda(move |c| {
                let (q, k, v, kept, dy) = (c.input(0), c.input(1), c.input(2), c.input(3), c.input(4));
                let (dq, dk, dv) = (c.output(0), c.output(1), c.output(2));
                match form {
                    Form::Exact => cuda::retention::backward(c, dims, q, k, v, kept, dy, dq, dk, dv),
                    Form::Chunk => {
                        let decay = Decay::Retention;
                        cuda::linear_attention::backward(c, dims, decay, q, k, v, kept, dy, dq, dk, dv, None)
                    }
                }
            })),
            Target::Cpu => Ok(Kernel::cpu(move |a| {
                let (q, k, v, kept, dy) = (a.rows(0), a.rows(1), a.rows(2), a.slice(3), a.rows(4));
                let (dq, dk, dv) = (a.rows_mut(0), a.rows_mut(1), a.rows_mut(2));
                match form {
                    Form::Exact => retention::parallel_backward(dims, factors, q, k, v, kept, dy, dq, dk, dv),
                    Form::Chunk => retention::chunk_backward(dims, q, k, v, kept, dy, dq, dk, dv),
                }
                Ok(())
            })),
        }
    }
    fn products(&self) -> bool {
        self.0.form == Form::Exact
    }
    fn activations(&self, _: usize) -> Activations {
        Activations::new([0, 1, 2, 4], 0..3)
    }
    fn strided(&self) -> bool {
        true
    }
    fn cost(&self, node: &NodeView<'_>) -> Cost {
        self.0.cost(node, 2.5)
    }
}

/// Gated linear attention (arXiv:2312.06635): `S_t = diag(exp(g_t)) S_(t-1) + k_t^T v_t`, `y_t = scale q_t S_t` in
/// every head; q, k, g `[B, T, heads Dk]`, v, y `[B, T, heads Dv]`, scale `Dk^-1/2` unless given. The gates g are
/// logarithms, 0 or less.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GatedLinearAttention {
    heads: Size,
    #[serde(default)]
    scale: Option<Real>,
}

impl GatedLinearAttention {
    /// Of a launch whose first inputs are q, k and v.
    fn dims(&self, node: &NodeView<'_>) -> Result<retention::Dims, OpError> {
        dims(&node.inputs[0], &node.inputs[2], *self.heads)
    }
    fn scale(&self) -> Option<f32> {
        self.scale.map(|s| s.0 as f32)
    }
}

impl Op for GatedLinearAttention {
    fn arity(&self) -> RangeInclusive<usize> {
        4..=4
    }
    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, OpError> {
        let ((batch, time, keys), (_, _, values)) = (sizes(&inputs[0])?, sizes(&inputs[2])?);
        same("queries and keys", &inputs[0], &inputs[1])?;
        same("queries and gates", &inputs[0], &inputs[3])?;
        if inputs[2].rows() != inputs[0].rows() {
            return Err("batch or time of keys and values differ".into());
        }
        let (dk, dv) = (head_dim(keys, *self.heads)?, head_dim(values, *self.heads)?);
        Ok(vec![inputs[2].clone(), kept(gla::gla_boundaries_len(batch, time, *self.heads, dk, dv))])
    }
    fn gradient(&self, g: &mut Gradient<'_>) -> Result<(), OpError> {
        let Some(dy) = g.output_gradient(0) else { return Ok(()) };
        let mut inputs = g.all_inputs().to_vec();
        inputs.extend([g.output(1), dy]);
        let made = g.emit(GatedLinearAttentionGradient(self.clone()), &inputs)?;
        (0..4).try_for_each(|i| g.set(i, made[i]))
    }
    fn lower(&self, node: &NodeView<'_>, target: Target) -> Result<Kernel, OpError> {
        let (batch, ..) = sizes(&node.inputs[0])?;
        let (heads, scale) = (*self.heads, self.scale());
        match target {
            Target::Cuda => {
                let dims = self.dims(node)?;
                Ok(Kernel::cuda(move |c| {
                    let (q, k, v, gates) = (c.input(0), c.input(1), c.input(2), c.input(3));
                    cuda::gla::forward(c, dims, scale, q, k, v, gates, c.output(0), c.output(1))
                }))
            }
            Target::Cpu => Ok(Kernel::cpu(move |a| {
                let (q, k, v, gate) = (a.rows(0), a.rows(1), a.rows(2), a.rows(3));
                let (y, kept) = (a.rows_mut(0), Some(a.slice_mut(1)));
                gla::gla_forward(y, q, k, v, gate, scale, batch, heads, None, None, kept);
                Ok(())
            })),
        }
    }
    fn recurrent(&self, inputs: &[TensorType], recurrence: &Recurrence) -> Result<Option<Recurrent>, OpError> {
        let ((_, time, keys), values) = (sizes(&inputs[0])?, inputs[2].cols());
        let (heads, scale) = (*self.heads, self.scale());
        let (key_dim, value_dim) = (head_dim(keys, heads)?, head_dim(values, heads)?);
        let form = continuing(self, recurrence, (4, time), &inputs[2], [heads, key_dim, value_dim]);
        Ok(Some(form.on(
            move |[q, k, v, gate], s, [y], [mut state]| {
                let (q, k, v, gate, state) = (s.of(*q), s.of(*k), s.of(*v), s.of(*gate), flat_mut(&mut state));
                if s.len == 1 {
                    return gla::gla_step(y, state, q, k, v, gate, scale, heads);
                }
                with_scratch(state.len(), |initial| {
                    initial.copy_from_slice(state);
                    gla::gla_forward(y, q, k, v, gate, scale, 1, heads, Some(initial), Some(state), None);
                });
            },
            move |c, s| {
                let form = Matrix::Gated { gates: c.input(3), scale: scale.unwrap_or((key_dim as f32).powf(-0.5)) };
                let (given, y, state) = ([c.input(0), c.input(1), c.input(2)], c.output(0), c.output(1));
                cuda::recurrent::matrix(c, s, heads, form, given, state, y)
            },
        )))
    }
    fn packed(&self, inputs: &[TensorType]) -> Result<Option<Arc<dyn Op>>, OpError> {
        let (heads, scale, cols) = (*self.heads, self.scale(), inputs[2].cols());
        let (key_dim, value_dim) = (head_dim(inputs[0].cols(), heads)?, head_dim(cols, heads)?);
        let form = packing(self.clone(), inputs, 4, &inputs[2], None);
        Ok(Some(form.on_cpu(
            move |_, [q, k, v, gate], [y]| {
                gla::gla_forward(y, q, k, v, gate, scale, 1, heads, None, None, None);
            },
            move |one, [q, k, v, gate], _, [dy], [dq, dk, dv, dgate]| {
                let states = gla::gla_boundaries_len(1, one.len, heads, key_dim, value_dim);
                again(one.len, cols, states, |y, kept| {
                    gla::gla_forward(y, q, k, v, gate, scale, 1, heads, None, None, Some(kept));
                    gla::gla_backward(dq, dk, dv, dgate, dy, q, k, v, gate, scale, 1, heads, kept);
                });
            },
        )))
    }
    fn activations(&self, _: usize) -> Activations {
        Activations::new(0..4, [0])
    }
    fn strided(&self) -> bool {
        true
    }
    fn cost(&self, node: &NodeView<'_>) -> Cost {
        work(node, &node.inputs[0], &node.inputs[2], *self.heads, 1.0)
    }
}

/// (q, k, v, gates, boundaries, dy) to the gradients of the first four.
#[derive(Clone, Debug)]
struct GatedLinearAttentionGradient(GatedLinearAttention);

impl Op for GatedLinearAttentionGradient {
    fn arity(&self) -> RangeInclusive<usize> {
        6..=6
    }
    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, OpError> {
        Ok(inputs[..4].to_vec())
    }
    fn lower(&self, node: &NodeView<'_>, target: Target) -> Result<Kernel, OpError> {
        let (batch, ..) = sizes(&node.inputs[0])?;
        let (heads, scale) = (*self.0.heads, self.0.scale());
        match target {
            Target::Cuda => {
                let dims = self.0.dims(node)?;
                Ok(Kernel::cuda(move |c| {
                    let (q, k, v, gates, kept, dy) =
                        (c.input(0), c.input(1), c.input(2), c.input(3), c.input(4), c.input(5));
                    let (dq, dk, dv, dgates) = (c.output(0), c.output(1), c.output(2), c.output(3));
                    cuda::gla::backward(c, dims, scale, q, k, v, gates, kept, dy, dq, dk, dv, dgates)
                }))
            }
            Target::Cpu => Ok(Kernel::cpu(move |a| {
                let (q, k, v, gate, kept, dy) = (a.rows(0), a.rows(1), a.rows(2), a.rows(3), a.slice(4), a.rows(5));
                let (dq, dk, dv, dgate) = (a.output(0), a.output(1), a.output(2), a.output(3));
                gla::gla_backward(dq, dk, dv, dgate, dy, q, k, v, gate, scale, batch, heads, kept);
                Ok(())
            })),
        }
    }
    fn activations(&self, _: usize) -> Activations {
        Activations::new([0, 1, 2, 3, 5], 0..4)
    }
    fn rounds(&self, _: usize) -> Activations {
        Activations::new([], 0..4)
    }
    fn strided(&self) -> bool {
        true
    }
    fn cost(&self, node: &NodeView<'_>) -> Cost {
        work(node, &node.inputs[0], &node.inputs[2], *self.0.heads, 2.5)
    }
}

pub(crate) fn register(registry: &mut Registry) {
    registry.op::<Wkv>(Info {
        name: "Wkv",
        about: "RWKV's x051a operator: linear attention with one decay and one bonus for each head.",
        inputs: &["r [B, T, heads N]", "k", "v", "time_decay [heads, 1]", "time_faaaa [heads, 1]"],
        formula: "y = r (S + u k^T v), S = w S + k^T v, w = exp(-exp(time_decay)), u = time_faaaa",
        source: "arXiv:2404.05892",
        example: "(heads: 4)",
    });
    registry.op::<Retention>(Info {
        name: "Retention",
        about: "RetNet's retention: attention without softmax, with a decay for each head.",
        inputs: &["q [B, T, heads Dk]", "k", "v [B, T, heads Dv]"],
        formula: "y_i = sum over j <= i of a_ij v_j / clamp(sum_j |a_ij|, 1, 5e4), a_ij = q_i . k_j D_ij",
        source: "arXiv:2307.08621",
        example: "(heads: 4)",
    });
    registry.op::<GatedLinearAttention>(Info {
        name: "GatedLinearAttention",
        about: "Linear attention whose state decays by a gate for each key channel.",
        inputs: &["q [B, T, heads Dk]", "k", "v [B, T, heads Dv]", "log gates [B, T, heads Dk]"],
        formula: "S = diag(exp(g)) S + k^T v, y = scale q S",
        source: "arXiv:2312.06635",
        example: "(heads: 4)",
    });
}
