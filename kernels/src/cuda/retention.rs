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

/// Values as the kernels load them: where heads have no whole vectors, a copy with wider heads.
fn loaded(c: &mut Calls<'_>, dims: Dims, values: Tensor) -> Result<Tensor, KernelError> {
    let (most, step) = (16 / values.dtype.size(), dims.value_dim.next_multiple_of(16));
    if head_vector(&[values], dims.value_dim) == most || dims.time <= TALL {
        return Ok(values);
    }
    let to = c.scratch(values.rows, dims.heads * step, values.dtype);
    let call = real(Call::file("retention", "pad_values"), values).define("VALUE_DIM", dims.value_dim);
    c.launch(call.define("VALUE_STEP", step).grid(values.rows.min(4096)).rows(values).rows(to))?;
    Ok(to)
}

/// `values` are results; `loaded` are what the kernel loads of values' width.
fn call(
    entry: &'static str,
    dims: Dims,
    keys: &[Tensor],
    values: &[Tensor],
    loaded: &[Tensor],
) -> Result<Call, KernelError> {
    let Dims { batch, time, heads, key_dim, value_dim } = dims;
    if key_dim.max(value_dim) > MAX_HEAD_DIM {
        let message =
            format!("CUDA retention takes heads of up to {MAX_HEAD_DIM} channels, found {key_dim} and {value_dim}");
        return Err(KernelError(message));
    }
    let step = loaded[0].cols / heads.max(1);
    Ok(real(Call::file("retention", entry), loaded[0])
        .define("KEY_DIM", key_dim)
        .define("VALUE_DIM", value_dim)
        .define("KEY_VECTOR", head_vector(keys, key_dim))
        .define("VALUE_VECTOR", head_vector(values, value_dim))
        .define("VALUE_LOAD", head_vector(loaded, step))
        .define("VALUE_STEP", step)
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
    let v = loaded(c, dims, v)?;
    let call = call("retention_forward", dims, &[q, k], &[y], &[v])?.shared(TALL * (2 * keys + values));
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
    let (v, dy) = (loaded(c, dims, v)?, loaded(c, dims, dy)?);
    let queries = call("retention_backward_queries", dims, &[k, dq], &[dv], &[v, dy])?;
    let queries = queries.shared(TALL * values + walk * (keys + values));
    c.launch(finish(queries.rows(k).rows(v).pointer(normalizer).rows(dy).rows(dq), dims))?;
    let both = call("retention_backward_keys", dims, &[q, k, dk], &[dv], &[v, dy])?;
    let both = both.shared((TALL + walk) * (keys + values) + 4 * walk);
    c.launch(finish(both.rows(q).rows(k).rows(v).pointer(normalizer).rows(dy).rows(dk).rows(dv), dims))
}
