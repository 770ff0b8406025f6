//! Ops that continue a state, for generation. Device side: `kernels/cuda/recurrent.cu`; the contract of sequences in
//! [`cpu::sequences`](crate::cpu::sequences).

use super::call::{Argument, Call, Calls, Tensor};
use super::conv1d::Conv;
use super::rotary::Rotation;
use crate::cpu::rotary::Pairing;
use crate::device::KernelError;

/// Threads of a block.
const BLOCK: usize = 128;

/// The sequences of a launch: where it is told about them, and what there is room for.
#[derive(Clone, Copy, Debug)]
pub struct Sequences {
    /// Slots, `i32[batch]`.
    pub slots: Tensor,
    /// Tokens that each sequence had before, `i32[batch]`.
    pub positions: Tensor,
    /// How many of its tokens count, `i32[batch]`.
    pub lengths: Tensor,
    /// Tokens of a sequence in the batch.
    pub time: usize,
    /// Slots of the pool.
    pub pool: usize,
    /// The most tokens of a sequence, if there is such a limit.
    pub limit: Option<usize>,
}

fn refusal([reason, slot, position, length]: [i32; 4]) -> String {
    let what = match reason {
        1 => "there is no such slot, or no room for so many tokens at once",
        2 => "there is no room for so many tokens in a sequence",
        _ => "another sequence has the same slot",
    };
    format!("{length} tokens at position {position} in slot {slot}: {what}")
}

/// A kernel with `blocks` blocks for each sequence.
fn call(entry: &'static str, s: &Sequences, blocks: usize) -> Call {
    let numbers = [s.slots.len(), s.time, s.pool, s.limit.unwrap_or(0)].map(|n| Argument::I64(n as i64));
    let table = [s.slots, s.positions, s.lengths].map(Argument::Pointer).into_iter().chain(numbers);
    Call::file("recurrent", entry).grid3(blocks, s.slots.len(), 1).block(BLOCK).arg(Argument::Table(table.collect()))
}

/// A convolution; `window` `[pool, taps - 1, C]` has the rows before.
///
/// # Errors
/// As [`Calls::launch`], for all functions here.
pub fn conv1d(
    c: &mut Calls<'_>,
    s: &Sequences,
    conv: Conv,
    x: Tensor,
    window: Tensor,
    y: Tensor,
) -> Result<(), KernelError> {
    let call = call("continue_conv1d", s, x.cols.div_ceil(BLOCK))
        .define("TAPS", conv.weight.len() / x.cols.max(1))
        .define("SILU", u8::from(conv.silu));
    let call = call.rows(x).pointer(conv.weight).pointer_or_null(conv.bias).pointer(window).rows(y);
    c.launch(call.refuses(refusal))
}

/// Rotary positions.
///
/// # Errors
/// As [`conv1d`].
pub fn rotary(c: &mut Calls<'_>, s: &Sequences, rotation: Rotation, x: Tensor, y: Tensor) -> Result<(), KernelError> {
    let Rotation { pairing, base, head_dim, scale } = rotation;
    let call = call("continue_rotary", s, (s.time * head_dim / 2).div_ceil(BLOCK))
        .define("INTERLEAVED", u8::from(pairing == Pairing::Interleaved));
    c.launch(call.rows(x).rows(y).arg(head_dim as i32).arg(base.log2()).arg(scale).refuses(refusal))
}

/// Token shift and mixing; `last` `[pool, C]`.
///
/// # Errors
/// As [`conv1d`].
pub fn token_shift(
    c: &mut Calls<'_>,
    s: &Sequences,
    x: Tensor,
    mixes: &[Tensor],
    ys: &[Tensor],
    last: Tensor,
) -> Result<(), KernelError> {
    let table = ys.iter().enumerate().flat_map(|(j, &y)| {
        let mix = mixes.get(j).map_or(Argument::Null, |&m| Argument::Pointer(m));
        [Argument::Rows(y), mix]
    });
    let call = call("continue_shift", s, x.cols.div_ceil(BLOCK)).define("MIXES", mixes.len());
    c.launch(call.rows(x).arg(Argument::Table(table.collect())).pointer(last).refuses(refusal))
}

/// Rows of a table of learned positions.
///
/// # Errors
/// As [`conv1d`].
pub fn positions(c: &mut Calls<'_>, s: &Sequences, table: Tensor, y: Tensor) -> Result<(), KernelError> {
    let call = call("continue_positions", s, y.cols.div_ceil(BLOCK));
    c.launch(call.rows(table).rows(y).refuses(refusal))
}

/// Attention over caches of keys and values, `[pool, limit, C]`, to which those of these tokens are added.
///
/// # Errors
/// As [`conv1d`].
pub fn attention(
    c: &mut Calls<'_>,
    s: &Sequences,
    heads: usize,
    [q, k, v]: [Tensor; 3],
    [keys, values]: [Tensor; 2],
    y: Tensor,
) -> Result<(), KernelError> {
    let append = call("append_cache", s, k.cols.div_ceil(BLOCK));
    c.launch(append.rows(k).rows(v).pointer(keys).pointer(values).refuses(refusal))?;
    let dim = q.cols / heads.max(1);
    let attend = call("continue_attention", s, heads).define("KEY_DIM", dim).grid3(heads, s.slots.len(), s.time);
    let attend = attend.rows(q).pointer(keys).pointer(values).rows(y);
    c.launch(attend.arg((dim as f64).powf(-0.5) as f32).refuses(refusal))
}

/// Which recurrence continues a matrix state.
#[derive(Clone, Copy, Debug)]
pub enum Matrix {
    /// RWKV's, with a decay and a bonus for each head.
    Wkv {
        /// `[heads]`
        decay: Tensor,
        /// `[heads]`
        bonus: Tensor,
    },
    /// Retention.
    Retention,
    /// Gated linear attention.
    Gated {
        /// Logarithms of gates, as keys.
        gates: Tensor,
        /// A factor on the result.
        scale: f32,
    },
}

/// A matrix state `[pool, heads, Dk, Dv]`.
///
/// # Errors
/// As [`conv1d`].
pub fn matrix(
    c: &mut Calls<'_>,
    s: &Sequences,
    heads: usize,
    form: Matrix,
    [q, k, v]: [Tensor; 3],
    state: Tensor,
    y: Tensor,
) -> Result<(), KernelError> {
    let (key_dim, value_dim) = (q.cols / heads.max(1), v.cols / heads.max(1));
    let (number, gates, decay, bonus, scale) = match form {
        Matrix::Wkv { decay, bonus } => (0, None, Some(decay), Some(bonus), 1.0),
        Matrix::Retention => (1, None, None, None, 1.0),
        Matrix::Gated { gates, scale } => (2, Some(gates), None, None, scale),
    };
    let call = call("continue_matrix", s, heads).define("KEY_DIM", key_dim).define("FORM", number);
    let call = call.rows(q).rows(k).rows(v).rows_or_null(gates).pointer_or_null(decay).pointer_or_null(bonus);
    let call = call.pointer(state).rows(y).arg(value_dim as i32).arg(scale);
    c.launch(call.refuses(refusal))
}

/// A scan with a state for every channel, `[pool, N, C]`; without a gate.
///
/// # Errors
/// As [`conv1d`].
pub fn scan(
    c: &mut Calls<'_>,
    s: &Sequences,
    inputs: &super::scan::Inputs,
    state: Tensor,
    y: Tensor,
) -> Result<(), KernelError> {
    let call = call("continue_scan", s, inputs.u.cols.div_ceil(BLOCK))
        .define("STATE", inputs.keys.cols)
        .define("LONGHORN", u8::from(inputs.a_log.is_none()));
    let call = call.rows(inputs.u).rows(inputs.step).rows(inputs.keys).rows(inputs.queries);
    let call = call.pointer_or_null(inputs.a_log).pointer_or_null(inputs.skip).pointer(state).rows(y);
    c.launch(call.refuses(refusal))
}
