//! The last step of sums that blocks make parts of. Device side: `kernels/cuda/partials.cu`.

use super::call::{Call, Calls, Tensor};
use crate::device::KernelError;

/// `out[c]` = the sum over the rows of column `from + c` of `partials`.
///
/// # Errors
/// As [`Calls::launch`].
pub fn sum(c: &mut Calls<'_>, partials: Tensor, from: usize, out: Tensor) -> Result<(), KernelError> {
    let part = partials.slice_cols(from, from + out.len());
    let first = Tensor { rows: 1, ..part };
    let call = Call::file("partials", "sum_partials").grid(out.len().div_ceil(32)).pointer(first);
    c.launch(call.arg(part.rows).arg(part.stride).pointer(out).arg(out.len()))
}
