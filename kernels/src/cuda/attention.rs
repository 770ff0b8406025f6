//! Causal softmax attention. Device side: `kernels/cuda/attention.cu`; formulas in
//! [`cpu::attention`](crate::cpu::attention).

use super::call::{Argument, Call, Calls, Tensor};
use super::source::{head_vector, pitch, real};
use crate::cpu::attention::Dims;
use crate::device::{DType, KernelError};
use crate::random::Keep;

/// Most channels of a head.
const MAX_HEAD_DIM: usize = 128;
/// Rows of a block.
const TALL: usize = 64;

/// A dropout mask that the device draws: that of [`Keep::new`] at the step in device memory.
#[derive(Clone, Copy, Debug)]
pub struct Dropout {
    /// Seed of the run.
    pub seed: u64,
    /// Which mask of the step.
    pub site: u32,
    /// Probability of 0.
    pub p: f32,
    /// `i32[1]`
    pub step: Tensor,
}

/// What the three kernels have in common: one block for each 64 rows of a head.
fn call(entry: &'static str, dims: Dims, dropout: Option<Dropout>, tensors: &[Tensor]) -> Result<Call, KernelError> {
    let Dims { batch, time, heads, head_dim } = dims;
    if head_dim > MAX_HEAD_DIM {
        let message = format!("CUDA attention takes heads of up to {MAX_HEAD_DIM} channels, found {head_dim}");
        return Err(KernelError(message));
    }
    Ok(real(Call::file("attention", entry), tensors[0])
        .define("HEAD_DIM", head_dim)
        .define("VECTOR", head_vector(tensors, head_dim))
        .define("DROPOUT", u8::from(dropout.is_some()))
        .grid3(time.div_ceil(TALL), batch * heads, 1)
        .block(128))
}

/// The arguments at the end of each kernel.
fn finish(call: Call, dims: Dims, dropout: Option<Dropout>) -> Call {
    let scale = 1.0 / (dims.head_dim as f32).sqrt();
    let call = call.arg(dims.heads as i32).arg(dims.time as i32).arg(scale);
    match dropout {
        Some(Dropout { seed, site, p, step }) => {
            let keep = Keep::new(seed, 0, site, p);
            call.arg(seed).arg(site).arg(keep.threshold).arg(keep.scale).pointer(step)
        }
        None => call.arg(0u64).arg(0u32).arg(0u32).arg(1.0f32).arg(Argument::Null),
    }
}

/// Bytes of shared memory for tiles of so many rows in all.
fn tiles(dims: Dims, dtype: DType, tall: usize, walk: usize) -> usize {
    (tall + walk) * pitch(dims.head_dim, dtype) * dtype.size()
}

/// Rows of the tiles that the backward kernels walk over.
fn walk(dims: Dims) -> usize {
    if dims.head_dim > 64 { 32 } else { 64 }
}

/// As [`cpu::attention::forward`](crate::cpu::attention::forward).
///
/// # Errors
/// If heads are too wide, and as [`Calls::launch`].
#[allow(clippy::too_many_arguments)] // the tensors of the launch
pub fn forward(
    c: &mut Calls<'_>,
    dims: Dims,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout: Option<Dropout>,
    y: Tensor,
    lse: Tensor,
) -> Result<(), KernelError> {
    let call = call("attention_forward", dims, dropout, &[q, k, v, y])?.shared(tiles(dims, q.dtype, TALL, 4 * TALL));
    c.launch(finish(call.rows(q).rows(k).rows(v).rows(y).pointer(lse), dims, dropout))
}

/// As [`cpu::attention::backward`](crate::cpu::attention::backward).
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
    dropout: Option<Dropout>,
    y: Tensor,
    lse: Tensor,
    dy: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
) -> Result<(), KernelError> {
    let tensors = [q, k, v, dy, dq, dk, dv];
    let delta = c.scratch(dims.batch * dims.heads, dims.time, DType::F32);
    let walk = walk(dims);
    let shared = tiles(dims, q.dtype, 2 * TALL, 4 * walk);
    let queries = call("attention_backward_queries", dims, dropout, &tensors)?.shared(shared);
    let queries = queries.rows(q).rows(k).rows(v).rows(y).pointer(lse).rows(dy).rows(dq).pointer(delta);
    c.launch(finish(queries, dims, dropout))?;
    let keys = call("attention_backward_keys", dims, dropout, &tensors)?.shared(shared + 16 * walk);
    let keys = keys.rows(q).rows(k).rows(v).pointer(lse).rows(dy).pointer(delta).rows(dk).rows(dv);
    c.launch(finish(keys, dims, dropout))
}
