//! State-space scans with a state for every channel: the Longhorn online update and Mamba's selective scan.

use std::ops::RangeInclusive;
use std::sync::Arc;

use dataflow_graph::components::Recurrence;
use dataflow_graph::gradient::Gradient;
use dataflow_graph::initializer::{ElementFormula, Initializer};
use dataflow_graph::op::{Activations, Cost, Merged, NodeView, Of, Op, OpError, Pair, Parameter, Recurrent};
use dataflow_graph::registry::{Info, Registry};
use dataflow_graph::types::TensorType;
use dataflow_kernels::RowsMut;
use dataflow_kernels::cpu::scan::Dims;
use dataflow_kernels::cpu::threads::with_scratch;
use dataflow_kernels::cpu::{longhorn, selective_scan};
use dataflow_kernels::cuda::scan as cuda;
use dataflow_kernels::device::{Calls, Kernel, Target};
use serde::{Deserialize, Serialize};

use crate::elementwise::{Activation, Gate};
use crate::packed::Packing;
use crate::recurrent::{Continuation, flat, flat_mut};
use crate::sequence::{same, sizes};

/// The Longhorn update, which solves online associative recall in closed form (arXiv:2407.14207):
///
/// ```text
/// b = sigmoid(dt),  e = b / (1 + b |k_t|^2)
/// h_t = (1 - e k_t^2) h_(t-1) + e u_t k_t,  y_t = q_t . h_t + D u_t
/// ```
/// u, dt, y `[B, T, channels]`; q, k `[B, T, states]`; D `[channels]`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Longhorn {
    /// Whether the last input is a gate: the result is `y silu(z)`.
    #[serde(skip)]
    gated: bool,
}

/// Mamba's selective scan (arXiv:2312.00752):
///
/// ```text
/// d = softplus(dt),  h_t = exp(-d exp(A_log)) h_(t-1) + d u_t B_t,  y_t = C_t . h_t + D u_t
/// ```
/// u, dt, y `[B, T, channels]`; B, C `[B, T, states]`; A_log `[channels, states]`, ln 1 … ln states at first;
/// D `[channels]`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SelectiveScan {
    /// Whether the last input is a gate: the result is `y silu(z)`.
    #[serde(skip)]
    gated: bool,
}

/// Sizes, given u and one of the tensors of states.
fn dims(u: &TensorType, states: &TensorType) -> Result<Dims, OpError> {
    let (batch, time, channels) = sizes(u)?;
    let (b, t, state) = sizes(states)?;
    if (b, t) != (batch, time) || state == 0 || channels == 0 {
        return Err("batch or time of the inputs differ".into());
    }
    Ok(Dims { batch, time, channels, state })
}

/// The result, and the states at chunk boundaries that the backward pass starts from.
fn scan_outputs(u: &TensorType, dims: &Dims) -> Vec<TensorType> {
    vec![u.clone(), TensorType::f32([dims.boundaries_len() / dims.channels, dims.channels])]
}

/// A scan and the SiLU gate of its result are one pass: the gate is the scan's last input.
fn merge_gate(pair: &Pair<'_>, scan: impl Op) -> Option<Merged> {
    let gate = pair.consumer.downcast::<Gate>()?;
    let alike = pair.consumer_inputs[0] == pair.consumer_inputs[1];
    if gate.activation != Activation::Silu || (pair.output, pair.input) != (0, 0) || pair.shared || !alike {
        return None;
    }
    let mut inputs: Vec<Of> = (0..pair.producer_inputs.len()).map(Of::Producer).collect();
    inputs.push(Of::Consumer(1));
    Some(Merged { op: Arc::new(scan), inputs, outputs: vec![Of::Consumer(0)] })
}

/// The recurrent form of a scan whose first input is u.
fn continuing<'a>(
    op: &'a dyn Op,
    recurrence: &'a Recurrence,
    dims: Dims,
    count: usize,
    inputs: &[TensorType],
) -> Continuation<'a> {
    Continuation {
        op,
        recurrence,
        inputs: count,
        time: dims.time,
        results: vec![inputs[0].clone()],
        states: vec![("state", TensorType::f32([recurrence.slots, dims.state, dims.channels]))],
        limit: None,
        cache: false,
    }
}

/// The packed form of a scan whose first input is u, of four activations and `parameters`.
fn packing(op: impl Op, inputs: &[TensorType], parameters: usize) -> Packing<'_> {
    let results = vec![inputs[0].clone()];
    Packing { op: Arc::new(op), inputs, activations: 4, parameters, results, kept: None }
}

/// Room for the result of a document and its states at chunk boundaries, which packed forms make again: how many there are
/// depends on the lengths of the documents.
fn again(dims: Dims, body: impl FnOnce(RowsMut<'_>, &mut [f32])) {
    let result = dims.time * dims.channels;
    with_scratch(result + dims.boundaries_len(), |scratch| {
        let (y, boundaries) = scratch.split_at_mut(result);
        body(RowsMut::contiguous(y, dims.channels), boundaries);
    });
}

fn work(node: &NodeView<'_>, dims: Result<Dims, OpError>, per_element: f64) -> Cost {
    let elements = dims.map_or(0, |d| d.rows() * d.channels * d.state) as f64;
    Cost { flops: per_element * elements, bytes: node.bytes() }
}

/// Inputs 0 to 5 of a launch of [`Longhorn`] or its gradient.
fn longhorn_on_cuda(c: &Calls<'_>, gated: bool) -> cuda::Inputs {
    cuda::Inputs {
        u: c.input(0),
        queries: c.input(1),
        keys: c.input(2),
        step: c.input(3),
        a_log: None,
        skip: Some(c.input(4)),
        gate: gated.then(|| c.input(5)),
    }
}

/// Inputs 0 to 6 of a launch of [`SelectiveScan`] or its gradient.
fn selective_scan_on_cuda(c: &Calls<'_>, gated: bool) -> cuda::Inputs {
    cuda::Inputs {
        u: c.input(0),
        step: c.input(1),
        keys: c.input(2),
        queries: c.input(3),
        a_log: Some(c.input(4)),
        skip: Some(c.input(5)),
        gate: gated.then(|| c.input(6)),
    }
}

/// Inputs are (u, q, k, dt), then the parameter D, then the gate.
impl Op for Longhorn {
    fn arity(&self) -> RangeInclusive<usize> {
        4..=4
    }
    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, OpError> {
        let dims = dims(&inputs[0], &inputs[1])?;
        same("queries and keys", &inputs[1], &inputs[2])?;
        same("inputs and step sizes", &inputs[0], &inputs[3])?;
        Ok(scan_outputs(&inputs[0], &dims))
    }
    fn parameters(&self, inputs: &[TensorType]) -> Result<Vec<Parameter>, OpError> {
        Ok(vec![Parameter::new("D", [inputs[0].cols()], Initializer::Ones)])
    }
    fn gradient(&self, g: &mut Gradient<'_>) -> Result<(), OpError> {
        let Some(dy) = g.output_gradient(0) else { return Ok(()) };
        let mut inputs = g.all_inputs().to_vec();
        inputs.extend([g.output(1), dy]);
        let made = g.emit(LonghornGradient { gated: self.gated }, &inputs)?;
        (0..g.inputs()).try_for_each(|i| g.set(i, made[i]))
    }
    fn merge(&self, pair: &Pair<'_>) -> Option<Merged> {
        let own = pair.producer.downcast::<Self>()?;
        if own.gated { None } else { merge_gate(pair, Self { gated: true }) }
    }
    fn lower(&self, node: &NodeView<'_>, target: Target) -> Result<Kernel, OpError> {
        let (dims, gated) = (dims(&node.inputs[0], &node.inputs[1])?, self.gated);
        match target {
            Target::Cuda => Ok(Kernel::cuda(move |c| {
                cuda::forward(c, dims, &longhorn_on_cuda(c, gated), c.output(0), Some(c.output(1)))
            })),
            Target::Cpu => Ok(Kernel::cpu(move |a| {
                let (u, q, k, dt, skip) = (a.rows(0), a.rows(1), a.rows(2), a.rows(3), Some(a.slice(4)));
                let inputs = longhorn::Inputs { u, dt, q, k, t_bias: None, skip, gate: gated.then(|| a.rows(5)) };
                longhorn::forward(dims, &inputs, a.rows_mut(0), None, Some(a.slice_mut(1)));
                Ok(())
            })),
        }
    }
    fn recurrent(&self, inputs: &[TensorType], recurrence: &Recurrence) -> Result<Option<Recurrent>, OpError> {
        let dims = dims(&inputs[0], &inputs[1])?;
        Ok(Some(continuing(self, recurrence, dims, 5, inputs).on(
            move |[u, q, k, dt, skip], s, [y], [mut state]| {
                let dims = Dims { batch: 1, time: s.len, ..dims };
                let (u, q, k, dt, skip) = (s.of(*u), s.of(*q), s.of(*k), s.of(*dt), Some(flat(skip)));
                let inputs = longhorn::Inputs { u, dt, q, k, t_bias: None, skip, gate: None };
                longhorn::forward(dims, &inputs, y, Some(flat_mut(&mut state)), None);
            },
            |c, s| {
                let (y, state) = (c.output(0), c.output(1));
                dataflow_kernels::cuda::recurrent::scan(c, s, &longhorn_on_cuda(c, false), state, y)
            },
        )))
    }
    fn packed(&self, inputs: &[TensorType]) -> Result<Option<Arc<dyn Op>>, OpError> {
        let dims = dims(&inputs[0], &inputs[1])?;
        let of = move |len| Dims { batch: 1, time: len, ..dims };
        Ok(Some(packing(self.clone(), inputs, 1).on_cpu(
            move |one, [u, q, k, dt, skip], [y]| {
                let skip = Some(flat(&skip));
                let inputs = longhorn::Inputs { u, dt, q, k, t_bias: None, skip, gate: None };
                longhorn::forward(of(one.len), &inputs, y, None, None);
            },
            move |one, [u, q, k, dt, skip], _, [dy], [du, dq, dk, ddt, mut dskip]| {
                let (dims, skip) = (of(one.len), Some(flat(&skip)));
                let inputs = longhorn::Inputs { u, dt, q, k, t_bias: None, skip, gate: None };
                let skip = Some(flat_mut(&mut dskip));
                let gradients = longhorn::Gradients { u: du, q: dq, k: dk, dt: ddt, t_bias: None, skip, gate: None };
                again(dims, |y, boundaries| {
                    longhorn::forward(dims, &inputs, y, None, Some(boundaries));
                    longhorn::backward(dims, &inputs, dy, boundaries, gradients);
                });
            },
        )))
    }
    fn activations(&self, _: usize) -> Activations {
        Activations::new((0..4).chain(self.gated.then_some(5)), [0])
    }
    fn strided(&self) -> bool {
        true
    }
    fn cost(&self, node: &NodeView<'_>) -> Cost {
        work(node, dims(&node.inputs[0], &node.inputs[1]), 8.0)
    }
}

/// (u, q, k, dt, D, z?, boundaries, dy) to (du, dq, dk, ddt, dD, dz?).
#[derive(Clone, Debug)]
struct LonghornGradient {
    gated: bool,
}

impl Op for LonghornGradient {
    fn arity(&self) -> RangeInclusive<usize> {
        7..=8
    }
    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, OpError> {
        Ok(inputs[..5 + usize::from(self.gated)].to_vec())
    }
    fn lower(&self, node: &NodeView<'_>, target: Target) -> Result<Kernel, OpError> {
        let (dims, gated) = (dims(&node.inputs[0], &node.inputs[1])?, self.gated);
        let saved = 5 + usize::from(gated);
        match target {
            Target::Cuda => Ok(Kernel::cuda(move |c| {
                let gradients = cuda::Gradients {
                    u: c.output(0),
                    queries: c.output(1),
                    keys: c.output(2),
                    step: c.output(3),
                    a_log: None,
                    skip: Some(c.output(4)),
                    gate: gated.then(|| c.output(5)),
                };
                cuda::backward(c, dims, &longhorn_on_cuda(c, gated), c.input(saved + 1), c.input(saved), gradients)
            })),
            Target::Cpu => Ok(Kernel::cpu(move |a| {
                let (u, q, k, dt, skip) = (a.rows(0), a.rows(1), a.rows(2), a.rows(3), Some(a.slice(4)));
                let inputs = longhorn::Inputs { u, dt, q, k, t_bias: None, skip, gate: gated.then(|| a.rows(5)) };
                let gradients = longhorn::Gradients {
                    u: a.rows_mut(0),
                    q: a.rows_mut(1),
                    k: a.rows_mut(2),
                    dt: a.rows_mut(3),
                    t_bias: None,
                    skip: Some(a.slice_mut(4)),
                    gate: gated.then(|| a.rows_mut(5)),
                };
                longhorn::backward(dims, &inputs, a.rows(saved + 1), a.slice(saved), gradients);
                Ok(())
            })),
        }
    }
    fn activations(&self, _: usize) -> Activations {
        let gate = self.gated.then_some(5);
        Activations::new((0..4).chain(gate).chain([6 + usize::from(self.gated)]), (0..4).chain(gate))
    }
    fn strided(&self) -> bool {
        true
    }
    fn cost(&self, node: &NodeView<'_>) -> Cost {
        work(node, dims(&node.inputs[0], &node.inputs[1]), 20.0)
    }
}

/// Inputs are (u, dt, B, C), then the parameters A_log and D, then the gate.
impl Op for SelectiveScan {
    fn arity(&self) -> RangeInclusive<usize> {
        4..=4
    }
    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, OpError> {
        let dims = dims(&inputs[0], &inputs[2])?;
        same("B and C", &inputs[2], &inputs[3])?;
        same("inputs and step sizes", &inputs[0], &inputs[1])?;
        Ok(scan_outputs(&inputs[0], &dims))
    }
    fn parameters(&self, inputs: &[TensorType]) -> Result<Vec<Parameter>, OpError> {
        let (channels, states) = (inputs[0].cols(), inputs[2].cols());
        let a_log = Initializer::Formula(ElementFormula::new("ln(i + 1)").map_err(OpError)?);
        Ok(vec![Parameter::new("A_log", [channels, states], a_log), Parameter::new("D", [channels], Initializer::Ones)])
    }
    fn gradient(&self, g: &mut Gradient<'_>) -> Result<(), OpError> {
        let Some(dy) = g.output_gradient(0) else { return Ok(()) };
        let mut inputs = g.all_inputs().to_vec();
        inputs.extend([g.output(1), dy]);
        let made = g.emit(SelectiveScanGradient { gated: self.gated }, &inputs)?;
        (0..g.inputs()).try_for_each(|i| g.set(i, made[i]))
    }
    fn merge(&self, pair: &Pair<'_>) -> Option<Merged> {
        let own = pair.producer.downcast::<Self>()?;
        if own.gated { None } else { merge_gate(pair, Self { gated: true }) }
    }
    fn lower(&self, node: &NodeView<'_>, target: Target) -> Result<Kernel, OpError> {
        let (dims, gated) = (dims(&node.inputs[0], &node.inputs[2])?, self.gated);
        match target {
            Target::Cuda => Ok(Kernel::cuda(move |c| {
                cuda::forward(c, dims, &selective_scan_on_cuda(c, gated), c.output(0), Some(c.output(1)))
            })),
            Target::Cpu => Ok(Kernel::cpu(move |a| {
                let (u, delta, b, c) = (a.rows(0), a.rows(1), a.rows(2), a.rows(3));
                let (a_log, skip, gate) = (a.slice(4), Some(a.slice(5)), gated.then(|| a.rows(6)));
                let inputs = selective_scan::Inputs { u, delta, a_log, b, c, delta_bias: None, skip, gate };
                selective_scan::forward(dims, &inputs, a.rows_mut(0), None, Some(a.slice_mut(1)));
                Ok(())
            })),
        }
    }
    fn recurrent(&self, inputs: &[TensorType], recurrence: &Recurrence) -> Result<Option<Recurrent>, OpError> {
        let dims = dims(&inputs[0], &inputs[2])?;
        let form = continuing(self, recurrence, dims, 6, inputs);
        Ok(Some(form.on(
            move |[u, delta, b, c, a_log, skip], s, [y], [mut state]| {
                let dims = Dims { batch: 1, time: s.len, ..dims };
                let (u, delta, b, c) = (s.of(*u), s.of(*delta), s.of(*b), s.of(*c));
                let (a_log, skip) = (flat(a_log), Some(flat(skip)));
                let inputs = selective_scan::Inputs { u, delta, a_log, b, c, delta_bias: None, skip, gate: None };
                selective_scan::forward(dims, &inputs, y, Some(flat_mut(&mut state)), None);
            },
            |c, s| {
                let (y, state) = (c.output(0), c.output(1));
                dataflow_kernels::cuda::recurrent::scan(c, s, &selective_scan_on_cuda(c, false), state, y)
            },
        )))
    }
    fn packed(&self, inputs: &[TensorType]) -> Result<Option<Arc<dyn Op>>, OpError> {
        let dims = dims(&inputs[0], &inputs[2])?;
        let of = move |len| Dims { batch: 1, time: len, ..dims };
        Ok(Some(packing(self.clone(), inputs, 2).on_cpu(
            move |one, [u, delta, b, c, a_log, skip], [y]| {
                let (a_log, skip) = (flat(&a_log), Some(flat(&skip)));
                let inputs = selective_scan::Inputs { u, delta, a_log, b, c, delta_bias: None, skip, gate: None };
                selective_scan::forward(of(one.len), &inputs, y, None, None);
            },
            move |one, [u, delta, b, c, a_log, skip], _, [dy], [du, ddelta, db, dc, mut da_log, mut dskip]| {
                let (dims, a_log, skip) = (of(one.len), flat(&a_log), Some(flat(&skip)));
                let inputs = selective_scan::Inputs { u, delta, a_log, b, c, delta_bias: None, skip, gate: None };
                let gradients = selective_scan::Gradients {
                    u: du,
                    delta: ddelta,
                    b: db,
                    c: dc,
                    a_log: Some(flat_mut(&mut da_log)),
                    delta_bias: None,
                    skip: Some(flat_mut(&mut dskip)),
                    gate: None,
                };
                again(dims, |y, boundaries| {
                    selective_scan::forward(dims, &inputs, y, None, Some(boundaries));
                    selective_scan::backward(dims, &inputs, dy, boundaries, gradients);
                });
            },
        )))
    }
    fn activations(&self, _: usize) -> Activations {
        Activations::new((0..4).chain(self.gated.then_some(6)), [0])
    }
    fn strided(&self) -> bool {
        true
    }
    fn cost(&self, node: &NodeView<'_>) -> Cost {
        work(node, dims(&node.inputs[0], &node.inputs[2]), 7.0)
    }
}

/// (u, dt, B, C, A_log, D, z?, boundaries, dy) to (du, ddt, dB, dC, dA_log, dD, dz?).
#[derive(Clone, Debug)]
struct SelectiveScanGradient {
    gated: bool,
}

impl Op for SelectiveScanGradient {
    fn arity(&self) -> RangeInclusive<usize> {
        8..=9
    }
    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, OpError> {
        Ok(inputs[..6 + usize::from(self.gated)].to_vec())
    }
    fn lower(&self, node: &NodeView<'_>, target: Target) -> Result<Kernel, OpError> {
        let (dims, gated) = (dims(&node.inputs[0], &node.inputs[2])?, self.gated);
        let saved = 6 + usize::from(gated);
        match target {
            Target::Cuda => Ok(Kernel::cuda(move |c| {
                let gradients = cuda::Gradients {
                    u: c.output(0),
                    step: c.output(1),
                    keys: c.output(2),
                    queries: c.output(3),
                    a_log: Some(c.output(4)),
                    skip: Some(c.output(5)),
                    gate: gated.then(|| c.output(6)),
                };
                let inputs = selective_scan_on_cuda(c, gated);
                cuda::backward(c, dims, &inputs, c.input(saved + 1), c.input(saved), gradients)
            })),
            Target::Cpu => Ok(Kernel::cpu(move |a| {
                let (u, delta, b, c) = (a.rows(0), a.rows(1), a.rows(2), a.rows(3));
                let (a_log, skip, gate) = (a.slice(4), Some(a.slice(5)), gated.then(|| a.rows(6)));
                let inputs = selective_scan::Inputs { u, delta, a_log, b, c, delta_bias: None, skip, gate };
                let gradients = selective_scan::Gradients {
                    u: a.rows_mut(0),
                    delta: a.rows_mut(1),
                    b: a.rows_mut(2),
                    c: a.rows_mut(3),
                    a_log: Some(a.slice_mut(4)),
                    delta_bias: None,
                    skip: Some(a.slice_mut(5)),
                    gate: gated.then(|| a.rows_mut(6)),
                };
                selective_scan::backward(dims, &inputs, a.rows(saved + 1), a.slice(saved), gradients);
                Ok(())
            })),
        }
    }
    fn activations(&self, _: usize) -> Activations {
        let gate = self.gated.then_some(6);
        Activations::new((0..4).chain(gate).chain([7 + usize::from(self.gated)]), (0..4).chain(gate))
    }
    fn strided(&self) -> bool {
        true
    }
    fn cost(&self, node: &NodeView<'_>) -> Cost {
        work(node, dims(&node.inputs[0], &node.inputs[2]), 20.0)
    }
}

pub(crate) fn register(registry: &mut Registry) {
    registry.op::<Longhorn>(Info {
        name: "Longhorn",
        about: "The Longhorn update: online associative recall solved in closed form, a state for every channel.",
        inputs: &["u [B, T, D]", "q [B, T, N]", "k [B, T, N]", "dt [B, T, D]"],
        formula: "e = b / (1 + b |k|^2), b = sigmoid(dt); h = (1 - e k^2) h + e u k; y = q . h + D u",
        source: "arXiv:2407.14207",
        example: "",
    });
    registry.op::<SelectiveScan>(Info {
        name: "SelectiveScan",
        about: "Mamba's selective scan: a linear recurrence whose step sizes depend on the input.",
        inputs: &["u [B, T, D]", "dt [B, T, D]", "B [B, T, N]", "C [B, T, N]"],
        formula: "d = softplus(dt); h = exp(-d exp(A_log)) h + d u B; y = C . h + D u",
        source: "arXiv:2312.00752",
        example: "",
    });
}
