//! The selective scan and the Longhorn update. Device side: `kernels/cuda/scan.cu`; formulas in
//! [`cpu::selective_scan`](crate::cpu::selective_scan) and [`cpu::longhorn`](crate::cpu::longhorn).

use super::call::{Argument, Call, Calls, Tensor};
use super::partials;
use super::source::{common_vector, real};
use crate::cpu::scan::{CHUNK, Dims};
use crate::device::{DType, KernelError};

/// Channels of a block.
const CHANNELS: usize = 64;
/// Most states of a channel.
const MAX_STATES: usize = 128;

/// What a scan reads.
#[derive(Clone, Copy, Debug)]
pub struct Inputs {
    /// `[B T, D]`
    pub u: Tensor,
    /// Step size before its function, `[B T, D]`.
    pub step: Tensor,
    /// `k` of Longhorn, `B` of Mamba: `[B T, N]`.
    pub keys: Tensor,
    /// `q` of Longhorn, `C` of Mamba: `[B T, N]`.
    pub queries: Tensor,
    /// `[D, N]` for the selective scan; none for Longhorn.
    pub a_log: Option<Tensor>,
    /// The skip connection, `[D]`.
    pub skip: Option<Tensor>,
    /// The gate `z`, `[B T, D]`.
    pub gate: Option<Tensor>,
}

/// Where [`backward`] writes.
#[derive(Clone, Copy, Debug)]
pub struct Gradients {
    /// `[B T, D]`
    pub u: Tensor,
    /// `[B T, D]`
    pub step: Tensor,
    /// `[B T, N]`
    pub keys: Tensor,
    /// `[B T, N]`
    pub queries: Tensor,
    /// `[D, N]`, given exactly if there are rates.
    pub a_log: Option<Tensor>,
    /// `[D]`, given exactly if there is a skip connection.
    pub skip: Option<Tensor>,
    /// `[B T, D]`, given exactly if there is a gate.
    pub gate: Option<Tensor>,
}

/// Lanes that share a channel, and the states of a channel with padding.
fn lanes(states: usize, most: usize) -> (usize, usize) {
    let split = if states <= 4 { 1 } else { (states.div_ceil(4)).next_power_of_two().min(most) };
    (split, states.div_ceil(split) * split)
}

/// `wide` are tensors of the channels besides the inputs.
fn call(entry: &'static str, dims: Dims, inputs: &Inputs, split: usize, wide: &[Tensor]) -> Result<Call, KernelError> {
    if dims.state > MAX_STATES {
        let message = format!("CUDA scans take up to {MAX_STATES} states for each channel, found {}", dims.state);
        return Err(KernelError(message));
    }
    let wide: Vec<Tensor> = [inputs.u, inputs.step].iter().chain(&inputs.gate).chain(wide).copied().collect();
    Ok(real(Call::file("scan", entry), inputs.u)
        .define("VECTOR", common_vector(&wide, 4.min(CHUNK / split)))
        .define("STATE", dims.state)
        .define("LONGHORN", u8::from(inputs.a_log.is_none()))
        .define("GATED", u8::from(inputs.gate.is_some()))
        .define("SPLIT", split)
        .grid3(dims.channels.div_ceil(CHANNELS), dims.batch, 1)
        .block(CHANNELS * split)
        .rows(inputs.u)
        .rows(inputs.step)
        .rows(inputs.keys)
        .rows(inputs.queries)
        .pointer_or_null(inputs.a_log)
        .pointer_or_null(inputs.skip)
        .rows_or_null(inputs.gate))
}

/// Bytes of what a chunk reads, prepared.
fn prepared(states: usize) -> usize {
    4 * (2 * CHUNK * CHANNELS + 2 * CHUNK * states + CHUNK)
}

/// `y` `[B T, D]` of the scan, and the state before each chunk for [`backward`].
///
/// # Errors
/// If there are too many states, and as [`Calls::launch`].
pub fn forward(
    c: &mut Calls<'_>,
    dims: Dims,
    inputs: &Inputs,
    y: Tensor,
    boundaries: Option<Tensor>,
) -> Result<(), KernelError> {
    // exponentials keep more lanes busy
    let (split, states) = lanes(dims.state, if inputs.a_log.is_some() { 4 } else { 2 });
    let call = call("scan_forward", dims, inputs, split, &[y])?.shared(prepared(states));
    c.launch(call.rows(y).pointer_or_null(boundaries).arg(dims.time as i32))
}

/// Gradients of [`forward`] from that of its result.
///
/// # Errors
/// As [`forward`].
pub fn backward(
    c: &mut Calls<'_>,
    dims: Dims,
    inputs: &Inputs,
    dy: Tensor,
    boundaries: Tensor,
    gradients: Gradients,
) -> Result<(), KernelError> {
    let g = gradients;
    let (split, states) = lanes(dims.state, 16);
    let groups = dims.channels.div_ceil(CHANNELS);
    let pairs = c.scratch(groups.max(1), dims.rows() * 2 * dims.state, DType::F32);
    let skips = c.scratch(dims.batch, dims.channels, DType::F32);
    let rates = c.scratch(dims.batch, dims.channels * dims.state, DType::F32);
    let pair_sums = 4 * CHUNK * (CHANNELS * split / 32) * 2 * states;
    let shared = prepared(states) + 4 * 2 * CHUNK * CHANNELS + pair_sums + 4 * 2 * CHUNK;
    let wide: Vec<Tensor> = [dy, g.u, g.step].iter().chain(&g.gate).copied().collect();
    let call = call("scan_backward", dims, inputs, split, &wide)?.define("MIN_BLOCKS", if split <= 4 { 2 } else { 1 });
    let call = call.shared(shared).pointer(boundaries).rows(dy);
    let call = call.rows(g.u).rows(g.step).rows_or_null(g.gate).pointer(pairs);
    let call = call.arg(match g.skip {
        Some(_) => Argument::Pointer(skips),
        None => Argument::Null,
    });
    c.launch(call.pointer(rates).arg(dims.time as i32))?;
    let sum = real(Call::file("scan", "sum_pairs"), g.keys).define("STATE", dims.state);
    let sum = sum.grid((dims.rows() * 2 * dims.state).div_ceil(256)).pointer(pairs).arg(groups as i32);
    c.launch(sum.rows(g.queries).rows(g.keys))?;
    g.skip.map_or(Ok(()), |out| partials::sum(c, skips, 0, out))?;
    g.a_log.map_or(Ok(()), |out| partials::sum(c, rates, 0, out))
}
