//! Row lookup by token. Device side: `kernels/cuda/embedding.cu`.

use super::call::{Call, Calls, Tensor};
use super::elementwise::type_name;
use super::layout;
use super::source::real;
use crate::device::{DType, KernelError};

fn refusal(words: [i32; 4]) -> String {
    format!("id {} at position {} is outside of a table of {} rows", words[1], words[2], words[3])
}

/// `y[i] = table[tokens[i]]`
///
/// # Errors
/// As [`Calls::launch`].
pub fn forward(c: &mut Calls<'_>, tokens: Tensor, table: Tensor, y: Tensor) -> Result<(), KernelError> {
    let call = real(Call::file("embedding", "embedding_forward"), y).define("TABLE", type_name(table.dtype));
    let call = call.grid(y.rows).block(128);
    c.launch(call.pointer(tokens).rows(table).rows(y).refuses(refusal))
}

/// `dtable[t] = base[t] + sum of dy[i] over the i with tokens[i] = t`; without a base from 0, and where the base is `dtable`
/// itself, in place.
///
/// # Errors
/// As [`Calls::launch`].
pub fn backward(
    c: &mut Calls<'_>,
    tokens: Tensor,
    dy: Tensor,
    base: Option<Tensor>,
    dtable: Tensor,
) -> Result<(), KernelError> {
    match base {
        None => layout::fill(c, dtable, 0.0)?,
        Some(base) if base == dtable => {}
        Some(base) => layout::copy_rows(c, base, dtable)?,
    }
    let (n, rows) = (dy.rows, dtable.rows);
    let starts = c.scratch(1, rows + 1, DType::I32);
    let counts = c.scratch(1, rows, DType::I32);
    let positions = c.scratch(1, n, DType::I32);
    let file = |entry| Call::file("embedding", entry);
    c.launch(file("clear_counts").grid(rows.div_ceil(256)).pointer(counts).arg(rows))?;
    let call = file("count_tokens").grid(n.div_ceil(256)).pointer(tokens).arg(n).arg(rows as i32);
    c.launch(call.pointer(counts).refuses(refusal))?;
    c.launch(file("start_tokens").block(1024).pointer(counts).pointer(starts).arg(rows as i32))?;
    let call = file("place_tokens").grid(n.div_ceil(256)).pointer(tokens).arg(n).arg(rows as i32);
    c.launch(call.pointer(starts).pointer(counts).pointer(positions))?;
    let call = real(file("embedding_backward"), dy).grid3(rows, dy.cols.div_ceil(256), 1);
    c.launch(call.pointer(tokens).pointer(starts).pointer(positions).rows(dy).rows(dtable))
}
