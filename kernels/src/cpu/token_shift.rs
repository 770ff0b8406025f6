//! Shift by one position in time, and RWKV's mixing with the shifted rows (Peng et al. 2023).
//!
//! ```text
//! prev[t] = x[t - 1] within each sequence; prev[0] = the carried state, or 0
//! y_j = x + (prev - x) * mix_j           for the J vectors mix_j [C] at once
//! dx[t] = sum_j dy_j[t] (1 - mix_j) + dy_j[t + 1] mix_j      dmix_j = sum_t dy_j (prev - x)
//! ```
//!
//! Bound by memory: forward reads x once (the row before is still in L1) and writes the J results; backward reads x
//! and the J gradients once and writes dx once, a row late, when the next row's part is known. dmix_j is summed per
//! fixed block of rows, then over the blocks in order.

use std::ops::Range;

use super::norm::lanes::{Partials, grain, lanes, ld, st, sum_partials};
use super::threads::{parallel_for, parallel_ranges, with_scratch};
use crate::rows::SharedSlice;
use crate::{Rows, RowsMut, simd_fn};

/// `y[t] = x[t - 1]` in every sequence of `len` rows; `y[0]` is the row of `state` `[B, C]`, or 0. x, y `[B*len, C]`.
pub fn forward(x: Rows<'_>, len: usize, state: Option<Rows<'_>>, y: RowsMut<'_>) {
    let (rows, cols) = (x.rows(), x.cols());
    assert!(y.rows() == rows && y.cols() == cols);
    check_sequences(rows, cols, len, &state);
    parallel_ranges(rows, grain(cols), |range| {
        for r in range {
            // SAFETY: this task alone has row r.
            let y = unsafe { y.shared_row(r) };
            match (r % len, state) {
                (0, None) => y.fill(0.0),
                (0, Some(state)) => y.copy_from_slice(state.row(r / len)),
                _ => y.copy_from_slice(x.row(r - 1)),
            }
        }
    });
}

/// The gradients of [`forward`]: `dx[t] = dy[t + 1]`, 0 in the last row of a sequence; `dstate = dy[0]` if asked for.
pub fn backward(dy: Rows<'_>, len: usize, dx: RowsMut<'_>, dstate: Option<RowsMut<'_>>) {
    let (rows, cols) = (dy.rows(), dy.cols());
    assert!(dx.rows() == rows && dx.cols() == cols);
    check_sequences(rows, cols, len, &dstate.as_ref().map(RowsMut::as_rows));
    parallel_ranges(rows, grain(cols), |range| {
        for r in range {
            // SAFETY: this task alone has row r.
            let dx = unsafe { dx.shared_row(r) };
            if r % len == len - 1 {
                dx.fill(0.0);
            } else {
                dx.copy_from_slice(dy.row(r + 1));
            }
            if let (0, Some(dstate)) = (r % len, &dstate) {
                // SAFETY: this task alone has the first row of this sequence.
                unsafe { dstate.shared_row(r / len) }.copy_from_slice(dy.row(r));
            }
        }
    });
}

/// `y_j = x + (prev - x) * mix_j` for all j; x and every y_j `[B*len, C]`, every mix_j `[C]`, state `[B, C]` the rows
/// before the first, 0 if absent.
pub fn mix_forward(x: Rows<'_>, len: usize, state: Option<Rows<'_>>, mixes: &[&[f32]], ys: &mut [RowsMut<'_>]) {
    let (rows, cols) = (x.rows(), x.cols());
    assert!(ys.len() == mixes.len());
    assert!(ys.iter().all(|y| y.rows() == rows && y.cols() == cols) && mixes.iter().all(|m| m.len() == cols));
    check_sequences(rows, cols, len, &state);
    let ys = &*ys;
    parallel_ranges(rows, grain(cols), |range| {
        with_scratch(cols, |zeros| {
            zeros.fill(0.0);
            mix_rows(x, len, state, zeros, mixes, ys, range);
        })
    });
}

/// The gradients of [`mix_forward`]: dx, every dmix_j `[C]`, and `dstate` `[B, C]` if asked for.
#[allow(clippy::too_many_arguments)]
pub fn mix_backward(
    x: Rows<'_>,
    len: usize,
    state: Option<Rows<'_>>,
    mixes: &[&[f32]],
    dys: &[Rows<'_>],
    dx: RowsMut<'_>,
    dmixes: &mut [&mut [f32]],
    dstate: Option<RowsMut<'_>>,
) {
    let (rows, cols, count) = (x.rows(), x.cols(), mixes.len());
    assert!(dys.len() == count && dmixes.len() == count && dx.rows() == rows && dx.cols() == cols);
    assert!(dys.iter().all(|dy| dy.rows() == rows && dy.cols() == cols));
    assert!(mixes.iter().all(|m| m.len() == cols) && dmixes.iter().all(|m| m.len() == cols));
    check_sequences(rows, cols, len, &state);
    check_sequences(rows, cols, len, &dstate.as_ref().map(RowsMut::as_rows));
    let task = MixBackward { x, len, state, mixes, dys, dx, dstate };
    let blocks = Partials::new(rows);
    let sums = count * cols;
    with_scratch(blocks.count * sums, |scratch| {
        let shared = SharedSlice::new(scratch);
        parallel_for(blocks.count, |block| {
            // SAFETY: every block has its own range.
            let dmix = unsafe { shared.range(block * sums..(block + 1) * sums) };
            dmix.fill(0.0);
            with_scratch(2 * cols, |scratch| {
                let (zeros, ahead) = scratch.split_at_mut(cols);
                zeros.fill(0.0);
                mix_rows_backward(&task, blocks.range(block), zeros, ahead, dmix);
            });
        });
        for (j, dmix) in dmixes.iter_mut().enumerate() {
            sum_partials(scratch, blocks.count, sums, j * cols, dmix);
        }
    });
}

fn check_sequences(rows: usize, cols: usize, len: usize, state: &Option<Rows<'_>>) {
    assert!(rows == 0 || (len > 0 && rows.is_multiple_of(len)), "{rows} rows of sequences of {len}");
    assert!(state.is_none_or(|s| s.rows() * len == rows && s.cols() == cols));
}

struct MixBackward<'a> {
    x: Rows<'a>,
    len: usize,
    state: Option<Rows<'a>>,
    mixes: &'a [&'a [f32]],
    dys: &'a [Rows<'a>],
    dx: RowsMut<'a>,
    dstate: Option<RowsMut<'a>>,
}

/// The row before row r.
#[inline(always)]
fn previous<'a>(x: Rows<'a>, len: usize, state: Option<Rows<'a>>, zeros: &'a [f32], r: usize) -> &'a [f32] {
    match state {
        _ if !r.is_multiple_of(len) => x.row(r - 1),
        Some(state) => state.row(r / len),
        None => zeros,
    }
}

simd_fn! {
    fn mix_rows(
        s: S,
        x: Rows<'_>,
        len: usize,
        state: Option<Rows<'_>>,
        zeros: &[f32],
        mixes: &[&[f32]],
        ys: &[RowsMut<'_>],
        range: Range<usize>,
    ) {
        for r in range {
            let (now, prev) = (x.row(r), previous(x, len, state, zeros, r));
            for (mix, y) in mixes.iter().zip(ys) {
                // SAFETY: this task alone has row r.
                let y = unsafe { y.shared_row(r) };
                lanes!(S, x.cols(), |i, n| {
                    // SAFETY: all have `cols` elements.
                    unsafe {
                        let v = ld(s, now, i, n);
                        let v = s.fma(s.sub(ld(s, prev, i, n), v), ld(s, mix, i, n), v);
                        st(s, y, i, n, v);
                    }
                });
            }
        }
    }

    fn mix_rows_backward(
        s: S,
        task: &MixBackward<'_>,
        range: Range<usize>,
        zeros: &[f32],
        ahead: &mut [f32],
        dmix: &mut [f32],
    ) {
        let MixBackward { x, len, state, mixes, dys, .. } = *task;
        let cols = x.cols();
        // from the last row to the first: `ahead` is what the next row gives back to this one
        ahead.fill(0.0);
        if range.end < x.rows() && !range.end.is_multiple_of(len) {
            for (mix, dy) in mixes.iter().zip(dys) {
                let dy = dy.row(range.end);
                lanes!(S, cols, |i, n| {
                    // SAFETY: all have `cols` elements.
                    unsafe {
                        let v = s.fma(ld(s, dy, i, n), ld(s, mix, i, n), ld(s, ahead, i, n));
                        st(s, ahead, i, n, v);
                    }
                });
            }
        }
        for r in range.rev() {
            let (now, prev) = (x.row(r), previous(x, len, state, zeros, r));
            // SAFETY: this task alone has row r.
            let dx = unsafe { task.dx.shared_row(r) };
            let last = r % len == len - 1;
            lanes!(S, cols, |i, n| {
                // SAFETY: all have `cols` elements, dmix `cols` for every j.
                unsafe {
                    let change = s.sub(ld(s, prev, i, n), ld(s, now, i, n));
                    let (mut to_now, mut to_prev) = (s.zero(), s.zero());
                    for j in 0..mixes.len() {
                        let d = ld(s, dys.get_unchecked(j).row(r), i, n);
                        let back = s.mul(d, ld(s, mixes.get_unchecked(j), i, n));
                        to_prev = s.add(to_prev, back);
                        to_now = s.add(to_now, s.sub(d, back));
                        let sum = s.fma(d, change, ld(s, dmix, j * cols + i, n));
                        st(s, dmix, j * cols + i, n, sum);
                    }
                    let next = if last { s.zero() } else { ld(s, ahead, i, n) };
                    st(s, dx, i, n, s.add(to_now, next));
                    st(s, ahead, i, n, to_prev);
                }
            });
            if let (0, Some(dstate)) = (r % len, &task.dstate) {
                // SAFETY: this task alone has the first row of this sequence.
                unsafe { dstate.shared_row(r / len) }.copy_from_slice(ahead);
            }
        }
    }
}
