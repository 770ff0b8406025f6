//! Causal depthwise convolution over time with an optional SiLU, as Mamba and Longhorn use it.
//!
//! ```text
//! z[t, d] = bias[d] + sum_j weight[d, j] x[t - K + 1 + j, d]        y = silu(z), or z
//! dz = dy silu'(z)      dx[t] = sum_j weight[j] dz[t + K - 1 - j]      dweight[j] = sum_t dz[t] x[t - K + 1 + j]
//! ```
//!
//! x is channel-last, so lanes run along the channels; the weights are first transposed to `[K, D]` for that. Four rows
//! are computed at a time: a vector of each of the K + 3 rows they see is loaded once, and the weights once per four
//! rows; what was seen before is still in L1/L2. Backward recomputes z (cheaper than to store it), keeps the last
//! K - 1 rows of dz in scratch and writes dx K - 1 rows late, so x and dy are read once and dx is written once.
//! Parallel tasks are blocks of time; a block starts by looking back K - 1 rows and, in backward, ends by computing dz
//! K - 1 rows into the next one. Parameter gradients are summed per task, then over the tasks in order.

use std::ops::Range;

use super::lanes::{grain, lanes, ld_ptr, pitch, st_ptr, sum_partials};
use super::math;
use super::simd::Simd;
use super::threads::{parallel_for, with_scratch};
use crate::rows::SharedSlice;
use crate::{Rows, RowsMut, simd_fn};

/// The largest K.
pub const MAX_TAPS: usize = 8;

/// The parameters of a convolution.
#[derive(Clone, Copy)]
pub struct Conv<'a> {
    /// `[D, K]` (PyTorch's `[D, 1, K]`), 1 <= K <= [`MAX_TAPS`]; tap K - 1 sees the current row.
    pub weight: &'a [f32],
    /// `[D]`
    pub bias: Option<&'a [f32]>,
    /// Whether SiLU is applied to the result.
    pub silu: bool,
}

/// x, y `[B*len, D]`, sequences of `len` rows.
///
/// `window` `[B*(K-1), D]` holds the rows before the first of every sequence, 0 if absent; `last_window`, of the same
/// shape, receives those before the row that would come next: a sequence can be done in pieces of any length.
pub fn forward(
    conv: Conv<'_>,
    x: Rows<'_>,
    len: usize,
    window: Option<Rows<'_>>,
    y: RowsMut<'_>,
    last_window: Option<RowsMut<'_>>,
) {
    let (rows, cols) = (x.rows(), x.cols());
    assert!(y.rows() == rows && y.cols() == cols);
    if rows == 0 || cols == 0 {
        return;
    }
    let taps = check(&conv, x, len, &window);
    check(&conv, x, len, &last_window.as_ref().map(RowsMut::as_rows));
    let blocks = Blocks::new(rows, len, grain(cols).max(32));
    let pitch = pitch(cols);
    with_scratch((taps + 2) * pitch, |scratch| {
        prepare(&conv, taps, cols, scratch);
        let task = Task { taps, cols, pitch, len, silu: conv.silu, x, window, parameters: scratch };
        parallel_for(blocks.tasks, |i| forward_task(&task, &y, &blocks, i));
        if let Some(mut last) = last_window {
            for sequence in 0..rows / len {
                for i in 0..taps - 1 {
                    let row = task.row(sequence, (len + i) as isize - (taps - 1) as isize);
                    last.row(sequence * (taps - 1) + i).copy_from_slice(row);
                }
            }
        }
    });
}

/// The gradients of [`forward`] with respect to x `[B*len, D]`, weight `[D, K]` and bias `[D]`.
#[allow(clippy::too_many_arguments)]
pub fn backward(
    conv: Conv<'_>,
    x: Rows<'_>,
    len: usize,
    window: Option<Rows<'_>>,
    dy: Rows<'_>,
    dx: RowsMut<'_>,
    dweight: &mut [f32],
    dbias: Option<&mut [f32]>,
) {
    let (rows, cols) = (x.rows(), x.cols());
    assert!(dy.rows() == rows && dy.cols() == cols && dx.rows() == rows && dx.cols() == cols);
    assert!(dweight.len() == conv.weight.len() && dbias.as_ref().is_none_or(|b| b.len() == cols));
    if rows == 0 || cols == 0 {
        dweight.fill(0.0);
        dbias.into_iter().for_each(|b| b.fill(0.0));
        return;
    }
    let taps = check(&conv, x, len, &window);
    let blocks = Blocks::new(rows, len, rows.div_ceil(128).clamp(32, 256)).at_most(128);
    let pitch = pitch(cols);
    let sums = (taps + 1) * pitch;
    with_scratch((taps + 2) * pitch + blocks.tasks * sums, |scratch| {
        let (parameters, parts) = scratch.split_at_mut((taps + 2) * pitch);
        prepare(&conv, taps, cols, parameters);
        let task = Task { taps, cols, pitch, len, silu: conv.silu, x, window, parameters };
        let shared = SharedSlice::new(parts);
        parallel_for(blocks.tasks, |i| {
            // SAFETY: every task has its own range.
            let part = unsafe { shared.range(i * sums..(i + 1) * sums) };
            part.fill(0.0);
            with_scratch((taps - 1) * pitch, |dz| backward_task(&task, dy, &dx, dz, part, &blocks, i));
        });
        if let Some(dbias) = dbias {
            sum_partials(parts, blocks.tasks, sums, taps * pitch, dbias);
        }
        with_scratch(taps * pitch, |transposed| {
            sum_partials(parts, blocks.tasks, sums, 0, transposed);
            for (d, to) in dweight.chunks_exact_mut(taps).enumerate() {
                for (j, to) in to.iter_mut().enumerate() {
                    *to = transposed[j * pitch + d];
                }
            }
        });
    });
}

/// The number of taps.
fn check(conv: &Conv<'_>, x: Rows<'_>, len: usize, window: &Option<Rows<'_>>) -> usize {
    let (rows, cols) = (x.rows(), x.cols());
    assert!(len > 0 && rows.is_multiple_of(len), "{rows} rows of sequences of {len}");
    let taps = conv.weight.len() / cols;
    assert!((1..=MAX_TAPS).contains(&taps) && conv.weight.len() == taps * cols, "{taps} taps");
    assert!(conv.bias.is_none_or(|b| b.len() == cols));
    assert!(window.is_none_or(|w| w.rows() == rows / len * (taps - 1) && w.cols() == cols));
    taps
}

/// Writes the transposed weight `[K, D]`, the bias and a row of zeros.
fn prepare(conv: &Conv<'_>, taps: usize, cols: usize, parameters: &mut [f32]) {
    let pitch = pitch(cols);
    for (d, from) in conv.weight.chunks_exact(taps).enumerate() {
        for (j, &w) in from.iter().enumerate() {
            parameters[j * pitch + d] = w;
        }
    }
    match conv.bias {
        Some(b) => parameters[taps * pitch..][..cols].copy_from_slice(b),
        None => parameters[taps * pitch..][..cols].fill(0.0),
    }
    parameters[(taps + 1) * pitch..][..cols].fill(0.0);
}

/// How sequences are split into blocks of time, and blocks into parallel tasks; by sizes alone.
#[derive(Clone, Copy)]
struct Blocks {
    len: usize,
    /// Rows of a block, at most a sequence.
    rows: usize,
    per_sequence: usize,
    count: usize,
    per_task: usize,
    tasks: usize,
}

impl Blocks {
    /// Tasks of about `rows` rows.
    fn new(all_rows: usize, len: usize, rows: usize) -> Self {
        let task_rows = rows;
        let rows = rows.min(len);
        let per_sequence = len.div_ceil(rows);
        let count = all_rows / len * per_sequence;
        let per_task = (task_rows / rows).max(1);
        Self { len, rows, per_sequence, count, per_task, tasks: count.div_ceil(per_task) }
    }

    /// The same blocks in no more than so many tasks.
    fn at_most(self, tasks: usize) -> Self {
        let per_task = self.per_task.max(self.count.div_ceil(tasks));
        Self { per_task, tasks: self.count.div_ceil(per_task), ..self }
    }

    /// The blocks of a task: sequence and rows within it.
    #[inline(always)]
    fn of(&self, task: usize) -> impl Iterator<Item = (usize, Range<usize>)> + use<> {
        let this = *self;
        (task * this.per_task..((task + 1) * this.per_task).min(this.count)).map(move |i| {
            let start = i % this.per_sequence * this.rows;
            (i / this.per_sequence, start..(start + this.rows).min(this.len))
        })
    }
}

struct Task<'a> {
    taps: usize,
    cols: usize,
    pitch: usize,
    len: usize,
    silu: bool,
    x: Rows<'a>,
    window: Option<Rows<'a>>,
    /// What [`prepare`] writes, rows of `pitch`.
    parameters: &'a [f32],
}

impl<'a> Task<'a> {
    /// Row t of a sequence; those before its first are the window, or zero.
    #[inline(always)]
    fn row(&self, sequence: usize, t: isize) -> &'a [f32] {
        match self.window {
            _ if t >= 0 => self.x.row(sequence * self.len + t as usize),
            Some(window) => window.row(((sequence + 1) * (self.taps - 1)).checked_add_signed(t).unwrap()),
            None => self.zeros(),
        }
    }

    #[inline(always)]
    fn zeros(&self) -> &'a [f32] {
        &self.parameters[(self.taps + 1) * self.pitch..][..self.cols]
    }
}

/// Rows computed at a time.
const TILE: usize = 4;
/// Rows that a tile sees at most.
const SEEN: usize = TILE + MAX_TAPS - 1;
/// `$function::<S, K>(..)` for the task's K.
macro_rules! with_taps {
    ($taps:expr, $function:ident($($arg:expr),*)) => {
        match $taps {
            1 => $function::<S, 1>($($arg),*),
            2 => $function::<S, 2>($($arg),*),
            3 => $function::<S, 3>($($arg),*),
            4 => $function::<S, 4>($($arg),*),
            5 => $function::<S, 5>($($arg),*),
            6 => $function::<S, 6>($($arg),*),
            7 => $function::<S, 7>($($arg),*),
            _ => $function::<S, 8>($($arg),*),
        }
    };
}

simd_fn! {
    fn forward_task(s: S, task: &Task<'_>, y: &RowsMut<'_>, blocks: &Blocks, i: usize) {
        with_taps!(task.taps, forward_blocks(s, task, y, blocks, i))
    }

    fn backward_task(
        s: S,
        task: &Task<'_>,
        dy: Rows<'_>,
        dx: &RowsMut<'_>,
        dz: &mut [f32],
        sums: &mut [f32],
        blocks: &Blocks,
        i: usize,
    ) {
        with_taps!(task.taps, backward_blocks(s, task, dy, dx, dz, sums, blocks, i))
    }
}

#[inline(always)]
fn forward_blocks<S: Simd, const K: usize>(s: S, task: &Task<'_>, y: &RowsMut<'_>, blocks: &Blocks, i: usize) {
    for (sequence, range) in blocks.of(i) {
        let mut t = range.start;
        while t < range.end {
            if t + TILE <= range.end {
                forward_tile::<S, K, TILE>(s, task, y, sequence, t);
                t += TILE;
            } else {
                forward_tile::<S, K, 1>(s, task, y, sequence, t);
                t += 1;
            }
        }
    }
}

#[inline(always)]
fn forward_tile<S: Simd, const K: usize, const R: usize>(
    s: S,
    task: &Task<'_>,
    y: &RowsMut<'_>,
    sequence: usize,
    t: usize,
) {
    let x = seen::<K, R>(task, sequence, t);
    // SAFETY: this task alone has these rows.
    let out: [_; R] = std::array::from_fn(|r| unsafe { y.shared_row(sequence * task.len + t + r).as_mut_ptr() });
    lanes!(S, task.cols, |i, n| {
        // SAFETY: every row has `cols` elements.
        unsafe {
            let (w, bias, rows) = load::<S, K, R>(s, task, &x, i, n);
            let z: [S::F; R] = std::array::from_fn(|r| taps::<S, K>(s, bias, &w, &rows[r..]));
            for r in 0..R {
                let v = if task.silu { math::silu(s, z[r]) } else { z[r] };
                st_ptr(s, out[r].add(i), n, v);
            }
        }
    });
}

/// The K - 1 rows before row t and the R from it on.
#[inline(always)]
fn seen<const K: usize, const R: usize>(task: &Task<'_>, sequence: usize, t: usize) -> [*const f32; SEEN] {
    let mut rows = [std::ptr::null(); SEEN];
    for (i, row) in rows[..R + K - 1].iter_mut().enumerate() {
        *row = task.row(sequence, (t + i) as isize - (K - 1) as isize).as_ptr();
    }
    rows
}

/// A vector of every tap, of the bias, and of every row seen.
///
/// # Safety
/// `n` elements must be readable at element i of R + K - 1 rows of x, `i + n <= cols`.
#[inline(always)]
unsafe fn load<S: Simd, const K: usize, const R: usize>(
    s: S,
    task: &Task<'_>,
    x: &[*const f32; SEEN],
    i: usize,
    n: usize,
) -> ([S::F; MAX_TAPS], S::F, [S::F; SEEN]) {
    let (mut w, mut rows) = ([s.zero(); MAX_TAPS], [s.zero(); SEEN]);
    let parameters = task.parameters.as_ptr();
    // SAFETY: the caller's promise; the parameters have K + 2 rows of `pitch`.
    unsafe {
        for j in 0..K {
            w[j] = ld_ptr(s, parameters.add(j * task.pitch + i), n);
        }
        for j in 0..R + K - 1 {
            rows[j] = ld_ptr(s, x[j].add(i), n);
        }
        (w, ld_ptr(s, parameters.add(K * task.pitch + i), n), rows)
    }
}

/// `start + sum_j w[j] x[j]`
#[inline(always)]
fn taps<S: Simd, const K: usize>(s: S, start: S::F, w: &[S::F; MAX_TAPS], x: &[S::F]) -> S::F {
    let mut z = start;
    for j in 0..K {
        z = s.fma(w[j], x[j], z);
    }
    z
}

/// What one row at the edge of a block takes part in.
#[derive(Clone, Copy)]
struct Part {
    /// Row `t - K + 1` lies in the block: write dx.
    write: bool,
    /// Row t lies in the block: add to the parameter gradients.
    accumulate: bool,
    /// Row t lies after the sequence: its dz is 0.
    flush: bool,
}

#[inline(always)]
#[allow(clippy::too_many_arguments)]
fn backward_blocks<S: Simd, const K: usize>(
    s: S,
    task: &Task<'_>,
    dy: Rows<'_>,
    dx: &RowsMut<'_>,
    dz: &mut [f32],
    sums: &mut [f32],
    blocks: &Blocks,
    i: usize,
) {
    for (sequence, range) in blocks.of(i) {
        dz.fill(0.0);
        let mut t = range.start;
        while t < range.end + K - 1 {
            let write = t + 1 >= range.start + K;
            if write && t + TILE <= range.end {
                let all = Part { write: true, accumulate: true, flush: false };
                backward_tile::<S, K, TILE>(s, task, dy, dx, dz, sums, sequence, t, all);
                t += TILE;
            } else {
                let part = Part { write, accumulate: t < range.end, flush: t >= task.len };
                backward_tile::<S, K, 1>(s, task, dy, dx, dz, sums, sequence, t, part);
                t += 1;
            }
        }
    }
}

#[inline(always)]
#[allow(clippy::too_many_arguments)]
fn backward_tile<S: Simd, const K: usize, const R: usize>(
    s: S,
    task: &Task<'_>,
    dy: Rows<'_>,
    dx: &RowsMut<'_>,
    dz: &mut [f32],
    sums: &mut [f32],
    sequence: usize,
    t: usize,
    part: Part,
) {
    let (first, pitch) = (sequence * task.len, task.pitch);
    let zeros = task.zeros().as_ptr();
    let (mut x, mut d, mut out) = ([zeros; SEEN], [zeros; R], [std::ptr::null_mut(); R]);
    if !part.flush {
        x = seen::<K, R>(task, sequence, t);
        d = std::array::from_fn(|r| dy.row(first + t + r).as_ptr());
    }
    if part.write {
        // SAFETY: this task alone has these rows.
        out = std::array::from_fn(|r| unsafe { dx.shared_row(first + t + r + 1 - K).as_mut_ptr() });
    }
    assert!(dz.len() >= (K - 1) * pitch && sums.len() >= (K + 1) * pitch);
    let (dz, sums) = (dz.as_mut_ptr(), sums.as_mut_ptr());
    lanes!(S, task.cols, |i, n| {
        // SAFETY: every row has `cols` elements; dz has K - 1 rows of `pitch`, sums K + 1, checked above.
        unsafe {
            let (w, bias, rows) = load::<S, K, R>(s, task, &x, i, n);
            // dz of the rows t - K + 1 .. t + R
            let mut window = [s.zero(); SEEN];
            for m in 0..K - 1 {
                window[m] = ld_ptr(s, dz.add(m * pitch + i), n);
            }
            for r in 0..R {
                let grad = ld_ptr(s, d[r].add(i), n);
                window[K - 1 + r] = if task.silu {
                    let z = taps::<S, K>(s, bias, &w, &rows[r..]);
                    let sigmoid = math::sigmoid(s, z);
                    // silu'(z) = sigmoid (1 + z (1 - sigmoid))
                    let slope = s.fma(z, s.fnma(sigmoid, sigmoid, sigmoid), sigmoid);
                    s.mul(grad, slope)
                } else {
                    grad
                };
            }
            if part.write {
                for r in 0..R {
                    let mut sum = s.zero();
                    for m in 0..K {
                        sum = s.fma(w[K - 1 - m], window[r + m], sum);
                    }
                    st_ptr(s, out[r].add(i), n, sum);
                }
            }
            for m in 0..K - 1 {
                st_ptr(s, dz.add(m * pitch + i), n, window[R + m]);
            }
            if part.accumulate {
                for j in 0..K {
                    let at = sums.add(j * pitch + i);
                    let mut sum = ld_ptr(s, at, n);
                    for r in 0..R {
                        sum = s.fma(window[K - 1 + r], rows[r + j], sum);
                    }
                    st_ptr(s, at, n, sum);
                }
                let at = sums.add(K * pitch + i);
                let mut sum = ld_ptr(s, at, n);
                for r in 0..R {
                    sum = s.add(sum, window[K - 1 + r]);
                }
                st_ptr(s, at, n, sum);
            }
        }
    });
}
