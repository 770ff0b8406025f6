//! Row lookup by token. Device side: `kernels/cuda/embedding.cu`.

use super::call::{Call, Calls, Tensor};
use super::layout;
use crate::device::KernelError;

fn refusal(words: [i32; 4]) -> String {
    format!("id {} at position {} is outside of a table of {} rows", words[1], words[2], words[3])
}

/// `y[i] = table[tokens[i]]`
///
/// # Errors
/// As [`Calls::launch`].
pub fn forward(c: &mut Calls<'_>, tokens: Tensor, table: Tensor, y: Tensor) -> Result<(), KernelError> {
    let call = Call::file("embedding", "embedding_forward").grid(y.rows).block(128);
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
    let call = Call::file("embedding", "embedding_backward").grid(dy.rows);
    c.launch(call.pointer(tokens).rows(dy).rows(dtable).refuses(refusal))
}
