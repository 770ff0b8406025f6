//! Causal depthwise convolution. Device side: `kernels/cuda/conv1d.cu`; formulas in [`cpu::conv1d`](crate::cpu::conv1d).

use super::call::{Call, Calls, Tensor};
use super::partials;
use super::source::{common_vector, real};
use crate::device::{DType, KernelError};

/// Rows of a thread.
const RUN: usize = 64;

/// The parameters of a convolution.
#[derive(Clone, Copy, Debug)]
pub struct Conv {
    /// `[D, K]`; tap K - 1 sees the current row.
    pub weight: Tensor,
    /// `[D]`
    pub bias: Option<Tensor>,
    /// Whether SiLU is applied to the result.
    pub silu: bool,
}

fn call(entry: &'static str, conv: Conv, time: usize, tensors: &[Tensor]) -> Call {
    let x = tensors[0];
    let vector = common_vector(tensors, 4);
    real(Call::file("conv1d", entry), x)
        .define("TAPS", conv.weight.len() / x.cols.max(1))
        .define("SILU", u8::from(conv.silu))
        .define("VECTOR", vector)
        .grid3(x.cols.div_ceil(128 * vector), time.div_ceil(RUN), x.rows / time.max(1))
        .block(128)
}

/// As [`cpu::conv1d::forward`](crate::cpu::conv1d::forward) for sequences of `time` rows.
///
/// # Errors
/// As [`Calls::launch`].
pub fn forward(c: &mut Calls<'_>, conv: Conv, x: Tensor, time: usize, y: Tensor) -> Result<(), KernelError> {
    let call = call("conv1d_forward", conv, time, &[x, y]).rows(x).pointer(conv.weight).pointer_or_null(conv.bias);
    c.launch(call.rows(y).arg(time as i32).arg(RUN as i32))
}

/// As [`cpu::conv1d::backward`](crate::cpu::conv1d::backward).
///
/// # Errors
/// As [`Calls::launch`].
#[allow(clippy::too_many_arguments)] // the tensors of the launch
pub fn backward(
    c: &mut Calls<'_>,
    conv: Conv,
    x: Tensor,
    time: usize,
    dy: Tensor,
    dx: Tensor,
    dweight: Tensor,
    dbias: Option<Tensor>,
) -> Result<(), KernelError> {
    let parts = x.rows / time.max(1) * time.div_ceil(RUN);
    let partials = c.scratch(parts.max(1), conv.weight.len() + x.cols, DType::F32);
    let call = call("conv1d_backward", conv, time, &[x, dy, dx]).rows(x).pointer(conv.weight);
    let call = call.pointer_or_null(conv.bias).rows(dy).rows(dx).pointer(partials);
    c.launch(call.arg(time as i32).arg(RUN as i32))?;
    let partials = partials.slice_rows(0, parts);
    partials::sum(c, partials, 0, dweight)?;
    dbias.map_or(Ok(()), |dbias| partials::sum(c, partials, dweight.len(), dbias))
}
