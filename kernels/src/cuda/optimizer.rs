//! Learning rate, gradient norm and AdamW of all parameters together. Device side: `kernels/cuda/optimizer.cu`; formulas in
//! [`cpu::optimizer`](crate::cpu::optimizer).

use super::call::{Argument, Call, Calls, Tensor};
use crate::device::{DType, KernelError};

/// Fewest elements of a piece, which one block takes.
const LEAST_PIECE: usize = 1 << 14;
/// About the most pieces.
const PIECES: usize = 4096;

/// The learning rate as a function of the number of updates made before.
#[derive(Clone, Copy, Debug)]
pub enum Rate<'a> {
    /// The same at every update.
    Constant(f64),
    /// From 0 up to `peak` over `warmup` updates, then along a half cosine down to `floor` at update `steps`.
    Cosine {
        /// Highest rate.
        peak: f64,
        /// Lowest rate after the warm-up.
        floor: f64,
        /// Updates of the warm-up.
        warmup: u64,
        /// Update at which `floor` is reached.
        steps: u64,
    },
    /// A rate for each update; the last one holds from there on.
    Table(&'a [f32]),
}

/// `lr` = the rate of update `step` (`i32[1]`).
///
/// # Errors
/// As [`Calls::launch`].
pub fn learning_rate(c: &mut Calls<'_>, rate: Rate<'_>, step: Tensor, lr: Tensor) -> Result<(), KernelError> {
    let call = Call::file("optimizer", "learning_rate").block(1).pointer(step);
    let (kind, peak, floor, warmup, steps, table) = match rate {
        Rate::Constant(rate) => (0, rate, rate, 0, 0, &[][..]),
        Rate::Cosine { peak, floor, warmup, steps } => (1, peak, floor, warmup as i64, steps as i64, &[][..]),
        Rate::Table(rates) => (2, 0.0, 0.0, 0, 0, rates),
    };
    let call = call.arg(kind).arg(peak).arg(floor).arg(warmup).arg(steps);
    let rates = match table {
        [] => Argument::Null,
        _ => Argument::Table(table.iter().map(|&rate| Argument::F64(rate.into())).collect()),
    };
    c.launch(call.arg(rates).arg(table.len()).pointer(lr))
}

/// Elements of a piece, for tensors of so many elements in all.
fn piece_len(elements: usize) -> usize {
    elements.div_ceil(PIECES).max(LEAST_PIECE).next_multiple_of(1024)
}

/// The pieces of a tensor: first element and one past the last.
fn pieces(len: usize, piece: usize) -> impl Iterator<Item = (usize, usize)> {
    (0..len).step_by(piece).map(move |from| (from, (from + piece).min(len)))
}

fn flat(tensor: Tensor) -> Result<Tensor, KernelError> {
    if tensor.is_empty() { Ok(tensor) } else { tensor.reshape(tensor.len()) }
}

/// `norm` = the Euclidean norm of all `gradients` together.
///
/// # Errors
/// If one has gaps, and as [`Calls::launch`].
pub fn global_norm(c: &mut Calls<'_>, gradients: &[Tensor], norm: Tensor) -> Result<(), KernelError> {
    let piece = piece_len(gradients.iter().map(Tensor::len).sum());
    let mut table = Vec::new();
    for &gradient in gradients {
        let gradient = flat(gradient)?;
        for (from, to) in pieces(gradient.len(), piece) {
            table.push(Argument::Pointer(gradient.slice_cols(from, to)));
            table.push(Argument::I64((to - from) as i64));
        }
    }
    let blocks = table.len() / 2;
    // an f64 each
    let sums = c.scratch(blocks.max(1), 2, DType::F32);
    let call = Call::file("optimizer", "sum_of_squares").grid(blocks).arg(Argument::Table(table));
    c.launch(call.pointer(sums))?;
    c.launch(Call::file("optimizer", "root_of_sum").pointer(sums).arg(blocks).pointer(norm))
}

/// Settings of AdamW; see [`cpu::optimizer::AdamW`](crate::cpu::optimizer::AdamW).
#[derive(Clone, Copy, Debug)]
pub struct AdamW {
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Largest norm of all gradients together, if they are clipped.
    pub clip: Option<f64>,
}

/// A parameter with what its update needs.
#[derive(Clone, Copy, Debug)]
pub struct Parameter {
    /// Updated in place.
    pub value: Tensor,
    /// Its gradient.
    pub gradient: Tensor,
    /// First moment, updated in place.
    pub m: Tensor,
    /// Second moment, updated in place.
    pub v: Tensor,
    /// Weight decay, decoupled from the gradient.
    pub decay: f64,
}

/// One step of AdamW for all parameters; `step` (`i32[1]`) counts from 0, `lr` and `norm` are `f32[1]`.
///
/// # Errors
/// If a tensor has gaps, and as [`Calls::launch`].
pub fn adamw(
    c: &mut Calls<'_>,
    settings: AdamW,
    step: Tensor,
    lr: Tensor,
    norm: Tensor,
    parameters: &[Parameter],
) -> Result<(), KernelError> {
    let piece = piece_len(parameters.iter().map(|p| p.value.len()).sum());
    let mut table = Vec::new();
    for p in parameters {
        let [value, gradient, m, v] = [flat(p.value)?, flat(p.gradient)?, flat(p.m)?, flat(p.v)?];
        for (from, to) in pieces(value.len(), piece) {
            table.extend([value, gradient, m, v].map(|t| Argument::Pointer(t.slice_cols(from, to))));
            table.extend([Argument::I64((to - from) as i64), Argument::F64(p.decay)]);
        }
    }
    let blocks = table.len() / 6;
    let AdamW { beta1, beta2, eps, clip } = settings;
    let call = Call::file("optimizer", "adamw").grid(blocks).arg(Argument::Table(table));
    let call = call.pointer(step).pointer(lr).pointer(norm);
    c.launch(call.arg(beta1).arg(beta2).arg(eps).arg(clip.unwrap_or(-1.0)))
}
