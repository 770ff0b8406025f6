//! Retention in its exact form. Device side: `kernels/cuda/retention.cu`; formulas in
//! [`cpu::retention`](crate::cpu::retention).

use super::call::{Call, Calls, Tensor};
use super::source::{head_vector, pitch, real};
use crate::cpu::retention::Dims;
use crate::device::KernelError;

/// Most channels of a head.
const MAX_HEAD_DIM: usize = 128;
/// Rows of a block.
const TALL: usize = 64;

fn call(entry: &'static str, dims: Dims, keys: &[Tensor], values: &[Tensor]) -> Result<Call, KernelError> {
    let Dims { batch, time, heads, key_dim, value_dim } = dims;
    if key_dim.max(value_dim) > MAX_HEAD_DIM {
        let message =
            format!("CUDA retention takes heads of up to {MAX_HEAD_DIM} channels, found {key_dim} and {value_dim}");
        return Err(KernelError(message));
    }
    Ok(real(Call::file("retention", entry), values[0])
        .define("KEY_DIM", key_dim)
        .define("VALUE_DIM", value_dim)
        .define("KEY_VECTOR", head_vector(keys, key_dim))
        .define("VALUE_VECTOR", head_vector(values, value_dim))
        .grid3(time.div_ceil(TALL), batch * heads, 1)
        .block(128))
}

fn finish(call: Call, dims: Dims) -> Call {
    call.arg(dims.heads as i32).arg(dims.time as i32)
}

/// As [`cpu::retention::parallel_forward`](crate::cpu::retention::parallel_forward).
///
/// # Errors
/// If heads are too wide, and as [`Calls::launch`].
pub fn forward(
    c: &mut Calls<'_>,
    dims: Dims,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    y: Tensor,
    normalizer: Tensor,
) -> Result<(), KernelError> {
    let [keys, values] = [dims.key_dim, dims.value_dim].map(|dim| pitch(dim, q.dtype) * q.dtype.size());
    let call = call("retention_forward", dims, &[q, k], &[v, y])?.shared(TALL * (2 * keys + values));
    c.launch(finish(call.rows(q).rows(k).rows(v).rows(y).pointer(normalizer), dims))
}

/// As [`cpu::retention::parallel_backward`](crate::cpu::retention::parallel_backward).
///
/// # Errors
/// As [`forward`].
#[allow(clippy::too_many_arguments)] // the tensors of the launch
pub fn backward(
    c: &mut Calls<'_>,
    dims: Dims,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    normalizer: Tensor,
    dy: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
) -> Result<(), KernelError> {
    let [keys, values] = [dims.key_dim, dims.value_dim].map(|dim| pitch(dim, q.dtype) * q.dtype.size());
    let walk = if dims.key_dim.next_multiple_of(16) + dims.value_dim.next_multiple_of(16) > 128 { 32 } else { 64 };
    let queries = call("retention_backward_queries", dims, &[k, dq], &[v, dy])?;
    let queries = queries.shared(TALL * values + walk * (keys + values));
    c.launch(finish(queries.rows(k).rows(v).pointer(normalizer).rows(dy).rows(dq), dims))?;
    let both = call("retention_backward_keys", dims, &[q, k, dk], &[v, dy, dv])?;
    let both = both.shared((TALL + walk) * (keys + values) + 4 * walk);
    c.launch(finish(both.rows(q).rows(k).rows(v).pointer(normalizer).rows(dy).rows(dk).rows(dv), dims))
}
