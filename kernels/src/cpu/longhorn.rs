//! The Longhorn online update (arXiv:2407.14207).
//!
//! Per sequence and channel, with the state `h` of `N` elements and `k_t`, `q_t` shared by all channels:
//!
//! ```text
//! b = sigmoid(dt + t_bias)      e = b / (1 + b |k|²)
//! h = (1 - e k²) h + e u k      y = (q·h + D u) silu(z)
//! ```
//!
//! How the work is arranged is told in [`scan`](super::scan). Two rewritings make the arithmetic short:
//! `e = 1 / (1 + |k|² + exp(-dt - t_bias))`, one exponential and one division for a row of a channel; and
//! `ρ = e u - (e k) h`, `h = h + k ρ`, so that an element of the state takes four multiply-adds (`e k`, `ρ`, `h`,
//! `y`).
//!
//! In the backward pass, the states are computed again together with the gradient of `q`, and what is kept of
//! them is `ρ`. With `λ` the gradient of `h_t` and sums over states for a channel, over channels for `k`:
//!
//! ```text
//! λ = λ' + q dy    m = k λ    M = Σ m    S = Σ m ρ    dk = Σ λ (2 ρ - e u) - 2 k Σ e S    λ' = λ - k e m
//! du = D dy + e M        ddt = S e exp(-dt - t_bias)
//! ```
//!
//! That is six multiply-adds and three additions. `dq` and `dk` stay in vectors (one lane per sixteenth of the
//! channels) until a chunk of a channel block is done, and are then summed over the lanes; the channel blocks
//! are summed at the end. `-2 k Σ e S` is the path through `|k|²`.

use super::scan::{
    CHUNK, Carve, LINE, STATES, Split, VECTORS, accumulate, exp_neg, gather_states, lanes_of, load_lanes, load_states,
    load_tile, pack_channels, pack_pair, pack_states, record, reduce_batch, reduce_pair, sigmoid, state_at,
    store_lanes, store_states, store_tile, unpack_states,
};
use super::simd::Simd;
use super::threads::{parallel_for, with_scratch};
use crate::{Rows, RowsMut, simd_fn};

pub use super::scan::Dims;

/// What the scan reads. Activations have `B T` rows, row `b T + t`.
#[derive(Clone, Copy)]
pub struct Inputs<'a> {
    /// `[B T, D]`
    pub u: Rows<'a>,
    /// Step size before bias and sigmoid, `[B T, D]`.
    pub dt: Rows<'a>,
    /// `[B T, N]`
    pub q: Rows<'a>,
    /// `[B T, N]`
    pub k: Rows<'a>,
    /// Added to `dt`, `[D]`.
    pub t_bias: Option<&'a [f32]>,
    /// The skip connection `D`, `[D]`.
    pub skip: Option<&'a [f32]>,
    /// The gate `z`, `[B T, D]`.
    pub gate: Option<Rows<'a>>,
}

/// Where [`backward`] writes; everything is overwritten.
pub struct Gradients<'a> {
    /// `[B T, D]`
    pub u: RowsMut<'a>,
    /// `[B T, D]`
    pub dt: RowsMut<'a>,
    /// `[B T, N]`
    pub q: RowsMut<'a>,
    /// `[B T, N]`
    pub k: RowsMut<'a>,
    /// `[D]`
    pub t_bias: Option<&'a mut [f32]>,
    /// `[D]`
    pub skip: Option<&'a mut [f32]>,
    /// `[B T, D]`, given exactly if there is a gate.
    pub gate: Option<RowsMut<'a>>,
}

impl<'a> Inputs<'a> {
    fn check(&self, dims: &Dims) {
        dims.check("u", (self.u.rows(), self.u.cols()), dims.channels);
        dims.check("dt", (self.dt.rows(), self.dt.cols()), dims.channels);
        dims.check("q", (self.q.rows(), self.q.cols()), dims.state);
        dims.check("k", (self.k.rows(), self.k.cols()), dims.state);
        if let Some(gate) = self.gate {
            dims.check("gate", (gate.rows(), gate.cols()), dims.channels);
        }
        for parameter in [self.t_bias, self.skip].into_iter().flatten() {
            assert_eq!(parameter.len(), dims.channels, "parameter per channel");
        }
    }

    /// What a task reads: one sequence, some channels.
    fn block(&self, rows: std::ops::Range<usize>, channels: std::ops::Range<usize>) -> Inputs<'a> {
        let block = |x: Rows<'a>| x.slice_rows(rows.start, rows.end).slice_cols(channels.start, channels.end);
        Inputs {
            u: block(self.u),
            dt: block(self.dt),
            q: self.q.slice_rows(rows.start, rows.end),
            k: self.k.slice_rows(rows.start, rows.end),
            t_bias: self.t_bias.map(|x| &x[channels.clone()]),
            skip: self.skip.map(|x| &x[channels.clone()]),
            gate: self.gate.map(block),
        }
    }
}

/// `y` `[B T, D]` of the scan.
///
/// `state` `[B, N, D]` is read before the first row and replaced by the state after the last one; without it,
/// sequences start from zeros. `boundaries` (of [`Dims::boundaries_len`]) is written for [`backward`].
pub fn forward(
    dims: Dims,
    inputs: &Inputs<'_>,
    y: RowsMut<'_>,
    state: Option<&mut [f32]>,
    boundaries: Option<&mut [f32]>,
) {
    inputs.check(&dims);
    dims.check("y", (y.rows(), y.cols()), dims.channels);
    let split = Split::new(&dims);
    let (n, d) = (dims.state, dims.channels);
    let state = state.map(|x| {
        assert_eq!(x.len(), dims.state_len(), "state");
        RowsMut::new(x, dims.batch * n, d, d)
    });
    let boundaries = boundaries.map(|x| {
        assert_eq!(x.len(), dims.boundaries_len(), "boundaries");
        RowsMut::new(x, dims.batch * dims.chunks() * n, d, d)
    });
    parallel_for(dims.batch * split.groups, |task| {
        let (b, _, channels) = split.task(&dims, task);
        let rows = b * dims.time..(b + 1) * dims.time;
        // SAFETY: tasks differ in the sequence or in the channels, here and below.
        let y = unsafe { y.shared_block(rows.clone(), channels.clone()) };
        // SAFETY: as above.
        let state = state.as_ref().map(|x| unsafe { x.shared_block(b * n..(b + 1) * n, channels.clone()) });
        let boundaries = boundaries.as_ref().map(|x| {
            let c = dims.chunks() * n;
            // SAFETY: as above.
            unsafe { x.shared_block(b * c..(b + 1) * c, channels.clone()) }
        });
        with_scratch(forward_scratch(&dims, split.width), |scratch| {
            forward_task(&dims, inputs.block(rows, channels), split.width, y, state, boundaries, scratch);
        });
    });
}

/// [`forward`] for one token of each sequence: `dims.time` is 1 and `state` `[B, N, D]` is updated.
pub fn step(dims: Dims, inputs: &Inputs<'_>, y: RowsMut<'_>, state: &mut [f32]) {
    assert_eq!(dims.time, 1, "a step is one row per sequence");
    forward(dims, inputs, y, Some(state), None);
}

/// Gradients of [`forward`] from the gradient `dy` `[B T, D]` of its result, its inputs and the `boundaries`
/// that it wrote. The gradient does not continue into the initial state.
pub fn backward(dims: Dims, inputs: &Inputs<'_>, dy: Rows<'_>, boundaries: &[f32], gradients: Gradients<'_>) {
    inputs.check(&dims);
    let g = gradients;
    dims.check("dy", (dy.rows(), dy.cols()), dims.channels);
    dims.check("du", (g.u.rows(), g.u.cols()), dims.channels);
    dims.check("ddt", (g.dt.rows(), g.dt.cols()), dims.channels);
    dims.check("dq", (g.q.rows(), g.q.cols()), dims.state);
    dims.check("dk", (g.k.rows(), g.k.cols()), dims.state);
    assert_eq!(g.gate.is_some(), inputs.gate.is_some(), "a gradient for the gate exactly if there is one");
    if let Some(dz) = &g.gate {
        dims.check("dz", (dz.rows(), dz.cols()), dims.channels);
    }
    assert_eq!(boundaries.len(), dims.boundaries_len(), "boundaries");
    let split = Split::new(&dims);
    let (n, d) = (dims.state, dims.channels);
    let boundaries = Rows::new(boundaries, dims.batch * dims.chunks() * n, d, d);
    let (pair_len, channel_len) = (split.groups * dims.rows() * 2 * n, dims.batch * 2 * d);
    with_scratch(pair_len + channel_len, |partial| {
        let (pairs, per_channel) = partial.split_at_mut(pair_len);
        let shared_pairs = RowsMut::new(pairs, split.groups * dims.rows(), 2 * n, 2 * n);
        let shared_per_channel = RowsMut::new(per_channel, dims.batch * 2, d, d);
        parallel_for(dims.batch * split.groups, |task| {
            let (b, group, channels) = split.task(&dims, task);
            let rows = b * dims.time..(b + 1) * dims.time;
            let block = |x: &RowsMut<'_>| {
                // SAFETY: tasks differ in the sequence or in the channels; the lifetime is that of this task.
                let mut x = unsafe { x.shared_block(rows.clone(), channels.clone()) };
                // SAFETY: as above; this only detaches the result from the closure's borrow.
                unsafe { RowsMut::from_raw(x.as_mut_ptr(), x.rows(), x.cols(), x.stride()) }
            };
            let c = dims.chunks() * n;
            let first = group * dims.rows();
            let out = TaskGradients {
                u: block(&g.u),
                dt: block(&g.dt),
                gate: g.gate.as_ref().map(block),
                // SAFETY: tasks differ in the group or in the sequence.
                pairs: unsafe { shared_pairs.shared_block(first + rows.start..first + rows.end, 0..2 * n) },
                // SAFETY: tasks differ in the sequence or in the channels.
                per_channel: unsafe { shared_per_channel.shared_block(2 * b..2 * b + 2, channels.clone()) },
            };
            let boundaries = boundaries.slice_rows(b * c, (b + 1) * c).slice_cols(channels.start, channels.end);
            let dy = dy.slice_rows(rows.start, rows.end).slice_cols(channels.start, channels.end);
            with_scratch(backward_scratch(&dims, split.width), |scratch| {
                let inputs = inputs.block(rows.clone(), channels.clone());
                backward_task(&dims, inputs, split.width, dy, boundaries, out, scratch);
            });
        });
        reduce_pair(pairs, split.groups, g.q, g.k);
        for (field, to) in [g.t_bias, g.skip].into_iter().enumerate() {
            if let Some(to) = to {
                assert_eq!(to.len(), d, "parameter per channel");
                reduce_batch(per_channel, 2, field, to);
            }
        }
    });
}

/// What a task of the backward pass writes: blocks of the gradients, and partial sums.
struct TaskGradients<'a> {
    u: RowsMut<'a>,
    dt: RowsMut<'a>,
    gate: Option<RowsMut<'a>>,
    /// `dq` and `dk` over the channels of the task, `[T, 2 N]`.
    pairs: RowsMut<'a>,
    /// `dt_bias` and `dD` over the sequence of the task, `[2, channels]`.
    per_channel: RowsMut<'a>,
}

// Fields of a record of the forward pass (the first three) and of the backward pass.
const E: usize = 0;
const EU: usize = 1;
/// `q·h`
const Y: usize = 2;
const FORWARD_FIELDS: usize = 3;
/// Gradient of `q·h + D u`.
const DY: usize = 3;
/// `S` of the module's formulas.
const S_SUM: usize = 4;
/// `M` of the module's formulas.
const M_SUM: usize = 5;
/// `e exp(-dt - t_bias)`
const SLOPE: usize = 6;
/// Gradient of the gate over `q·h + D u`.
const GATE: usize = 7;
const BACKWARD_FIELDS: usize = 8;

fn forward_scratch(dims: &Dims, width: usize) -> usize {
    let states = dims.padded_state();
    Carve::len(&[2 * states * CHUNK, FORWARD_FIELDS * width * CHUNK, states * width, 2 * width])
}

fn backward_scratch(dims: &Dims, width: usize) -> usize {
    let states = dims.padded_state();
    let tile = CHUNK * STATES * LINE;
    Carve::len(&[
        2 * states * CHUNK,
        BACKWARD_FIELDS * width * CHUNK,
        states * width,
        VECTORS * tile,
        2 * tile,
        2 * width,
        2 * width,
    ])
}

/// Addresses of the inputs of one row, and of what belongs to the channels.
#[derive(Clone, Copy)]
struct Row {
    u: *const f32,
    dt: *const f32,
    gate: Option<*const f32>,
    /// Of the whole width.
    bias: *const f32,
    /// Of the whole width.
    skip: *const f32,
}

impl Row {
    #[inline(always)]
    fn new(inputs: &Inputs<'_>, t: usize, bias: &[f32], skip: &[f32]) -> Self {
        Self {
            u: inputs.u.row(t).as_ptr(),
            dt: inputs.dt.row(t).as_ptr(),
            gate: inputs.gate.map(|z| z.row(t).as_ptr()),
            bias: bias.as_ptr(),
            skip: skip.as_ptr(),
        }
    }
}

/// `e` and `exp(-dt - bias)` for the vector of channels at `i`.
///
/// # Safety
/// The row has `lanes` channels from `i` on, and `i + S::LANES` is within the width.
#[inline(always)]
unsafe fn step_size<S: Simd>(s: S, row: Row, squares: S::F, i: usize, lanes: usize) -> (S::F, S::F) {
    // SAFETY: the caller's promise.
    let dt = unsafe { s.add(load_lanes(s, row.dt.add(i), lanes), s.load_ptr(row.bias.add(i))) };
    let exp = exp_neg(s, dt);
    (s.div(s.splat(1.0), s.add(s.add(s.splat(1.0), squares), exp)), exp)
}

/// Writes the record `r` of a vector of channels.
///
/// # Safety
/// As for [`step_size`]; `r` is a record of the forward pass.
#[inline(always)]
unsafe fn prepare<S: Simd>(s: S, row: Row, squares: S::F, i: usize, lanes: usize, r: *mut f32) {
    let tile = VECTORS * S::LANES;
    // SAFETY: the caller's promise.
    unsafe {
        let (e, _) = step_size(s, row, squares, i, lanes);
        s.store_ptr(r.add(E * tile), e);
        s.store_ptr(r.add(EU * tile), s.mul(e, load_lanes(s, row.u.add(i), lanes)));
        s.store_ptr(r.add(Y * tile), s.zero());
    }
}

/// Writes the result of a vector of channels.
///
/// # Safety
/// As for [`prepare`]; `y` is the row of the result.
#[inline(always)]
unsafe fn finish<S: Simd>(s: S, row: Row, i: usize, lanes: usize, r: *const f32, y: *mut f32) {
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
unsafe fn prepare_backward<S: Simd>(
    s: S,
    row: Row,
    dy: *const f32,
    squares: S::F,
    i: usize,
    lanes: usize,
    r: *mut f32,
) {
    let tile = VECTORS * S::LANES;
    let one = s.splat(1.0);
    // SAFETY: the caller's promise.
    unsafe {
        let (e, exp) = step_size(s, row, squares, i, lanes);
        s.store_ptr(r.add(E * tile), e);
        s.store_ptr(r.add(EU * tile), s.mul(e, load_lanes(s, row.u.add(i), lanes)));
        s.store_ptr(r.add(SLOPE * tile), s.mul(e, exp));
        for field in [Y, S_SUM, M_SUM] {
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
    dt: *mut f32,
    gate: Option<*mut f32>,
    /// Of the whole width; added to.
    bias: *mut f32,
    /// Of the whole width; added to.
    skip: *mut f32,
}

/// Writes the gradients of a vector of channels and returns its `e S`.
///
/// # Safety
/// As for [`prepare_backward`]; `out` are the rows and sums of the same channels.
#[inline(always)]
unsafe fn finish_backward<S: Simd>(s: S, row: Row, i: usize, lanes: usize, r: *const f32, out: RowGradients) -> S::F {
    let tile = VECTORS * S::LANES;
    // SAFETY: the caller's promise.
    unsafe {
        let (u, skip) = (load_lanes(s, row.u.add(i), lanes), s.load_ptr(row.skip.add(i)));
        let (e, dy) = (s.load_ptr(r.add(E * tile)), s.load_ptr(r.add(DY * tile)));
        let (s_sum, m_sum) = (s.load_ptr(r.add(S_SUM * tile)), s.load_ptr(r.add(M_SUM * tile)));
        if let Some(dz) = out.gate {
            let inner = s.fma(skip, u, s.load_ptr(r.add(Y * tile)));
            store_lanes(s, dz.add(i), lanes, s.mul(s.load_ptr(r.add(GATE * tile)), inner));
        }
        store_lanes(s, out.u.add(i), lanes, s.fma(e, m_sum, s.mul(skip, dy)));
        let ddt = s.mul(s_sum, s.load_ptr(r.add(SLOPE * tile)));
        store_lanes(s, out.dt.add(i), lanes, ddt);
        accumulate(s, out.bias.add(i), ddt);
        accumulate(s, out.skip.add(i), s.mul(dy, u));
        s.mul(e, s_sum)
    }
}

simd_fn! {
    fn forward_task(
        s: S,
        dims: &Dims,
        inputs: Inputs<'_>,
        width: usize,
        y: RowsMut<'_>,
        state: Option<RowsMut<'_>>,
        boundaries: Option<RowsMut<'_>>,
        scratch: &mut [f32],
    ) {
        let (mut y, mut state, mut boundaries) = (y, state, boundaries);
        let states = dims.padded_state();
        let channels = y.cols();
        let (full, vectors) = (channels / S::LANES, width / S::LANES);
        let tile = VECTORS * S::LANES;
        let mut carve = Carve::new(scratch);
        let kq = carve.take(2 * states * CHUNK);
        let records = carve.take(FORWARD_FIELDS * width * CHUNK);
        let h = carve.take(states * width);
        let (bias, skip) = carve.take(2 * width).split_at_mut(width);
        pack_channels(inputs.t_bias, bias);
        pack_channels(inputs.skip, skip);
        match &state {
            Some(state) => pack_states(s, state.as_rows(), h, states, width),
            None => h.fill(0.0),
        }
        for (chunk, start) in (0..dims.time).step_by(CHUNK).enumerate() {
            let rows = CHUNK.min(dims.time - start);
            if let Some(boundaries) = &mut boundaries {
                let n = dims.state;
                // SAFETY: the only use of the task's own block.
                let to = unsafe { boundaries.shared_block(chunk * n..(chunk + 1) * n, 0..channels) };
                unpack_states(s, h, to, states, width);
            }
            let end = start + rows;
            pack_pair(inputs.k.slice_rows(start, end), inputs.q.slice_rows(start, end), kq, states);
            let records = records.as_mut_ptr();
            for t in 0..rows {
                let row = Row::new(&inputs, start + t, bias, skip);
                let squares = s.splat(sum_of_squares(inputs.k.row(start + t)));
                // SAFETY: vectors below `vectors` are in the width and have a record; `full` of them are whole.
                unsafe {
                    for v in 0..full {
                        let r = records.add(record::<S>(FORWARD_FIELDS, t, v));
                        prepare(s, row, squares, v * S::LANES, S::LANES, r);
                    }
                    for v in full..vectors {
                        let r = records.add(record::<S>(FORWARD_FIELDS, t, v));
                        prepare(s, row, squares, v * S::LANES, lanes_of::<S>(channels, v), r);
                    }
                }
            }
            for v in (0..vectors).step_by(VECTORS) {
                for n in (0..states).step_by(STATES) {
                    let h = h[state_at::<S>(states, n, v)..][..STATES * tile].as_mut_ptr();
                    // SAFETY: kq, records and h have room for `rows` rows of `states` and `width`.
                    unsafe {
                        let r = records.add(record::<S>(FORWARD_FIELDS, 0, v));
                        advance(s, rows, kq.as_ptr().add(n), states, r, h);
                    }
                }
            }
            for t in 0..rows {
                let row = Row::new(&inputs, start + t, bias, skip);
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
        if let Some(state) = state.take() {
            unpack_states(s, h, state, states, width);
        }
    }

    fn backward_task(
        s: S,
        dims: &Dims,
        inputs: Inputs<'_>,
        width: usize,
        dy: Rows<'_>,
        boundaries: Rows<'_>,
        out: TaskGradients<'_>,
        scratch: &mut [f32],
    ) {
        const FIELDS: usize = BACKWARD_FIELDS;
        let mut out = out;
        let states = dims.padded_state();
        let channels = dy.cols();
        let (full, vectors) = (channels / S::LANES, width / S::LANES);
        let tile = VECTORS * S::LANES;
        let mut carve = Carve::new(scratch);
        let kq = carve.take(2 * states * CHUNK);
        let records = carve.take(FIELDS * width * CHUNK);
        let adjoint = carve.take(states * width);
        let rho = carve.take(VECTORS * CHUNK * STATES * LINE);
        let sums = carve.take(2 * CHUNK * STATES * LINE);
        let (bias, skip) = carve.take(2 * width).split_at_mut(width);
        let (dbias, dskip) = carve.take(2 * width).split_at_mut(width);
        pack_channels(inputs.t_bias, bias);
        pack_channels(inputs.skip, skip);
        adjoint.fill(0.0);
        dbias.fill(0.0);
        dskip.fill(0.0);
        for chunk in (0..dims.chunks()).rev() {
            let start = chunk * CHUNK;
            let rows = CHUNK.min(dims.time - start);
            let end = start + rows;
            pack_pair(inputs.k.slice_rows(start, end), inputs.q.slice_rows(start, end), kq, states);
            let boundary = boundaries.slice_rows(chunk * dims.state, (chunk + 1) * dims.state);
            let records = records.as_mut_ptr();
            for t in 0..rows {
                let row = Row::new(&inputs, start + t, bias, skip);
                let dy = dy.row(start + t).as_ptr();
                let squares = s.splat(sum_of_squares(inputs.k.row(start + t)));
                // SAFETY: vectors below `vectors` are in the width and have a record; `full` of them are whole.
                unsafe {
                    for v in 0..full {
                        let r = records.add(record::<S>(FIELDS, t, v));
                        prepare_backward(s, row, dy, squares, v * S::LANES, S::LANES, r);
                    }
                    for v in full..vectors {
                        let r = records.add(record::<S>(FIELDS, t, v));
                        prepare_backward(s, row, dy, squares, v * S::LANES, lanes_of::<S>(channels, v), r);
                    }
                }
            }
            for n in (0..states).step_by(STATES) {
                let sums = &mut sums[..rows * 2 * STATES * S::LANES];
                sums.fill(0.0);
                for v in (0..vectors).step_by(VECTORS) {
                    let h = gather_states(s, boundary, n, v);
                    let adjoint = adjoint[state_at::<S>(states, n, v)..][..STATES * tile].as_mut_ptr();
                    // SAFETY: kq, records, rho and sums have room for `rows` rows of `states`, `width` and a tile.
                    unsafe {
                        let r = records.add(record::<S>(FIELDS, 0, v));
                        let kq = kq.as_ptr().add(n);
                        recompute(s, rows, kq, states, r, h, rho.as_mut_ptr(), sums.as_mut_ptr());
                        retreat(s, rows, kq, states, r, adjoint, rho.as_ptr(), sums.as_mut_ptr());
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
                let row = Row::new(&inputs, start + t, bias, skip);
                let to = RowGradients {
                    u: out.u.row(start + t).as_mut_ptr(),
                    dt: out.dt.row(start + t).as_mut_ptr(),
                    gate: out.gate.as_mut().map(|dz| dz.row(start + t).as_mut_ptr()),
                    bias: dbias.as_mut_ptr(),
                    skip: dskip.as_mut_ptr(),
                };
                let mut squares = s.zero();
                // SAFETY: as for `prepare_backward`.
                unsafe {
                    for v in 0..full {
                        let r = records.add(record::<S>(FIELDS, t, v));
                        squares = s.add(squares, finish_backward(s, row, v * S::LANES, S::LANES, r, to));
                    }
                    if full * S::LANES < channels {
                        let r = records.add(record::<S>(FIELDS, t, full));
                        let lanes = lanes_of::<S>(channels, full);
                        squares = s.add(squares, finish_backward(s, row, full * S::LANES, lanes, r, to));
                    }
                }
                let squares = 2.0 * s.sum(squares);
                let dk = &mut out.pairs.row(start + t)[dims.state..];
                dk.iter_mut().zip(inputs.k.row(start + t)).for_each(|(dk, k)| *dk -= squares * k);
            }
        }
        out.per_channel.row(0).copy_from_slice(&dbias[..channels]);
        out.per_channel.row(1).copy_from_slice(&dskip[..channels]);
    }
}

fn sum_of_squares(k: &[f32]) -> f32 {
    k.iter().map(|k| k * k).sum()
}

/// The recurrence over a chunk for one tile of states and channels; adds `q·h` to the records.
///
/// # Safety
/// `kq` points to the tile's first state in `[rows, 2, states]`, `records` to `[rows, FORWARD_FIELDS, tile]`
/// and `h` to `[STATES, tile]` floats.
#[inline(always)]
unsafe fn advance<S: Simd>(s: S, rows: usize, kq: *const f32, states: usize, records: *mut f32, state: *mut f32) {
    let tile = VECTORS * S::LANES;
    // SAFETY: all offsets lie within what the caller promises.
    unsafe {
        let mut h = load_states(s, state);
        for t in 0..rows {
            let (k, r) = (kq.add(t * 2 * states), records.add(t * FORWARD_FIELDS * tile));
            let e = load_tile(s, r.add(E * tile));
            let eu = load_tile(s, r.add(EU * tile));
            let mut y = load_tile(s, r.add(Y * tile));
            for n in 0..STATES {
                let (k, q) = (s.splat(*k.add(n)), s.splat(*k.add(states + n)));
                for v in 0..VECTORS {
                    let rho = s.fnma(s.mul(e[v], k), h[n][v], eu[v]);
                    h[n][v] = s.fma(k, rho, h[n][v]);
                    y[v] = s.fma(q, h[n][v], y[v]);
                }
            }
            store_tile(s, r.add(Y * tile), y);
        }
        store_states(s, state, h);
    }
}

/// [`advance`] in the backward pass: also keeps `ρ` and adds to `dq`, whose lanes are in `sums` `[rows, 2, STATES,
/// LANES]` (the first half of a row).
///
/// # Safety
/// As for [`advance`], with records of `BACKWARD_FIELDS`, `rho` of `[rows, STATES, tile]` and `sums` as above.
#[inline(always)]
#[allow(clippy::too_many_arguments)]
unsafe fn recompute<S: Simd>(
    s: S,
    rows: usize,
    kq: *const f32,
    states: usize,
    records: *mut f32,
    mut h: [[S::F; VECTORS]; STATES],
    rhos: *mut f32,
    sums: *mut f32,
) {
    let tile = VECTORS * S::LANES;
    // SAFETY: all offsets lie within what the caller promises.
    unsafe {
        for t in 0..rows {
            let (k, r) = (kq.add(t * 2 * states), records.add(t * BACKWARD_FIELDS * tile));
            let (rhos, dq) = (rhos.add(t * STATES * tile), sums.add(t * 2 * STATES * S::LANES));
            let e = load_tile(s, r.add(E * tile));
            let eu = load_tile(s, r.add(EU * tile));
            let dy = load_tile(s, r.add(DY * tile));
            let mut y = load_tile(s, r.add(Y * tile));
            for n in 0..STATES {
                let (k, q) = (s.splat(*k.add(n)), s.splat(*k.add(states + n)));
                let mut sum = s.load_ptr(dq.add(n * S::LANES));
                for v in 0..VECTORS {
                    let rho = s.fnma(s.mul(e[v], k), h[n][v], eu[v]);
                    s.store_ptr(rhos.add(n * tile + v * S::LANES), rho);
                    h[n][v] = s.fma(k, rho, h[n][v]);
                    y[v] = s.fma(q, h[n][v], y[v]);
                    sum = s.fma(dy[v], h[n][v], sum);
                }
                s.store_ptr(dq.add(n * S::LANES), sum);
            }
            store_tile(s, r.add(Y * tile), y);
        }
    }
}

/// The adjoint recurrence over a chunk, from the last row to the first: adds to `S` and `M` of the records and
/// to `dk`, whose lanes are in the second half of a row of `sums`.
///
/// # Safety
/// As for [`recompute`], with `adjoint` of `[STATES, tile]`.
#[inline(always)]
#[allow(clippy::too_many_arguments)]
unsafe fn retreat<S: Simd>(
    s: S,
    rows: usize,
    kq: *const f32,
    states: usize,
    records: *mut f32,
    adjoint: *mut f32,
    rhos: *const f32,
    sums: *mut f32,
) {
    let tile = VECTORS * S::LANES;
    // SAFETY: all offsets lie within what the caller promises.
    unsafe {
        let mut lambda = load_states(s, adjoint);
        for t in (0..rows).rev() {
            let (k, r) = (kq.add(t * 2 * states), records.add(t * BACKWARD_FIELDS * tile));
            let (rhos, dk) = (rhos.add(t * STATES * tile), sums.add((t * 2 + 1) * STATES * S::LANES));
            let e = load_tile(s, r.add(E * tile));
            let eu = load_tile(s, r.add(EU * tile));
            let dy = load_tile(s, r.add(DY * tile));
            let mut s_sum = load_tile(s, r.add(S_SUM * tile));
            let mut m_sum = load_tile(s, r.add(M_SUM * tile));
            for n in 0..STATES {
                let (k, q) = (s.splat(*k.add(n)), s.splat(*k.add(states + n)));
                let mut sum = s.load_ptr(dk.add(n * S::LANES));
                for v in 0..VECTORS {
                    let rho = s.load_ptr(rhos.add(n * tile + v * S::LANES));
                    let l = s.fma(q, dy[v], lambda[n][v]);
                    let m = s.mul(k, l);
                    m_sum[v] = s.add(m_sum[v], m);
                    s_sum[v] = s.fma(m, rho, s_sum[v]);
                    sum = s.fma(l, s.sub(s.add(rho, rho), eu[v]), sum);
                    lambda[n][v] = s.fnma(k, s.mul(e[v], m), l);
                }
                s.store_ptr(dk.add(n * S::LANES), sum);
            }
            store_tile(s, r.add(S_SUM * tile), s_sum);
            store_tile(s, r.add(M_SUM * tile), m_sum);
        }
        store_states(s, adjoint, lambda);
    }
}
