//! The selective scan and the Longhorn update. Device side: `kernels/cuda/scan.cu`; formulas in
//! [`cpu::selective_scan`](crate::cpu::selective_scan) and [`cpu::longhorn`](crate::cpu::longhorn).

use super::call::{Argument, Call, Calls, Tensor};
use super::partials;
use super::source::{common_vector, real};
use crate::cpu::scan::{CHUNK, Dims};
use crate::device::{DType, KernelError};

/// Most states of a channel.
const MAX_STATES: usize = 128;
/// Rows that are prepared and finished at once.
const RUN: usize = 4;

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

/// How the channels and states of a scan are spread over a block.
#[derive(Clone, Copy, Debug)]
struct Shape {
    /// States of a channel with padding: four lanes have as many each, and an even number.
    states: usize,
    /// Channels of four lanes.
    wide: usize,
    warps: usize,
}

impl Shape {
    fn new(states: usize) -> Self {
        let padded = states.next_multiple_of(8);
        // three channels of 16 states: the 1536 channels of 24 sequences are 2.9 warps for each scheduler of an H100,
        // which has registers for three
        let wide = if padded <= 16 { 3 } else { 1 };
        Self { states: padded, wide, warps: if padded <= 32 { 4 } else { 2 } }
    }

    /// Channels of a block.
    fn channels(self) -> usize {
        8 * self.wide * self.warps
    }

    /// Blocks that a multiprocessor has room for.
    fn blocks(self) -> usize {
        if self.wide == 3 { 3 } else { 1 }
    }

    /// Places of a block's channels in a row in shared memory.
    fn places(self) -> usize {
        8 * self.warps * if self.wide == 3 { 4 } else { self.wide }
    }

    /// Bytes of `Forward` in `scan.cu`.
    fn forward_bytes(self) -> usize {
        4 * (4 * CHUNK * self.states + 4 * RUN * self.places())
    }

    /// Bytes of `Backward` in `scan.cu`, with activations of either format.
    fn backward_bytes(self) -> usize {
        let (keys, steps) = (2 * CHUNK * self.states, 2 * CHUNK * self.places());
        let pairs = 2 * self.warps * RUN * 2 * self.states;
        let (dy, sums) = (RUN * self.places(), 3 * RUN * self.channels());
        // f32 has three runs' first states there, bf16 four; a thread's elements of four tensors, and what aligns them
        let format = |starts: usize, size: usize| {
            4 * starts * self.states * self.channels() + 4 * 32 * self.warps * (self.wide + 1) * size
        };
        4 * (keys + steps + pairs + dy + sums) + format(3, 4).max(format(4, 2))
    }
}

/// `wide` are tensors of the channels besides the inputs.
fn call(entry: &'static str, dims: Dims, inputs: &Inputs, shape: Shape, wide: &[Tensor]) -> Result<Call, KernelError> {
    if dims.state > MAX_STATES {
        let message = format!("CUDA scans take up to {MAX_STATES} states for each channel, found {}", dims.state);
        return Err(KernelError(message));
    }
    let wide: Vec<Tensor> = [inputs.u, inputs.step].iter().chain(&inputs.gate).chain(wide).copied().collect();
    let bytes = |t: &Tensor| (t.rows * t.stride).div_ceil(dims.batch.max(1)) * t.dtype.size();
    if let Some(t) = wide.iter().find(|t| bytes(t) > u32::MAX as usize) {
        let message =
            format!("CUDA scans take sequences of less than 4 GiB, found one of {} bytes: shorten them", bytes(t));
        return Err(KernelError(message));
    }
    Ok(real(Call::file("scan", entry), inputs.u)
        .define("VECTOR", common_vector(&wide, 2.min(shape.wide)))
        .define("KEY_VECTOR", common_vector(&[inputs.keys, inputs.queries], 4))
        .define("STATE", dims.state)
        .define("LONGHORN", u8::from(inputs.a_log.is_none()))
        .define("GATED", u8::from(inputs.gate.is_some()))
        .define("WIDE", shape.wide)
        .define("WARPS", shape.warps)
        .define("MIN_BLOCKS", shape.blocks())
        .grid3(dims.channels.div_ceil(shape.channels()), dims.batch, 1)
        .block(32 * shape.warps)
        .rows(inputs.u)
        .rows(inputs.step)
        .rows(inputs.keys)
        .rows(inputs.queries)
        .pointer_or_null(inputs.a_log)
        .pointer_or_null(inputs.skip)
        .rows_or_null(inputs.gate))
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
    let shape = Shape::new(dims.state);
    let wide: Vec<Tensor> = boundaries.into_iter().chain([y]).collect();
    let call = call("scan_forward", dims, inputs, shape, &wide)?.shared(shape.forward_bytes());
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
    let shape = Shape::new(dims.state);
    let groups = dims.channels.div_ceil(shape.channels());
    let pairs = c.scratch(groups.max(1), dims.rows() * 2 * dims.state, DType::F32);
    let skips = c.scratch(dims.batch, dims.channels, DType::F32);
    let rates = c.scratch(dims.batch, dims.channels * dims.state, DType::F32);
    let wide: Vec<Tensor> = [boundaries, dy, g.u, g.step].iter().chain(&g.gate).copied().collect();
    let call = call("scan_backward", dims, inputs, shape, &wide)?;
    let call = call.shared(shape.backward_bytes()).pointer(boundaries).rows(dy);
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
