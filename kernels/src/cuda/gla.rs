//! Gated linear attention. Device side: `kernels/cuda/gla.cu`; formulas in [`cpu::gla`](crate::cpu::gla).

use super::call::{Call, Calls, Tensor};
use super::source::{head_vector, pitch, real};
use crate::cpu::retention::Dims;
use crate::device::{DType, KernelError};

/// Most channels of a head in queries and keys, and in values.
const MAX_HEAD_DIM: (usize, usize) = (64, 128);
/// Tokens of a chunk, and of a warp's part of it.
const TALL: usize = 64;
const SUB: usize = 16;

fn call(entry: &'static str, dims: Dims, keys: &[Tensor], values: &[Tensor]) -> Result<Call, KernelError> {
    let Dims { batch, heads, key_dim, value_dim, .. } = dims;
    let (most_keys, most_values) = MAX_HEAD_DIM;
    if key_dim > most_keys || value_dim > most_values {
        let most = format!("{most_keys} key and {most_values} value channels, found {key_dim} and {value_dim}");
        return Err(KernelError(format!("CUDA gated linear attention takes heads of up to {most}")));
    }
    Ok(real(Call::file("gla", entry), values[0])
        .define("KEY_DIM", key_dim)
        .define("VALUE_DIM", value_dim)
        .define("KEY_VECTOR", head_vector(keys, key_dim))
        .define("VALUE_VECTOR", head_vector(values, value_dim))
        .grid(batch * heads)
        .block(128)
        .rows(keys[0])
        .rows(keys[1])
        .rows(values[0])
        .rows(keys[2]))
}

/// Bytes of shared memory of the forward pass, and of what the backward pass has besides.
fn shared(dims: Dims, dtype: DType) -> (usize, usize) {
    let keys = dims.key_dim.next_multiple_of(16);
    let (ldk, ldv) = (pitch(dims.key_dim, dtype), pitch(dims.value_dim, dtype));
    let sums = 4 * (2 * TALL + TALL / SUB) * (keys + 4);
    let tiles = (4 * TALL + 6 * SUB) * ldk + (TALL + keys) * ldv;
    let squares = 4 * (TALL / SUB * 2 * SUB * (SUB + 1) + keys);
    (sums + tiles * dtype.size(), TALL * (ldk + ldv) * dtype.size() + squares)
}

fn finish(call: Call, dims: Dims, scale: Option<f32>) -> Call {
    let scale = scale.unwrap_or_else(|| (1.0 / (dims.key_dim as f64).sqrt()) as f32);
    call.arg(dims.heads as i32).arg(dims.time as i32).arg(scale)
}

/// As [`cpu::gla::gla_forward`](crate::cpu::gla::gla_forward); `kept` receives at least `batch heads ceil(time / 64) key_dim
/// value_dim` f32 for [`backward`].
///
/// # Errors
/// If heads are too wide, and as [`Calls::launch`].
#[allow(clippy::too_many_arguments)] // the tensors of the launch
pub fn forward(
    c: &mut Calls<'_>,
    dims: Dims,
    scale: Option<f32>,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Tensor,
    y: Tensor,
    kept: Tensor,
) -> Result<(), KernelError> {
    let call = call("gla_forward", dims, &[q, k, gates], &[v, y])?.shared(shared(dims, q.dtype).0);
    c.launch(finish(call.rows(y).pointer(kept), dims, scale))
}

/// Gradients of [`forward`].
///
/// # Errors
/// As [`forward`].
#[allow(clippy::too_many_arguments)] // the tensors of the launch
pub fn backward(
    c: &mut Calls<'_>,
    dims: Dims,
    scale: Option<f32>,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Tensor,
    kept: Tensor,
    dy: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    dgates: Tensor,
) -> Result<(), KernelError> {
    let (both, more) = shared(dims, q.dtype);
    let call = call("gla_backward", dims, &[q, k, gates, dq, dk], &[v, dy, dv])?.shared(both + more);
    let call = call.pointer(kept).rows(dy).rows(dq).rows(dk).rows(dv).rows(dgates);
    c.launch(finish(call, dims, scale))
}
