//! Linear attention with one decay for each head: WKV, and retention without row normaliser. Device side:
//! `kernels/cuda/linear_attention.cu`; formulas in [`cpu::wkv`](crate::cpu::wkv) and
//! [`cpu::retention`](crate::cpu::retention).

use super::call::{Argument, Call, Calls, Tensor};
use super::partials;
use super::source::{head_vector, pitch, real};
use crate::cpu::retention::Dims;
use crate::device::{DType, KernelError};

/// Most channels of a head.
const MAX_HEAD_DIM: usize = 128;
/// Tokens of a chunk.
const TALL: usize = 64;

/// How a head forgets.
#[derive(Clone, Copy, Debug)]
pub enum Decay {
    /// As RWKV: by `exp(-exp(time_decay))`, with a bonus for the present token.
    Wkv {
        /// `[heads]`
        time_decay: Tensor,
        /// `[heads]`
        time_faaaa: Tensor,
    },
    /// As RetNet: by `1 - 2^(-5 - head)`.
    Retention,
}

fn call(
    entry: &'static str,
    dims: Dims,
    decay: Decay,
    keys: &[Tensor],
    values: &[Tensor],
) -> Result<Call, KernelError> {
    let Dims { batch, heads, key_dim, value_dim, .. } = dims;
    if key_dim.max(value_dim) > MAX_HEAD_DIM {
        let found = format!("found {key_dim} and {value_dim}");
        return Err(KernelError(format!(
            "CUDA linear attention takes heads of up to {MAX_HEAD_DIM} channels, {found}"
        )));
    }
    Ok(real(Call::file("linear_attention", entry), values[0])
        .define("KEY_DIM", key_dim)
        .define("VALUE_DIM", value_dim)
        .define("KEY_VECTOR", head_vector(keys, key_dim))
        .define("VALUE_VECTOR", head_vector(values, value_dim))
        .define("WKV", u8::from(matches!(decay, Decay::Wkv { .. })))
        .grid(batch * heads)
        .block(128)
        .rows(keys[0])
        .rows(keys[1])
        .rows(values[0]))
}

fn parameters(call: Call, decay: Decay) -> Call {
    match decay {
        Decay::Wkv { time_decay, time_faaaa } => call.pointer(time_decay).pointer(time_faaaa),
        Decay::Retention => call.arg(Argument::Null).arg(Argument::Null),
    }
}

/// Bytes of `keys` and `values` tiles, a state, and the powers of the decay.
fn shared(dims: Dims, dtype: DType, keys: usize, values: usize) -> usize {
    let (ldk, ldv) = (pitch(dims.key_dim, dtype), pitch(dims.value_dim, dtype));
    (TALL * (keys * ldk + values * ldv) + dims.key_dim.next_multiple_of(16) * ldv) * dtype.size() + 4 * (TALL + 1)
}

/// `y`, and into `kept` the states that [`backward`] needs: at least `batch heads ceil(time / 64) key_dim value_dim` f32.
///
/// # Errors
/// If heads are too wide, and as [`Calls::launch`].
#[allow(clippy::too_many_arguments)] // the tensors of the launch
pub fn forward(
    c: &mut Calls<'_>,
    dims: Dims,
    decay: Decay,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    y: Tensor,
    kept: Tensor,
) -> Result<(), KernelError> {
    let call = call("decay_forward", dims, decay, &[q, k], &[v, y])?.shared(shared(dims, q.dtype, 2, 1));
    c.launch(parameters(call, decay).rows(y).pointer(kept).arg(dims.heads as i32).arg(dims.time as i32))
}

/// Gradients of [`forward`]; `dparameters` are those of `time_decay` and `time_faaaa`, given exactly for WKV.
///
/// # Errors
/// As [`forward`].
#[allow(clippy::too_many_arguments)] // the tensors of the launch
pub fn backward(
    c: &mut Calls<'_>,
    dims: Dims,
    decay: Decay,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kept: Tensor,
    dy: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    dparameters: Option<(Tensor, Tensor)>,
) -> Result<(), KernelError> {
    let sums = c.scratch(dims.batch, 2 * dims.heads, DType::F32);
    let call = call("decay_backward", dims, decay, &[q, k, dq, dk], &[v, dy, dv])?;
    let call = parameters(call.shared(shared(dims, q.dtype, 2, 2)), decay).pointer(kept).rows(dy);
    let call = call.rows(dq).rows(dk).rows(dv).pointer(sums);
    c.launch(call.arg(dims.heads as i32).arg(dims.time as i32))?;
    let Some((time_decay, time_faaaa)) = dparameters else { return Ok(()) };
    partials::sum(c, sums, 0, time_decay)?;
    partials::sum(c, sums, dims.heads, time_faaaa)
}
