//! Moving and filling. Device side: `kernels/cuda/layout.cu`.

use super::call::{Call, Calls, Tensor};
use super::elementwise::type_name;
use super::source::real;
use crate::device::KernelError;

/// Blocks of 256 threads for `n` elements: enough to fill the largest device, and a loop over the rest.
pub fn blocks_for(n: usize) -> usize {
    n.div_ceil(256).min(4096)
}

/// Copies `from` into the first rows and columns of `to`; those behind become 0.
///
/// # Errors
/// As [`Calls::launch`].
pub fn copy_rows(c: &mut Calls<'_>, from: Tensor, to: Tensor) -> Result<(), KernelError> {
    let call = real(Call::file("layout", "copy_rows"), to).define("FROM", type_name(from.dtype));
    c.launch(call.grid(blocks_for(to.len())).rows(from).rows(to))
}

/// Sets every element to `value`.
///
/// # Errors
/// As [`Calls::launch`].
pub fn fill(c: &mut Calls<'_>, to: Tensor, value: f32) -> Result<(), KernelError> {
    c.launch(real(Call::file("layout", "fill"), to).grid(blocks_for(to.len())).rows(to).arg(value))
}

/// Adds 1 to a counter, `i32[1]`.
///
/// # Errors
/// As [`Calls::launch`].
pub fn increment(c: &mut Calls<'_>, counter: Tensor) -> Result<(), KernelError> {
    c.launch(Call::file("layout", "increment").block(1).pointer(counter))
}

/// `y = 1 - beta^n` for update number n, counted from 1, given the number of updates before, `i32[1]`.
///
/// # Errors
/// As [`Calls::launch`].
pub fn bias_correction(c: &mut Calls<'_>, step: Tensor, beta: f64, y: Tensor) -> Result<(), KernelError> {
    c.launch(Call::file("layout", "bias_correction").block(1).pointer(step).arg(beta).pointer(y))
}
