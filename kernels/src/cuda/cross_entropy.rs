//! Softmax cross-entropy and accuracy. Device side: `kernels/cuda/cross_entropy.cu`; formulas in
//! [`cpu::cross_entropy`](crate::cpu::cross_entropy).

use super::call::{Call, Calls, Tensor};
use super::source::real;
use crate::device::{DType, KernelError};

fn call(entry: &'static str, logits: Tensor) -> Call {
    let threads = if logits.cols > 4096 { 512 } else { 128 };
    real(Call::file("cross_entropy", entry), logits).define("VECTOR", logits.vector(4)).grid(logits.rows).block(threads)
}

fn bad_target([_, position, target, classes]: [i32; 4]) -> String {
    format!("target {target} at position {position} is none of {classes} classes")
}

/// Counts the targets that are not -1 into device memory, `i32[1]`; one that is no class is refused.
///
/// # Errors
/// As [`Calls::launch`].
pub fn count(c: &mut Calls<'_>, targets: Tensor, classes: usize) -> Result<Tensor, KernelError> {
    let counted = c.scratch(1, 1, DType::I32);
    let call = Call::file("cross_entropy", "count_targets").block(1024).pointer(targets).arg(targets.len());
    c.launch(call.arg(classes).pointer(counted).refuses(bad_target))?;
    Ok(counted)
}

/// Memory for the losses of rows.
pub fn losses(c: &mut Calls<'_>, rows: usize) -> Tensor {
    c.scratch(1, rows, DType::F32)
}

/// `out` = the mean of `losses` over the rows that count.
///
/// # Errors
/// As [`Calls::launch`].
pub fn mean(c: &mut Calls<'_>, losses: Tensor, counted: Tensor, out: Tensor) -> Result<(), KernelError> {
    let call = Call::file("cross_entropy", "mean_loss").block(1024).pointer(losses).arg(losses.len());
    c.launch(call.pointer(counted).pointer(out))
}

/// The log-sum-exp and the loss of each row of `logits`, both 0 for rows that do not count.
///
/// # Errors
/// As [`Calls::launch`].
pub fn rows(
    c: &mut Calls<'_>,
    logits: Tensor,
    targets: Tensor,
    lse: Tensor,
    losses: Tensor,
) -> Result<(), KernelError> {
    c.launch(call("cross_entropy_forward", logits).rows(logits).pointer(targets).pointer(lse).pointer(losses))
}

/// Overwrites a block of logits by `upstream` times the gradient of the mean over `counted` rows, and writes the loss of
/// each row.
///
/// # Errors
/// As [`Calls::launch`].
pub fn rows_in_place(
    c: &mut Calls<'_>,
    logits: Tensor,
    targets: Tensor,
    counted: Tensor,
    upstream: f32,
    losses: Tensor,
) -> Result<(), KernelError> {
    let call = call("cross_entropy_in_place", logits).rows(logits).pointer(targets).pointer(counted);
    c.launch(call.arg(upstream).pointer(losses))
}

/// As [`cpu::cross_entropy::forward`](crate::cpu::cross_entropy::forward), with the mean in `loss`.
///
/// # Errors
/// As [`Calls::launch`].
pub fn forward(
    c: &mut Calls<'_>,
    logits: Tensor,
    targets: Tensor,
    loss: Tensor,
    lse: Tensor,
) -> Result<(), KernelError> {
    let counted = count(c, targets, logits.cols)?;
    let losses = losses(c, logits.rows);
    rows(c, logits, targets, lse, losses)?;
    mean(c, losses, counted, loss)
}

/// As [`cpu::cross_entropy::backward`](crate::cpu::cross_entropy::backward), `upstream` in device memory; `dlogits` may be
/// the memory of `logits`.
///
/// # Errors
/// As [`Calls::launch`].
pub fn backward(
    c: &mut Calls<'_>,
    logits: Tensor,
    targets: Tensor,
    lse: Tensor,
    upstream: Tensor,
    dlogits: Tensor,
) -> Result<(), KernelError> {
    let counted = count(c, targets, logits.cols)?;
    let vector = logits.vector(4).min(dlogits.vector(4));
    let mut call = call("cross_entropy_backward", logits);
    call.defines.retain(|(name, _)| *name != "VECTOR");
    let call = call.define("VECTOR", vector).rows(logits).pointer(targets).pointer(lse).pointer(upstream);
    c.launch(call.pointer(counted).rows(dlogits))
}

/// The share of rows whose largest logit is the target's, among those that count.
///
/// # Errors
/// As [`Calls::launch`].
pub fn accuracy(c: &mut Calls<'_>, logits: Tensor, targets: Tensor, share: Tensor) -> Result<(), KernelError> {
    let counted = count(c, targets, logits.cols)?;
    let correct = losses(c, logits.rows);
    c.launch(call("correct_rows", logits).rows(logits).pointer(targets).pointer(correct))?;
    mean(c, correct, counted, share)
}
