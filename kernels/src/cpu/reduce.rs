//! Sums over rows, columns and whole tensors, and the plain loops over memory.
//!
//! Every sum is split into blocks by its sizes alone; a block is summed by one task, and the results of the
//! blocks are added in order. So the result has the same bits on any number of threads, and the error grows
//! with the length of a block, not of the tensor. All of these are bound by memory: column sums take four
//! rows at a time into a row of sums in the L1 cache, so that memory is read once and in order.

use super::simd::Simd;
use super::threads::{parallel_for, parallel_ranges, with_scratch};
use crate::rows::SharedSlice;
use crate::{Rows, RowsMut};

/// Elements of a parallel task.
const GRAIN: usize = 128 * 1024;
/// Elements whose sum is kept in single precision.
const SHORT: usize = 4096;

/// Rows of a task, for matrices of `cols` columns.
fn block_rows(cols: usize) -> usize {
    (GRAIN / cols.max(1)).clamp(16, SHORT)
}

crate::simd_fn! {
    /// `out[c] = sum over r of x[r, c]`, rows in order.
    fn column_sums(s: S, x: Rows<'_>, out: &mut [f32]) {
        assert_eq!(x.cols(), out.len());
        out.fill(0.0);
        let mut r = 0;
        while r + 4 <= x.rows() {
            add_rows(s, [x.row(r), x.row(r + 1), x.row(r + 2), x.row(r + 3)], out);
            r += 4;
        }
        while r < x.rows() {
            add_rows(s, [x.row(r)], out);
            r += 1;
        }
    }

    /// The sum of the elements, or of their squares.
    fn total(s: S, x: &[f32], square: bool) -> f64 {
        let mut total = 0.0;
        for part in x.chunks(SHORT) {
            let mut sums = [s.zero(); 4];
            let mut groups = part.chunks_exact(4 * S::LANES);
            for group in &mut groups {
                for (k, sum) in sums.iter_mut().enumerate() {
                    let v = s.load(&group[k * S::LANES..]);
                    *sum = if square { s.fma(v, v, *sum) } else { s.add(*sum, v) };
                }
            }
            for (k, rest) in groups.remainder().chunks(S::LANES).enumerate() {
                let v = s.load_partial(rest, rest.len());
                sums[k] = if square { s.fma(v, v, sums[k]) } else { s.add(sums[k], v) };
            }
            total += f64::from(s.sum(s.add(s.add(sums[0], sums[1]), s.add(sums[2], sums[3]))));
        }
        total
    }

    /// `x *= factor`
    fn scale_part(s: S, x: &mut [f32], factor: f32) {
        let factor = s.splat(factor);
        for part in x.chunks_mut(S::LANES) {
            let n = part.len();
            if n == S::LANES {
                s.store(part, s.mul(s.load(part), factor));
            } else {
                s.store_partial(part, n, s.mul(s.load_partial(part, n), factor));
            }
        }
    }
}

/// Adds rows as long as `out` to it.
#[inline(always)]
fn add_rows<S: Simd, const N: usize>(s: S, rows: [&[f32]; N], out: &mut [f32]) {
    let cols = out.len();
    let rows = rows.map(|row| &row[..cols]);
    let mut c = 0;
    while c + S::LANES <= cols {
        let mut sum = s.load(&rows[0][c..]);
        for row in &rows[1..] {
            sum = s.add(sum, s.load(&row[c..]));
        }
        let sum = s.add(s.load(&out[c..]), sum);
        s.store(&mut out[c..], sum);
        c += S::LANES;
    }
    if c < cols {
        let n = cols - c;
        let mut sum = s.load_partial(&rows[0][c..], n);
        for row in &rows[1..] {
            sum = s.add(sum, s.load_partial(&row[c..], n));
        }
        let sum = s.add(s.load_partial(&out[c..], n), sum);
        s.store_partial(&mut out[c..], n, sum);
    }
}

/// Column sums, `[rows, cols]` to `[cols]`: the gradient of a bias.
pub fn sum_rows(x: Rows<'_>, out: &mut [f32]) {
    assert_eq!(x.cols(), out.len(), "columns of the sum");
    let block = block_rows(x.cols());
    let (blocks, cols) = (x.rows().div_ceil(block), x.cols());
    if blocks <= 1 {
        return column_sums(x, out);
    }
    with_scratch(blocks * cols, |partial| {
        let shared = SharedSlice::new(partial);
        parallel_for(blocks, |i| {
            // SAFETY: each task has its own row.
            let sums = unsafe { shared.range(i * cols..(i + 1) * cols) };
            column_sums(x.slice_rows(i * block, ((i + 1) * block).min(x.rows())), sums);
        });
        column_sums(Rows::new(partial, blocks, cols, cols), out);
    });
}

/// Row sums, `[rows, cols]` to `[rows]`.
pub fn sum_cols(x: Rows<'_>, out: &mut [f32]) {
    assert_eq!(x.rows(), out.len(), "rows of the sum");
    let shared = SharedSlice::new(out);
    parallel_ranges(x.rows(), block_rows(x.cols()), |rows| {
        // SAFETY: each task has its own rows.
        let sums = unsafe { shared.range(rows.clone()) };
        for (r, sum) in rows.zip(sums) {
            *sum = total(x.row(r), false) as f32;
        }
    });
}

/// `[B * T, cols]` to `[T, cols]`, the sum over `B`: the gradient of a tensor that was broadcast over it.
pub fn sum_periodic(x: Rows<'_>, mut out: RowsMut<'_>) {
    let period = out.rows();
    assert!(x.cols() == out.cols() && period > 0 && x.rows().is_multiple_of(period), "sizes of the sum");
    let count = x.rows() / period;
    let out = &out.reborrow();
    parallel_ranges(period, (GRAIN / (count * x.cols()).max(1)).max(1), |rows| {
        for t in rows {
            // SAFETY: every period-th row of the matrix, from row t on.
            let same = unsafe {
                Rows::from_raw(x.as_ptr().wrapping_add(t * x.stride()), count, x.cols(), period * x.stride())
            };
            // SAFETY: each task has its own rows.
            column_sums(same, unsafe { out.shared_row(t) });
        }
    });
}

/// `[B * T, cols]` to `[B, cols]`, the sum over `T`: the gradient of a tensor that was broadcast over it.
pub fn sum_groups(x: Rows<'_>, mut out: RowsMut<'_>) {
    let groups = out.rows();
    assert!(x.cols() == out.cols() && groups > 0 && x.rows().is_multiple_of(groups), "sizes of the sum");
    let length = x.rows() / groups;
    let out = &out.reborrow();
    parallel_ranges(groups, (GRAIN / (length * x.cols()).max(1)).max(1), |rows| {
        for g in rows {
            // SAFETY: each task has its own rows.
            column_sums(x.slice_rows(g * length, (g + 1) * length), unsafe { out.shared_row(g) });
        }
    });
}

/// Adds the results of `blocks` tasks in order, without losing digits.
fn in_blocks(blocks: usize, task: impl Fn(usize) -> f64 + Sync + Send) -> f64 {
    if blocks <= 1 {
        return if blocks == 1 { task(0) } else { 0.0 };
    }
    with_scratch(2 * blocks, |partial| {
        let shared = SharedSlice::new(partial);
        parallel_for(blocks, |i| {
            let sum = task(i);
            // the scratch is of f32: a double as the sum of two
            let high = sum as f32;
            let low = if high.is_finite() { (sum - f64::from(high)) as f32 } else { 0.0 };
            // SAFETY: each task has its own pair.
            unsafe { shared.range(2 * i..2 * i + 2) }.copy_from_slice(&[high, low]);
        });
        partial.iter().map(|&v| f64::from(v)).sum()
    })
}

/// The sum of all elements.
pub fn sum_all(x: Rows<'_>) -> f32 {
    if let Some(all) = x.as_slice() {
        return in_blocks(all.len().div_ceil(GRAIN), |i| total(&all[i * GRAIN..((i + 1) * GRAIN).min(all.len())], false))
            as f32;
    }
    let block = block_rows(x.cols());
    in_blocks(x.rows().div_ceil(block), |i| {
        (i * block..((i + 1) * block).min(x.rows())).map(|r| total(x.row(r), false)).sum()
    }) as f32
}

/// The sum of the squares of all elements, to a relative error of about 1e-7: for the norm of a gradient.
pub fn sum_of_squares(x: &[f32]) -> f64 {
    in_blocks(x.len().div_ceil(GRAIN), |i| total(&x[i * GRAIN..((i + 1) * GRAIN).min(x.len())], true))
}

/// Runs `task` on pieces of `x` in parallel.
fn each_piece(x: &mut [f32], task: impl Fn(&mut [f32]) + Sync + Send) {
    let (len, shared) = (x.len(), SharedSlice::new(x));
    // SAFETY: each task has its own piece.
    parallel_ranges(len, GRAIN, |range| task(unsafe { shared.range(range) }));
}

/// `x *= factor`
pub fn scale(x: &mut [f32], factor: f32) {
    each_piece(x, |piece| scale_part(piece, factor));
}

/// Sets all elements to `value`.
pub fn fill(x: &mut [f32], value: f32) {
    each_piece(x, |piece| piece.fill(value));
}

/// Copies a matrix.
pub fn copy_rows(from: Rows<'_>, mut to: RowsMut<'_>) {
    assert_eq!((from.rows(), from.cols()), (to.rows(), to.cols()), "sizes of a copy");
    if let (Some(from), Some(to)) = (from.as_slice(), to.as_slice_mut()) {
        let (shared, len) = (SharedSlice::new(to), from.len());
        parallel_ranges(len, GRAIN, |range| {
            // SAFETY: each task has its own piece.
            unsafe { shared.range(range.clone()) }.copy_from_slice(&from[range]);
        });
        return;
    }
    let to = &to.reborrow();
    parallel_ranges(from.rows(), block_rows(from.cols()), |rows| {
        for r in rows {
            // SAFETY: each task has its own rows.
            unsafe { to.shared_row(r) }.copy_from_slice(from.row(r));
        }
    });
}
