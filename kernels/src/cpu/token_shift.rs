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

use super::lanes::{Partials, grain, lanes, ld, ld_ptr, pitch, st, st_ptr, sum_partials};
use super::output::Output;
use super::simd::Simd;
use super::threads::{parallel_for, parallel_ranges, with_scratch};
use crate::rows::SharedSlice;
use crate::{Rows, RowsMut, simd_fn};

/// The largest number of vectors that are mixed at once.
pub const MAX_MIXES: usize = 8;

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
pub fn mix_forward(x: Rows<'_>, len: usize, state: Option<Rows<'_>>, mixes: &[&[f32]], ys: &mut [Output<'_>]) {
    let (rows, cols) = (x.rows(), x.cols());
    assert!(ys.len() == mixes.len() && mixes.len() <= MAX_MIXES);
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
    assert!(count <= MAX_MIXES, "{count} mixes");
    assert!(dys.len() == count && dmixes.len() == count && dx.rows() == rows && dx.cols() == cols);
    assert!(dys.iter().all(|dy| dy.rows() == rows && dy.cols() == cols));
    assert!(mixes.iter().all(|m| m.len() == cols) && dmixes.iter().all(|m| m.len() == cols));
    check_sequences(rows, cols, len, &state);
    check_sequences(rows, cols, len, &dstate.as_ref().map(RowsMut::as_rows));
    let task = MixBackward { x, len, state, mixes, dys, dx, dstate };
    let blocks = Partials::new(rows);
    let pitch = pitch(cols);
    let sums = count * pitch;
    with_scratch(blocks.count * sums, |scratch| {
        let shared = SharedSlice::new(scratch);
        parallel_for(blocks.count, |block| {
            // SAFETY: every block has its own range.
            let dmix = unsafe { shared.range(block * sums..(block + 1) * sums) };
            dmix.fill(0.0);
            with_scratch(2 * cols, |scratch| {
                let (zeros, held) = scratch.split_at_mut(cols);
                zeros.fill(0.0);
                mix_backward_task(&task, blocks.range(block), zeros, held, dmix);
            });
        });
        for (j, dmix) in dmixes.iter_mut().enumerate() {
            sum_partials(scratch, blocks.count, sums, j * pitch, dmix);
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

/// `now + (prev - now) mix` from element `i` on.
///
/// # Safety
/// There must be `n` of them.
#[inline(always)]
unsafe fn mixed<S: Simd>(s: S, now: &[f32], prev: &[f32], mix: &[f32], i: usize, n: usize) -> S::F {
    // SAFETY: the caller's promise.
    unsafe {
        let v = ld(s, now, i, n);
        s.fma(s.sub(ld(s, prev, i, n), v), ld(s, mix, i, n), v)
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
        ys: &[Output<'_>],
        range: Range<usize>,
    ) {
        for r in range {
            let (now, prev) = (x.row(r), previous(x, len, state, zeros, r));
            for (mix, y) in mixes.iter().zip(ys) {
                // SAFETY: this task alone has row r, and all have `cols` elements.
                unsafe {
                    match y {
                        Output::Single(y) => {
                            let y = y.shared_row(r);
                            lanes!(S, x.cols(), |i, n| {
                                st(s, y, i, n, mixed(s, now, prev, mix, i, n));
                            });
                        }
                        Output::Bf16(y) => {
                            let y = y.shared_row(r);
                            lanes!(S, x.cols(), |i, n| {
                                s.store_bf16(&mut y[i..], n, mixed(s, now, prev, mix, i, n));
                            });
                        }
                    }
                }
            }
        }
    }

    fn mix_backward_task(
        s: S,
        task: &MixBackward<'_>,
        range: Range<usize>,
        zeros: &[f32],
        held: &mut [f32],
        dmix: &mut [f32],
    ) {
        match task.mixes.len() {
            0 => mix_rows_backward::<S, 0>(s, task, range, zeros, held, dmix),
            1 => mix_rows_backward::<S, 1>(s, task, range, zeros, held, dmix),
            2 => mix_rows_backward::<S, 2>(s, task, range, zeros, held, dmix),
            3 => mix_rows_backward::<S, 3>(s, task, range, zeros, held, dmix),
            4 => mix_rows_backward::<S, 4>(s, task, range, zeros, held, dmix),
            5 => mix_rows_backward::<S, 5>(s, task, range, zeros, held, dmix),
            6 => mix_rows_backward::<S, 6>(s, task, range, zeros, held, dmix),
            7 => mix_rows_backward::<S, 7>(s, task, range, zeros, held, dmix),
            _ => mix_rows_backward::<S, 8>(s, task, range, zeros, held, dmix),
        }
    }
}

/// Columns taken at a time.
const COLUMNS: usize = 1024;

/// Every row's own part of dx is `held` until the row after it has added its part.
#[inline(always)]
fn mix_rows_backward<S: Simd, const J: usize>(
    s: S,
    task: &MixBackward<'_>,
    range: Range<usize>,
    zeros: &[f32],
    held: &mut [f32],
    dmix: &mut [f32],
) {
    let MixBackward { x, len, state, mixes, dys, .. } = *task;
    let cols = x.cols();
    let pitch = pitch(cols);
    assert!(dmix.len() == J * pitch && held.len() == cols);
    for from in (0..cols).step_by(COLUMNS) {
        let columns = from..(from + COLUMNS).min(cols);
        let width = columns.len();
        let mixes: [&[f32]; J] = std::array::from_fn(|j| &mixes[j][columns.clone()]);
        let sums: [*mut f32; J] = std::array::from_fn(|j| dmix[j * pitch + from..].as_mut_ptr());
        let held = &mut held[columns.clone()];
        for r in range.clone() {
            let (now, prev) = (&x.row(r)[columns.clone()], &previous(x, len, state, zeros, r)[columns.clone()]);
            let dys: [&[f32]; J] = std::array::from_fn(|j| &dys[j].row(r)[columns.clone()]);
            let first = r % len == 0;
            // SAFETY: this task alone has the rows of its block, and the state of the sequences that start there.
            let mut before = (r > range.start).then(|| unsafe { &mut task.dx.shared_row(r - 1)[columns.clone()] });
            let mut dstate = match &task.dstate {
                // SAFETY: as above.
                Some(dstate) if first => Some(unsafe { &mut dstate.shared_row(r / len)[columns.clone()] }),
                _ => None,
            };
            lanes!(S, width, |i, n| {
                // SAFETY: all have `width` elements.
                unsafe {
                    let change = s.sub(ld(s, prev, i, n), ld(s, now, i, n));
                    let (mut to_now, mut to_prev) = (s.zero(), s.zero());
                    for j in 0..J {
                        let d = ld(s, dys[j], i, n);
                        let back = s.mul(d, ld(s, mixes[j], i, n));
                        to_prev = s.add(to_prev, back);
                        to_now = s.add(to_now, s.sub(d, back));
                        st_ptr(s, sums[j].add(i), n, s.fma(d, change, ld_ptr(s, sums[j].add(i), n)));
                    }
                    if let Some(dx) = &mut before {
                        let all = if first { ld(s, held, i, n) } else { s.add(ld(s, held, i, n), to_prev) };
                        st(s, dx, i, n, all);
                    }
                    if let Some(dstate) = &mut dstate {
                        st(s, dstate, i, n, to_prev);
                    }
                    st(s, held, i, n, to_now);
                }
            });
        }
        if range.end < x.rows() && !range.end.is_multiple_of(len) {
            // summed as above, so that the result does not depend on where blocks end
            let dys: [&[f32]; J] = std::array::from_fn(|j| &dys[j].row(range.end)[columns.clone()]);
            lanes!(S, width, |i, n| {
                // SAFETY: all have `width` elements.
                unsafe {
                    let mut to_prev = s.zero();
                    for j in 0..J {
                        to_prev = s.add(to_prev, s.mul(ld(s, dys[j], i, n), ld(s, mixes[j], i, n)));
                    }
                    st(s, held, i, n, s.add(ld(s, held, i, n), to_prev));
                }
            });
        }
        // SAFETY: the last row of this task's block.
        unsafe { &mut task.dx.shared_row(range.end - 1)[columns] }.copy_from_slice(held);
    }
}
