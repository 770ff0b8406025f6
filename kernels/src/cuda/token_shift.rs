//! Token shift and mixing. Device side: `kernels/cuda/token_shift.cu`; formulas in
//! [`cpu::token_shift`](crate::cpu::token_shift).

use super::call::{Argument, Call, Calls, Tensor};
use super::partials;
use super::source::{common_vector, real};
use crate::device::{DType, KernelError};

/// Rows of a thread.
const RUN: usize = 32;

/// `tensors` are the results or their gradients, and `mixes` their mix vectors: none for a mere shift of one tensor.
fn call(entry: &'static str, x: Tensor, time: usize, mixes: &[Tensor], tensors: &[Tensor]) -> Call {
    let vector = common_vector(&[tensors, mixes, &[x]].concat(), 4);
    let table = tensors.iter().enumerate().flat_map(|(j, &t)| {
        let mix = mixes.get(j).map_or(Argument::Null, |&m| Argument::Pointer(m));
        [Argument::Rows(t), mix]
    });
    real(Call::file("token_shift", entry), x)
        .define("MIXES", mixes.len())
        .define("VECTOR", vector)
        .grid3(x.cols.div_ceil(128 * vector), time.div_ceil(RUN), x.rows / time.max(1))
        .block(128)
        .rows(x)
        .arg(Argument::Table(table.collect()))
}

/// `ys[j] = x + (shift(x) - x) mixes[j]` in sequences of `time` rows; without mixes `ys[0] = shift(x)`.
///
/// # Errors
/// As [`Calls::launch`].
pub fn forward(c: &mut Calls<'_>, x: Tensor, time: usize, mixes: &[Tensor], ys: &[Tensor]) -> Result<(), KernelError> {
    c.launch(call("shift_forward", x, time, mixes, ys).arg(time as i32).arg(RUN as i32))
}

/// The gradients of [`forward`]: `dx` and one for each mix. Without mixes `x` is not read: give the gradient itself.
///
/// # Errors
/// As [`Calls::launch`].
pub fn backward(
    c: &mut Calls<'_>,
    x: Tensor,
    time: usize,
    mixes: &[Tensor],
    dys: &[Tensor],
    dx: Tensor,
    dmixes: &[Tensor],
) -> Result<(), KernelError> {
    let parts = x.rows / time.max(1) * time.div_ceil(RUN);
    let partials = c.scratch(parts.max(1), mixes.len() * x.cols, DType::F32);
    let mut call = call("shift_backward", x, time, mixes, dys);
    if common_vector(&[dx], 4) < common_vector(&[dys, mixes, &[x]].concat(), 4) {
        let vector = common_vector(&[dx], 4);
        call.defines.retain(|(name, _)| *name != "VECTOR");
        call.grid[0] = x.cols.div_ceil(128 * vector) as u32;
        call = call.define("VECTOR", vector);
    }
    c.launch(call.rows(dx).pointer(partials).arg(time as i32).arg(RUN as i32))?;
    let partials = partials.slice_rows(0, parts);
    dmixes.iter().enumerate().try_for_each(|(j, &dmix)| partials::sum(c, partials, j * x.cols, dmix))
}
