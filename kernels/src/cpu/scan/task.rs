//! One task of a scan: chunks of rows for one sequence and a block of channels.

use std::marker::PhantomData;

use super::vectors::*;
use super::{CHUNK, Dims, Inputs, LINE, Recurrence, STATES, Sums, VECTORS};
use crate::cpu::simd::{Simd, SimdKernel};
use crate::{Rows, RowsMut};

/// What a task of the backward pass writes: blocks of the gradients, and partial sums.
pub(super) struct TaskGradients<'a> {
    pub u: RowsMut<'a>,
    pub step: RowsMut<'a>,
    pub gate: Option<RowsMut<'a>>,
    /// Gradients of query and key over the channels of the task, `[T, 2 N]`.
    pub pairs: RowsMut<'a>,
    /// Gradients of bias, skip connection and rates over the sequence of the task, `[2 + N, channels]`.
    pub sums: RowsMut<'a>,
}

// Fields of a record. `FIRST` and `SECOND` are the recurrence's.
const FIRST: usize = 0;
const SECOND: usize = 1;
/// `q·h`
const Y: usize = 2;
const FORWARD_FIELDS: usize = 3;
/// Gradient of `q·h + D u`.
const DY: usize = 3;
/// The two sums over states.
const SUM_0: usize = 4;
const SUM_1: usize = 5;
/// The recurrence's third.
const SLOPE: usize = 6;
/// Gradient of the gate over `q·h + D u`.
const GATE: usize = 7;
const BACKWARD_FIELDS: usize = 8;

pub(super) fn forward_scratch(dims: &Dims, width: usize) -> usize {
    let states = dims.padded_state();
    Carve::len(&[2 * states * CHUNK, FORWARD_FIELDS * width * CHUNK, states * width, states * width, width, width])
}

pub(super) fn backward_scratch<R: Recurrence>(dims: &Dims, width: usize) -> usize {
    let states = dims.padded_state();
    let tile = CHUNK * STATES * LINE;
    Carve::len(&[
        2 * states * CHUNK,
        BACKWARD_FIELDS * width * CHUNK,
        states * width,
        states * width,
        states * width,
        R::KEPT * VECTORS * tile,
        2 * tile,
        width,
        width,
        width,
        width,
    ])
}

/// Addresses of the inputs of one row, and of what belongs to the channels.
#[derive(Clone, Copy)]
struct Row<S: Simd> {
    u: *const f32,
    step: *const f32,
    gate: Option<*const f32>,
    /// Of the whole width.
    bias: *const f32,
    /// Of the whole width.
    skip: *const f32,
    /// `|k|²`
    squares: S::F,
}

impl<S: Simd> Row<S> {
    #[inline(always)]
    fn new<R: Recurrence>(s: S, inputs: &Inputs<'_>, t: usize, bias: &[f32], skip: &[f32]) -> Self {
        let squares = if R::SQUARES { inputs.k.row(t).iter().map(|k| k * k).sum() } else { 0.0 };
        Self {
            u: inputs.u.row(t).as_ptr(),
            step: inputs.step.row(t).as_ptr(),
            gate: inputs.gate.map(|z| z.row(t).as_ptr()),
            bias: bias.as_ptr(),
            skip: skip.as_ptr(),
            squares: s.splat(squares),
        }
    }
}

/// Writes the record `r` of the vector of channels at `i`.
///
/// # Safety
/// The row has `lanes` channels from `i` on, `i + S::LANES` is within the width, and `r` is a record of the forward
/// pass.
#[inline(always)]
unsafe fn prepare<S: Simd, R: Recurrence>(s: S, row: Row<S>, i: usize, lanes: usize, r: *mut f32) {
    let tile = VECTORS * S::LANES;
    // SAFETY: the caller's promise.
    unsafe {
        let step = s.add(load_lanes(s, row.step.add(i), lanes), s.load_ptr(row.bias.add(i)));
        let [first, second, _] = R::prepare(s, step, load_lanes(s, row.u.add(i), lanes), row.squares);
        s.store_ptr(r.add(FIRST * tile), first);
        s.store_ptr(r.add(SECOND * tile), second);
        s.store_ptr(r.add(Y * tile), s.zero());
    }
}

/// Writes the result of a vector of channels.
///
/// # Safety
/// As for [`prepare`]; `y` is the row of the result.
#[inline(always)]
unsafe fn finish<S: Simd>(s: S, row: Row<S>, i: usize, lanes: usize, r: *const f32, y: *mut f32) {
    let tile = VECTORS * S::LANES;
    // SAFETY: the caller's promise.
    unsafe {
        let u = load_lanes(s, row.u.add(i), lanes);
        let mut out = s.fma(s.load_ptr(row.skip.add(i)), u, s.load_ptr(r.add(Y * tile)));
        if let Some(gate) = row.gate {
            let z = load_lanes(s, gate.add(i), lanes);
            out = s.mul(out, s.mul(z, sigmoid(s, z)));
        }
        store_lanes(s, y.add(i), lanes, out);
    }
}

/// [`prepare`] for the backward pass; `dy` is the row of the gradient of the result.
///
/// # Safety
/// As for [`prepare`], with a record of the backward pass.
#[inline(always)]
unsafe fn prepare_backward<S: Simd, R: Recurrence>(
    s: S,
    row: Row<S>,
    dy: *const f32,
    i: usize,
    lanes: usize,
    r: *mut f32,
) {
    let tile = VECTORS * S::LANES;
    let one = s.splat(1.0);
    // SAFETY: the caller's promise.
    unsafe {
        let step = s.add(load_lanes(s, row.step.add(i), lanes), s.load_ptr(row.bias.add(i)));
        let [first, second, slope] = R::prepare(s, step, load_lanes(s, row.u.add(i), lanes), row.squares);
        s.store_ptr(r.add(FIRST * tile), first);
        s.store_ptr(r.add(SECOND * tile), second);
        s.store_ptr(r.add(SLOPE * tile), slope);
        for field in [Y, SUM_0, SUM_1] {
            s.store_ptr(r.add(field * tile), s.zero());
        }
        let mut dy = load_lanes(s, dy.add(i), lanes);
        if let Some(gate) = row.gate {
            let z = load_lanes(s, gate.add(i), lanes);
            let sigmoid = sigmoid(s, z);
            let slope = s.mul(sigmoid, s.fma(z, s.sub(one, sigmoid), one));
            s.store_ptr(r.add(GATE * tile), s.mul(dy, slope));
            dy = s.mul(dy, s.mul(z, sigmoid));
        }
        s.store_ptr(r.add(DY * tile), dy);
    }
}

/// Rows and sums that [`finish_backward`] writes.
#[derive(Clone, Copy)]
struct RowGradients {
    u: *mut f32,
    step: *mut f32,
    gate: Option<*mut f32>,
    /// Of the whole width; added to.
    bias: *mut f32,
    /// Of the whole width; added to.
    skip: *mut f32,
}

/// Writes the gradients of a vector of channels and returns that of `|k|²`.
///
/// # Safety
/// As for [`prepare_backward`]; `out` are the rows and sums of the same channels.
#[inline(always)]
unsafe fn finish_backward<S: Simd, R: Recurrence>(
    s: S,
    row: Row<S>,
    i: usize,
    lanes: usize,
    r: *const f32,
    out: RowGradients,
) -> S::F {
    let tile = VECTORS * S::LANES;
    // SAFETY: the caller's promise.
    unsafe {
        let (u, skip) = (load_lanes(s, row.u.add(i), lanes), s.load_ptr(row.skip.add(i)));
        let dy = s.load_ptr(r.add(DY * tile));
        let prepared =
            [s.load_ptr(r.add(FIRST * tile)), s.load_ptr(r.add(SECOND * tile)), s.load_ptr(r.add(SLOPE * tile))];
        let sums = [s.load_ptr(r.add(SUM_0 * tile)), s.load_ptr(r.add(SUM_1 * tile))];
        if let Some(dz) = out.gate {
            let inner = s.fma(skip, u, s.load_ptr(r.add(Y * tile)));
            store_lanes(s, dz.add(i), lanes, s.mul(s.load_ptr(r.add(GATE * tile)), inner));
        }
        let [du, step, squares] = R::gradients(s, prepared, u, sums);
        store_lanes(s, out.u.add(i), lanes, s.fma(skip, dy, du));
        store_lanes(s, out.step.add(i), lanes, step);
        accumulate(s, out.bias.add(i), step);
        accumulate(s, out.skip.add(i), s.mul(dy, u));
        squares
    }
}

/// One task of the forward pass.
pub(super) struct ForwardTask<'a, R> {
    pub recurrence: PhantomData<R>,
    pub dims: Dims,
    pub width: usize,
    pub inputs: Inputs<'a>,
    pub y: RowsMut<'a>,
    pub state: Option<RowsMut<'a>>,
    pub boundaries: Option<RowsMut<'a>>,
    pub scratch: &'a mut [f32],
}

impl<R: Recurrence> SimdKernel for ForwardTask<'_, R> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { dims, width, inputs, mut y, state, boundaries, scratch, .. } = self;
        let states = dims.padded_state();
        let channels = y.cols();
        let (full, vectors) = (channels / S::LANES, width / S::LANES);
        let mut carve = Carve::new(scratch);
        let kq = carve.take(2 * states * CHUNK);
        let records = carve.take(FORWARD_FIELDS * width * CHUNK).as_mut_ptr();
        let h = carve.take(states * width);
        let rates = carve.take(states * width);
        let (bias, skip) = (carve.take(width), carve.take(width));
        pack_channels(inputs.bias, bias);
        pack_channels(inputs.skip, skip);
        if let Some(from) = inputs.rates {
            pack_states(s, from, rates, states, width);
        }
        match &state {
            Some(state) => pack_states(s, state.as_rows(), h, states, width),
            None => h.fill(0.0),
        }
        for (chunk, start) in (0..dims.time).step_by(CHUNK).enumerate() {
            let rows = CHUNK.min(dims.time - start);
            if let Some(boundaries) = &boundaries {
                let n = dims.state;
                // SAFETY: the only use of the task's own block.
                let to = unsafe { boundaries.shared_block(chunk * n..(chunk + 1) * n, 0..channels) };
                unpack_states(s, h, to, states, width);
            }
            let end = start + rows;
            pack_pair(inputs.k.slice_rows(start, end), inputs.q.slice_rows(start, end), kq, states);
            for t in 0..rows {
                let row = Row::new::<R>(s, &inputs, start + t, bias, skip);
                // SAFETY: vectors below `vectors` are in the width and have a record; `full` of them are whole.
                unsafe {
                    for v in 0..full {
                        let r = records.add(record::<S>(FORWARD_FIELDS, t, v));
                        prepare::<S, R>(s, row, v * S::LANES, S::LANES, r);
                    }
                    for v in full..vectors {
                        let r = records.add(record::<S>(FORWARD_FIELDS, t, v));
                        prepare::<S, R>(s, row, v * S::LANES, lanes_of::<S>(channels, v), r);
                    }
                }
            }
            // the inputs of the next chunk and the rows of the result, one of them with every four states
            let ahead = [
                Ahead::new(Some(inputs.u), end),
                Ahead::new(Some(inputs.step), end),
                Ahead::new(inputs.gate, end),
                Ahead::new(Some(y.as_rows()), start),
            ];
            for v in (0..vectors).step_by(VECTORS) {
                for n in (0..states).step_by(STATES) {
                    let ahead = ahead[n / STATES % 4].channel(v * S::LANES);
                    let at = state_at::<S>(states, n, v);
                    // SAFETY: kq, records, states and rates have room for `rows` rows of `states` and `width`.
                    unsafe {
                        let r = records.add(record::<S>(FORWARD_FIELDS, 0, v));
                        let kq = kq.as_ptr().add(n);
                        advance::<S, R>(s, rows, kq, states, r, rates.as_ptr().add(at), h.as_mut_ptr().add(at), ahead);
                    }
                }
            }
            for t in 0..rows {
                let row = Row::new::<R>(s, &inputs, start + t, bias, skip);
                let y = y.row(start + t).as_mut_ptr();
                // SAFETY: as for `prepare`.
                unsafe {
                    for v in 0..full {
                        let r = records.add(record::<S>(FORWARD_FIELDS, t, v));
                        finish(s, row, v * S::LANES, S::LANES, r, y);
                    }
                    if full * S::LANES < channels {
                        let r = records.add(record::<S>(FORWARD_FIELDS, t, full));
                        finish(s, row, full * S::LANES, lanes_of::<S>(channels, full), r, y);
                    }
                }
            }
        }
        if let Some(state) = state {
            unpack_states(s, h, state, states, width);
        }
    }
}

/// One task of the backward pass.
pub(super) struct BackwardTask<'a, R> {
    pub recurrence: PhantomData<R>,
    pub dims: Dims,
    pub width: usize,
    pub inputs: Inputs<'a>,
    pub dy: Rows<'a>,
    pub boundaries: Rows<'a>,
    pub out: TaskGradients<'a>,
    pub scratch: &'a mut [f32],
}

impl<R: Recurrence> SimdKernel for BackwardTask<'_, R> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        const FIELDS: usize = BACKWARD_FIELDS;
        let Self { dims, width, inputs, dy, boundaries, mut out, scratch, .. } = self;
        let states = dims.padded_state();
        let channels = dy.cols();
        let (full, vectors) = (channels / S::LANES, width / S::LANES);
        let mut carve = Carve::new(scratch);
        let kq = carve.take(2 * states * CHUNK);
        let records = carve.take(FIELDS * width * CHUNK).as_mut_ptr();
        let adjoints = carve.take(states * width);
        let rates = carve.take(states * width);
        let drates = carve.take(states * width);
        let kept = carve.take(R::KEPT * VECTORS * CHUNK * STATES * LINE).as_mut_ptr();
        let sums = carve.take(2 * CHUNK * STATES * LINE);
        let (bias, skip) = (carve.take(width), carve.take(width));
        let (dbias, dskip) = (carve.take(width), carve.take(width));
        pack_channels(inputs.bias, bias);
        pack_channels(inputs.skip, skip);
        if let Some(from) = inputs.rates {
            pack_states(s, from, rates, states, width);
            drates.fill(0.0);
        }
        adjoints.fill(0.0);
        dbias.fill(0.0);
        dskip.fill(0.0);
        for chunk in (0..dims.chunks()).rev() {
            let start = chunk * CHUNK;
            let rows = CHUNK.min(dims.time - start);
            let end = start + rows;
            pack_pair(inputs.k.slice_rows(start, end), inputs.q.slice_rows(start, end), kq, states);
            let boundary = boundaries.slice_rows(chunk * dims.state, (chunk + 1) * dims.state);
            for t in 0..rows {
                let row = Row::new::<R>(s, &inputs, start + t, bias, skip);
                let dy = dy.row(start + t).as_ptr();
                // SAFETY: vectors below `vectors` are in the width and have a record; `full` of them are whole.
                unsafe {
                    for v in 0..full {
                        let r = records.add(record::<S>(FIELDS, t, v));
                        prepare_backward::<S, R>(s, row, dy, v * S::LANES, S::LANES, r);
                    }
                    for v in full..vectors {
                        let r = records.add(record::<S>(FIELDS, t, v));
                        prepare_backward::<S, R>(s, row, dy, v * S::LANES, lanes_of::<S>(channels, v), r);
                    }
                }
            }
            for n in (0..states).step_by(STATES) {
                let sums = &mut sums[..rows * 2 * STATES * S::LANES];
                sums.fill(0.0);
                for v in (0..vectors).step_by(VECTORS) {
                    let h = gather_states(s, boundary, n, v);
                    let at = state_at::<S>(states, n, v);
                    // SAFETY: all of these have room for `rows` rows of `states`, of `width`, or of a tile.
                    unsafe {
                        let r = records.add(record::<S>(FIELDS, 0, v));
                        let (kq, rates) = (kq.as_ptr().add(n), rates.as_ptr().add(at));
                        recompute::<S, R>(s, rows, kq, states, r, rates, h, kept, sums.as_mut_ptr());
                        let (adjoints, drates) = (adjoints.as_mut_ptr().add(at), drates.as_mut_ptr().add(at));
                        retreat::<S, R>(s, rows, kq, states, r, rates, adjoints, drates, kept, sums.as_mut_ptr());
                    }
                }
                for (t, sums) in sums.chunks_exact(2 * STATES * S::LANES).enumerate() {
                    let pair = out.pairs.row(start + t);
                    for (j, sum) in sums.chunks_exact(S::LANES).enumerate() {
                        let (side, j) = (j / STATES, j % STATES);
                        if n + j < dims.state {
                            pair[side * dims.state + n + j] = s.sum(s.load(sum));
                        }
                    }
                }
            }
            for t in 0..rows {
                let row = Row::new::<R>(s, &inputs, start + t, bias, skip);
                let to = RowGradients {
                    u: out.u.row(start + t).as_mut_ptr(),
                    step: out.step.row(start + t).as_mut_ptr(),
                    gate: out.gate.as_mut().map(|dz| dz.row(start + t).as_mut_ptr()),
                    bias: dbias.as_mut_ptr(),
                    skip: dskip.as_mut_ptr(),
                };
                let mut squares = s.zero();
                // SAFETY: as for `prepare_backward`.
                unsafe {
                    for v in 0..full {
                        let r = records.add(record::<S>(FIELDS, t, v));
                        squares = s.add(squares, finish_backward::<S, R>(s, row, v * S::LANES, S::LANES, r, to));
                    }
                    if full * S::LANES < channels {
                        let r = records.add(record::<S>(FIELDS, t, full));
                        let lanes = lanes_of::<S>(channels, full);
                        squares = s.add(squares, finish_backward::<S, R>(s, row, full * S::LANES, lanes, r, to));
                    }
                }
                if R::SQUARES {
                    let squares = 2.0 * s.sum(squares);
                    let dk = &mut out.pairs.row(start + t)[dims.state..];
                    dk.iter_mut().zip(inputs.k.row(start + t)).for_each(|(dk, k)| *dk += squares * k);
                }
            }
        }
        out.sums.row(0).copy_from_slice(&dbias[..channels]);
        out.sums.row(1).copy_from_slice(&dskip[..channels]);
        if R::RATES {
            // SAFETY: the only use of these rows.
            let to = unsafe { out.sums.shared_block(2..2 + dims.state, 0..channels) };
            unpack_states(s, drates, to, states, width);
        }
    }
}

/// An activation from some row and channel on, to prefetch what a tile needs of it row by row.
#[derive(Clone, Copy)]
struct Ahead {
    from: *const f32,
    /// 0 if there is nothing to prefetch.
    stride: usize,
}

impl Ahead {
    #[inline(always)]
    fn new(x: Option<Rows<'_>>, row: usize) -> Self {
        match x {
            Some(x) => Self { from: x.as_ptr().wrapping_add(row * x.stride()), stride: x.stride() },
            None => Self { from: std::ptr::null(), stride: 0 },
        }
    }

    #[inline(always)]
    fn channel(self, channel: usize) -> Self {
        Self { from: self.from.wrapping_add(channel), ..self }
    }

    /// Asks for row `t`, which need not exist.
    #[inline(always)]
    fn row<S: Simd>(self, t: usize) {
        #[cfg(target_arch = "x86_64")]
        if self.stride != 0 {
            use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
            for line in 0..(VECTORS * S::LANES).div_ceil(LINE) {
                let at = self.from.wrapping_add(t * self.stride + line * LINE);
                // SAFETY: a prefetch has no effect but on the cache; any address is allowed.
                unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast()) };
            }
        }
        #[cfg(not(target_arch = "x86_64"))]
        let _ = (self.from, t);
    }
}

/// The recurrence over a chunk for one tile of states and channels; adds `q·h` to the records.
///
/// # Safety
/// `kq` points to the tile's first state in `[rows, 2, states]`, `records` to `[rows, FORWARD_FIELDS, tile]`, `rates`
/// (if there are any) and `h` to `[STATES, tile]` floats.
#[inline(always)]
#[allow(clippy::too_many_arguments, clippy::needless_range_loop)]
unsafe fn advance<S: Simd, R: Recurrence>(
    s: S,
    rows: usize,
    kq: *const f32,
    states: usize,
    records: *mut f32,
    rates: *const f32,
    state: *mut f32,
    ahead: Ahead,
) {
    let tile = VECTORS * S::LANES;
    // SAFETY: all offsets lie within what the caller promises.
    unsafe {
        let mut h = load_states(s, state);
        for t in 0..rows {
            let (k, r) = (kq.add(t * 2 * states), records.add(t * FORWARD_FIELDS * tile));
            ahead.row::<S>(t);
            let first = load_tile(s, r.add(FIRST * tile));
            let second = load_tile(s, r.add(SECOND * tile));
            let mut y = load_tile(s, r.add(Y * tile));
            for n in 0..STATES {
                let (k, q) = (s.splat(*k.add(n)), s.splat(*k.add(states + n)));
                for v in 0..VECTORS {
                    let rate = if R::RATES { s.load_ptr(rates.add(n * tile + v * S::LANES)) } else { first[v] };
                    (h[n][v], _) = R::update(s, [first[v], second[v]], k, rate, h[n][v]);
                    y[v] = s.fma(q, h[n][v], y[v]);
                }
            }
            store_tile(s, r.add(Y * tile), y);
        }
        store_states(s, state, h);
    }
}

/// [`advance`] in the backward pass: also keeps what the adjoint needs, in `kept` `[rows, STATES, KEPT, tile]`, and
/// adds to the gradient of the query, whose lanes are in `sums` `[rows, 2, STATES, LANES]` (first half of a row).
///
/// # Safety
/// As for [`advance`], with records of `BACKWARD_FIELDS`, and `kept` and `sums` as above.
#[inline(always)]
#[allow(clippy::too_many_arguments, clippy::needless_range_loop)]
unsafe fn recompute<S: Simd, R: Recurrence>(
    s: S,
    rows: usize,
    kq: *const f32,
    states: usize,
    records: *mut f32,
    rates: *const f32,
    mut h: [[S::F; VECTORS]; STATES],
    kept: *mut f32,
    sums: *mut f32,
) {
    let tile = VECTORS * S::LANES;
    // SAFETY: all offsets lie within what the caller promises.
    unsafe {
        for t in 0..rows {
            let (k, r) = (kq.add(t * 2 * states), records.add(t * BACKWARD_FIELDS * tile));
            let (kept, dq) = (kept.add(t * STATES * R::KEPT * tile), sums.add(t * 2 * STATES * S::LANES));
            let first = load_tile(s, r.add(FIRST * tile));
            let second = load_tile(s, r.add(SECOND * tile));
            let dy = load_tile(s, r.add(DY * tile));
            let mut y = load_tile(s, r.add(Y * tile));
            for n in 0..STATES {
                let (k, q) = (s.splat(*k.add(n)), s.splat(*k.add(states + n)));
                let mut sum = s.load_ptr(dq.add(n * S::LANES));
                for v in 0..VECTORS {
                    let rate = if R::RATES { s.load_ptr(rates.add(n * tile + v * S::LANES)) } else { first[v] };
                    let (next, keep) = R::update(s, [first[v], second[v]], k, rate, h[n][v]);
                    for (i, &x) in keep.iter().enumerate().take(R::KEPT) {
                        s.store_ptr(kept.add((n * R::KEPT + i) * tile + v * S::LANES), x);
                    }
                    h[n][v] = next;
                    y[v] = s.fma(q, next, y[v]);
                    sum = s.fma(dy[v], next, sum);
                }
                s.store_ptr(dq.add(n * S::LANES), sum);
            }
            store_tile(s, r.add(Y * tile), y);
        }
    }
}

/// The adjoint recurrence over a chunk, from the last row to the first: adds to the sums of the records, to the
/// gradient of the key, whose lanes are in the second half of a row of `sums`, and to that of the rates.
///
/// # Safety
/// As for [`recompute`], with `adjoints` and (if there are rates) `drates` of `[STATES, tile]`.
#[inline(always)]
#[allow(clippy::too_many_arguments, clippy::needless_range_loop)]
unsafe fn retreat<S: Simd, R: Recurrence>(
    s: S,
    rows: usize,
    kq: *const f32,
    states: usize,
    records: *mut f32,
    rates: *const f32,
    adjoints: *mut f32,
    drates: *mut f32,
    kept: *const f32,
    sums: *mut f32,
) {
    let tile = VECTORS * S::LANES;
    // SAFETY: all offsets lie within what the caller promises.
    unsafe {
        let mut lambda = load_states(s, adjoints);
        let mut drate = if R::RATES { load_states(s, drates) } else { lambda };
        for t in (0..rows).rev() {
            let (k, r) = (kq.add(t * 2 * states), records.add(t * BACKWARD_FIELDS * tile));
            let (kept, dk) = (kept.add(t * STATES * R::KEPT * tile), sums.add((t * 2 + 1) * STATES * S::LANES));
            let first = load_tile(s, r.add(FIRST * tile));
            let second = load_tile(s, r.add(SECOND * tile));
            let dy = load_tile(s, r.add(DY * tile));
            let mut sum_0 = load_tile(s, r.add(SUM_0 * tile));
            let mut sum_1 = load_tile(s, r.add(SUM_1 * tile));
            for n in 0..STATES {
                let (k, q) = (s.splat(*k.add(n)), s.splat(*k.add(states + n)));
                let mut dk_sum = s.load_ptr(dk.add(n * S::LANES));
                for v in 0..VECTORS {
                    let at = v * S::LANES;
                    let rate = if R::RATES { s.load_ptr(rates.add(n * tile + at)) } else { first[v] };
                    let mut keep = [first[v]; 2];
                    for (i, x) in keep.iter_mut().enumerate().take(R::KEPT) {
                        *x = s.load_ptr(kept.add((n * R::KEPT + i) * tile + at));
                    }
                    let l = s.fma(q, dy[v], lambda[n][v]);
                    let mut sums = Sums { channel: [sum_0[v], sum_1[v]], k: dk_sum, rate: drate[n][v] };
                    lambda[n][v] = R::adjoint(s, [first[v], second[v]], k, rate, keep, l, &mut sums);
                    [sum_0[v], sum_1[v]] = sums.channel;
                    (dk_sum, drate[n][v]) = (sums.k, sums.rate);
                }
                s.store_ptr(dk.add(n * S::LANES), dk_sum);
            }
            store_tile(s, r.add(SUM_0 * tile), sum_0);
            store_tile(s, r.add(SUM_1 * tile), sum_1);
        }
        store_states(s, adjoints, lambda);
        if R::RATES {
            store_states(s, drates, drate);
        }
    }
}
