//! Sums over rows and columns: the gradient of broadcasting. Device side: `kernels/cuda/reduce.cu`.

use super::call::{Call, Calls, Tensor};
use super::elementwise::Repeat;
use super::source::real;
use crate::device::{DType, KernelError};

/// Blocks that a sum of many rows is spread over.
const BLOCKS: usize = 1024;

/// The sum of `x` over all elements that `repeat` would make of one element of `y`.
///
/// # Errors
/// As [`Calls::launch`].
pub fn sum_to(c: &mut Calls<'_>, x: Tensor, y: Tensor, repeat: Repeat) -> Result<(), KernelError> {
    let Repeat { div, modulo, column } = repeat;
    let mut x = x;
    if column {
        let last = div == 1 && modulo == x.rows;
        let sums = if last { y.reshape(1)? } else { c.scratch(x.rows, 1, DType::F32) };
        c.launch(real(Call::file("reduce", "sum_columns"), x).grid(x.rows.div_ceil(8)).rows(x).pointer(sums))?;
        if last {
            return Ok(());
        }
        x = sums;
    }
    let y = if y.rows == modulo { y } else { y.reshape(x.cols)? };
    let (count, tiles) = (x.rows / modulo, x.cols.div_ceil(32 * x.vector(4)) * modulo);
    // two passes where one would leave most of the device idle
    let chunks = (BLOCKS / tiles.max(1)).clamp(1, count.div_ceil(64).max(1));
    if chunks == 1 {
        return sum_rows(c, x, y, div, modulo, 1);
    }
    let partial = c.scratch(modulo * chunks, x.cols, DType::F32);
    sum_rows(c, x, partial, div, modulo, chunks)?;
    sum_rows(c, partial, y, chunks, modulo, 1)
}

fn sum_rows(
    c: &mut Calls<'_>,
    x: Tensor,
    y: Tensor,
    div: usize,
    modulo: usize,
    chunks: usize,
) -> Result<(), KernelError> {
    let per_chunk = (x.rows / modulo).div_ceil(chunks);
    let vector = x.vector(4);
    let call = real(Call::file("reduce", "sum_rows"), x).define("VECTOR", vector);
    let mut call = call.grid3(x.cols.div_ceil(32 * vector), chunks, modulo);
    call.block = [32, 8, 1];
    c.launch(call.rows(x).rows(y).arg(div as i32).arg(modulo as i32).arg(per_chunk))
}
