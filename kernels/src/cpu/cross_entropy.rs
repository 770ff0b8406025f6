//! Softmax cross-entropy against class indices, and accuracy.
//!
//! ```text
//! lse_r = log sum_v e^x[r, v]      loss = mean_r (lse_r - x[r, target_r])
//! dx[r, v] = upstream / counted * (e^(x[r, v] - lse_r) - [v = target_r])
//! ```
//!
//! over the rows whose target is not [`IGNORE_INDEX`]. Where no row counts, the loss is 0 and the gradient is 0 (PyTorch
//! gives NaN, which would end a training run over one empty batch).
//!
//! A row of logits may be 200 KB, so it is taken in blocks of a few thousand that fit L1: the block's maximum, then the
//! sum of `e^(x - maximum)`, rescaled to the maximum so far. Logits come from memory once. [`forward_backward`] keeps
//! the exponentials: it writes them where the gradient goes and multiplies the row, still in L2, by what turns each
//! block into its gradient, so every logit costs one exponential in all. Row losses are summed in `f64`, in fixed
//! blocks of rows.
//!
//! A NaN among the logits of a counted row makes its loss and its gradient NaN.

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::lanes::{InOut, grain, lanes, ld, ld_ptr, st_ptr};
use super::math;
use super::simd::Simd;
use super::threads::{parallel_for, parallel_ranges, with_scratch};
use crate::rows::SharedSlice;
use crate::{Rows, RowsMut, simd_fn};

/// The target of rows that do not count.
pub const IGNORE_INDEX: i32 = -1;

/// A target that is neither a class nor [`IGNORE_INDEX`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("target {target} at position {position} is none of {classes} classes")]
pub struct TargetOutOfRange {
    /// Index into the targets.
    pub position: usize,
    /// The target there.
    pub target: i32,
    /// Number of classes.
    pub classes: usize,
}

/// The loss of a batch.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Loss {
    /// Sum over the rows that count.
    pub sum: f64,
    /// Number of rows that count.
    pub counted: usize,
}

impl Loss {
    /// The mean over the rows that count; 0 if there are none.
    pub fn mean(&self) -> f32 {
        (self.sum / self.counted.max(1) as f64) as f32
    }
}

/// Checks the targets and counts those that are not [`IGNORE_INDEX`].
pub fn count(targets: &[i32], classes: usize) -> Result<usize, TargetOutOfRange> {
    let bad = |target: i32| target != IGNORE_INDEX && target as u32 >= classes as u32;
    if targets.iter().fold(false, |any, &target| any | bad(target)) {
        let position = targets.iter().position(|&target| bad(target)).unwrap();
        return Err(TargetOutOfRange { position, target: targets[position], classes });
    }
    Ok(targets.iter().filter(|&&target| target != IGNORE_INDEX).count())
}

/// The loss of `logits` `[rows, V]`; writes every row's log-sum-exp to `lse` `[rows]`, 0 for rows that do not count.
pub fn forward(logits: Rows<'_>, targets: &[i32], lse: &mut [f32]) -> Result<Loss, TargetOutOfRange> {
    let (rows, classes) = (logits.rows(), logits.cols());
    assert!(targets.len() == rows && lse.len() == rows);
    let counted = count(targets, classes)?;
    let lse = SharedSlice::new(lse);
    let sum = sum_over_rows(rows, classes, |range| {
        // SAFETY: every task has its own rows.
        let lse = unsafe { lse.range(range.clone()) };
        forward_rows(logits, targets, lse, range)
    });
    Ok(Loss { sum, counted })
}

/// The gradient of the mean loss, times `upstream`; `lse` from [`forward`]. logits, dlogits `[rows, V]`.
pub fn backward(
    logits: Rows<'_>,
    targets: &[i32],
    lse: &[f32],
    upstream: f32,
    dlogits: RowsMut<'_>,
) -> Result<(), TargetOutOfRange> {
    backward_on(InOut::apart(logits, dlogits), targets, lse, upstream)
}

/// [`backward`] that writes the gradient over the logits.
pub fn backward_in_place(
    logits: RowsMut<'_>,
    targets: &[i32],
    lse: &[f32],
    upstream: f32,
) -> Result<(), TargetOutOfRange> {
    backward_on(InOut::in_place(logits), targets, lse, upstream)
}

fn backward_on(rows: InOut, targets: &[i32], lse: &[f32], upstream: f32) -> Result<(), TargetOutOfRange> {
    assert!(targets.len() == rows.rows && lse.len() == rows.rows);
    let scale = upstream / count(targets, rows.cols)?.max(1) as f32;
    parallel_ranges(rows.rows, grain(rows.cols), |range| backward_rows(&rows, targets, lse, scale, range));
    Ok(())
}

/// Loss and gradient at once: as [`forward`] and [`backward`], with one look at the logits.
///
/// The gradient is divided by `denominator`, or by the number of rows that count if it is `None`. A batch whose logits
/// are never in memory as a whole is done in blocks of rows with the count of the whole batch, see [`count`].
pub fn forward_backward(
    logits: Rows<'_>,
    targets: &[i32],
    upstream: f32,
    denominator: Option<usize>,
    dlogits: RowsMut<'_>,
) -> Result<Loss, TargetOutOfRange> {
    forward_backward_on(InOut::apart(logits, dlogits), targets, upstream, denominator)
}

/// [`forward_backward`] that writes the gradient over the logits.
pub fn forward_backward_in_place(
    logits: RowsMut<'_>,
    targets: &[i32],
    upstream: f32,
    denominator: Option<usize>,
) -> Result<Loss, TargetOutOfRange> {
    forward_backward_on(InOut::in_place(logits), targets, upstream, denominator)
}

fn forward_backward_on(
    rows: InOut,
    targets: &[i32],
    upstream: f32,
    denominator: Option<usize>,
) -> Result<Loss, TargetOutOfRange> {
    assert_eq!(targets.len(), rows.rows);
    let counted = count(targets, rows.cols)?;
    let scale = upstream / denominator.unwrap_or(counted).max(1) as f32;
    let sum = sum_over_rows(rows.rows, rows.cols, |range| {
        with_scratch(rows.cols.div_ceil(BLOCK), |maxima| forward_backward_rows(&rows, targets, scale, maxima, range))
    });
    Ok(Loss { sum, counted })
}

/// Rows whose largest logit (the first of equal ones) is the target's, and rows that count.
pub fn accuracy(logits: Rows<'_>, targets: &[i32]) -> Result<(usize, usize), TargetOutOfRange> {
    assert_eq!(targets.len(), logits.rows());
    let counted = count(targets, logits.cols())?;
    let correct = AtomicUsize::new(0);
    parallel_ranges(logits.rows(), grain(logits.cols()), |range| {
        correct.fetch_add(correct_rows(logits, targets, range), Ordering::Relaxed);
    });
    Ok((correct.into_inner(), counted))
}

/// The sum of what `task` returns for fixed ranges of rows, added in order.
fn sum_over_rows(rows: usize, cols: usize, task: impl Fn(Range<usize>) -> f64 + Sync + Send) -> f64 {
    let per_task = grain(cols);
    let tasks = rows.div_ceil(per_task);
    with_scratch(2 * tasks, |scratch| {
        let shared = SharedSlice::new(scratch);
        parallel_for(tasks, |i| {
            let sum = task(i * per_task..((i + 1) * per_task).min(rows));
            // an f64 as two f32: 48 bits
            let high = sum as f32;
            let low = if high.is_finite() { (sum - high as f64) as f32 } else { 0.0 };
            // SAFETY: every task has its own place.
            unsafe { shared.range(2 * i..2 * i + 2) }.copy_from_slice(&[high, low]);
        });
        scratch.iter().map(|&x| x as f64).sum()
    })
}

/// Logits whose exponentials have one maximum in common: 8 KB.
const BLOCK: usize = 2048;

simd_fn! {
    fn forward_rows(s: S, logits: Rows<'_>, targets: &[i32], lse: &mut [f32], range: Range<usize>) -> f64 {
        let mut loss = 0.0;
        for (r, lse) in range.zip(lse) {
            *lse = 0.0;
            if targets[r] == IGNORE_INDEX {
                continue;
            }
            let row = logits.row(r);
            let (mut maximum, mut sum) = (f32::MIN, 0.0f64);
            for block in row.chunks(BLOCK) {
                let here = maximum.max(block_max(s, block));
                if here > maximum {
                    if sum > 0.0 {
                        sum *= ((maximum - here) as f64).exp();
                    }
                    maximum = here;
                }
                let shift = s.splat(here);
                let mut sums = [s.zero(); 4];
                lanes!(S, block.len(), |i, n| {
                    // SAFETY: within the block.
                    let e = unsafe { exp_shifted(s, ld(s, block, i, n), shift, n) };
                    let [a, b, c, d] = sums;
                    sums = [b, c, d, s.add(a, e)];
                });
                sum += total(s, sums) as f64;
            }
            let log_sum = sum.ln();
            *lse = (maximum as f64 + log_sum) as f32;
            loss += (maximum as f64 - row[targets[r] as usize] as f64) + log_sum;
        }
        loss
    }

    fn backward_rows(s: S, rows: &InOut, targets: &[i32], lse: &[f32], scale: f32, range: Range<usize>) {
        for r in range {
            let (x, y) = (rows.x(r), rows.y(r));
            let target = targets[r];
            if target == IGNORE_INDEX {
                // SAFETY: the row has `cols` elements, and this task alone has it.
                unsafe { std::slice::from_raw_parts_mut(y, rows.cols) }.fill(0.0);
                continue;
            }
            let (shift, factor) = (s.splat(lse[r]), s.splat(scale));
            lanes!(S, rows.cols, |i, n| {
                // SAFETY: as above; an element is read before it is written.
                unsafe {
                    let e = math::exp_nonpositive(s, s.sub(ld_ptr(s, x.add(i), n), shift));
                    st_ptr(s, y.add(i), n, s.mul(e, factor));
                }
            });
            // SAFETY: the target is a column.
            unsafe { *y.add(target as usize) -= scale };
        }
    }

    fn forward_backward_rows(
        s: S,
        rows: &InOut,
        targets: &[i32],
        scale: f32,
        maxima: &mut [f32],
        range: Range<usize>,
    ) -> f64 {
        let mut loss = 0.0;
        for r in range {
            let (x, y) = (rows.x(r), rows.y(r));
            let target = targets[r];
            if target == IGNORE_INDEX {
                // SAFETY: the row has `cols` elements, and this task alone has it.
                unsafe { std::slice::from_raw_parts_mut(y, rows.cols) }.fill(0.0);
                continue;
            }
            // SAFETY: the target is a column.
            let picked = unsafe { *x.add(target as usize) };
            let (mut maximum, mut sum) = (f32::MIN, 0.0f64);
            for (block, block_maximum) in maxima.iter_mut().enumerate() {
                let start = block * BLOCK;
                let len = BLOCK.min(rows.cols - start);
                let (x, y) = (x.wrapping_add(start), y.wrapping_add(start));
                // SAFETY: within the row; the slice is gone before y is written.
                let here = maximum.max(block_max(s, unsafe { std::slice::from_raw_parts(x, len) }));
                *block_maximum = here;
                if here > maximum {
                    if sum > 0.0 {
                        sum *= ((maximum - here) as f64).exp();
                    }
                    maximum = here;
                }
                let shift = s.splat(here);
                let mut sums = [s.zero(); 4];
                lanes!(S, len, |i, n| {
                    // SAFETY: within the row; an element is read before it is written.
                    let e = unsafe {
                        let e = exp_shifted(s, ld_ptr(s, x.add(i), n), shift, n);
                        st_ptr(s, y.add(i), n, e);
                        e
                    };
                    let [a, b, c, d] = sums;
                    sums = [b, c, d, s.add(a, e)];
                });
                sum += total(s, sums) as f64;
            }
            loss += (maximum as f64 - picked as f64) + sum.ln();
            for (block, &block_maximum) in maxima.iter().enumerate() {
                let start = block * BLOCK;
                let y = y.wrapping_add(start);
                let rescale = if block_maximum == maximum { 1.0 } else { ((block_maximum - maximum) as f64).exp() };
                let factor = s.splat((scale as f64 * rescale / sum) as f32);
                lanes!(S, BLOCK.min(rows.cols - start), |i, n| {
                    // SAFETY: within the row, which this task alone has.
                    unsafe { st_ptr(s, y.add(i), n, s.mul(ld_ptr(s, y.add(i), n), factor)) };
                });
            }
            // SAFETY: the target is a column.
            unsafe { *y.add(target as usize) -= scale };
        }
        loss
    }

    fn correct_rows(s: S, logits: Rows<'_>, targets: &[i32], range: Range<usize>) -> usize {
        let mut correct = 0;
        for r in range {
            if targets[r] == IGNORE_INDEX {
                continue;
            }
            let (row, target) = (logits.row(r), targets[r] as usize);
            // the largest, unless an equal one comes before
            let largest = row[target] >= block_max(s, row);
            correct += usize::from(largest && row[..target].iter().all(|&x| x != row[target]));
        }
        correct
    }
}

/// The largest of `x`, at least `f32::MIN` (so that a row of -inf has a finite one).
#[inline(always)]
fn block_max<S: Simd>(s: S, x: &[f32]) -> f32 {
    let lowest = s.splat(f32::MIN);
    let mut largest = [lowest; 4];
    lanes!(S, x.len(), |i, n| {
        // SAFETY: within x.
        let v = unsafe { ld(s, x, i, n) };
        let v = if n == S::LANES { v } else { s.select(before(s, n), v, lowest) };
        let [a, b, c, d] = largest;
        largest = [b, c, d, s.max(v, a)];
    });
    let [a, b, c, d] = largest;
    s.max_lane(s.max(s.max(a, b), s.max(c, d)))
}

/// `e^(v - shift)`, 0 in the lanes from n on.
#[inline(always)]
fn exp_shifted<S: Simd>(s: S, v: S::F, shift: S::F, n: usize) -> S::F {
    let e = math::exp_nonpositive(s, s.sub(v, shift));
    if n == S::LANES { e } else { s.select(before(s, n), e, s.zero()) }
}

/// The lanes before n.
#[inline(always)]
fn before<S: Simd>(s: S, n: usize) -> S::M {
    s.lt(s.to_float(s.iota()), s.splat(n as f32))
}

/// The sum of four accumulators' lanes.
#[inline(always)]
fn total<S: Simd>(s: S, [a, b, c, d]: [S::F; 4]) -> f32 {
    s.sum(s.add(s.add(a, b), s.add(c, d)))
}
