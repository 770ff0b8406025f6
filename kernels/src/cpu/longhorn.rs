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

use super::math;
use super::scan::{
    CHUNK, Carve, LINE, STATES, Split, VECTORS, accumulate, load, load_or_zero, pack_pair, pack_states, record,
    reduce_batch, reduce_pair, state_at, store, unpack_states,
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
        let block =
            |x: Rows<'a>| x.slice_rows(rows.start, rows.end).slice_cols(channels.start, channels.end);
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
            let boundaries =
                boundaries.slice_rows(b * c, (b + 1) * c).slice_cols(channels.start, channels.end);
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
    let rows = CHUNK;
    Carve::len(&[2 * states * rows, FORWARD_FIELDS * width * rows, states * width])
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
    ])
}

/// `e` and `exp(-dt - bias)` for a vector of channels.
#[inline(always)]
fn step_size<S: Simd>(s: S, dt: S::F, bias: S::F, squares: S::F) -> (S::F, S::F) {
    // 80 keeps the exponential finite; e is below 1e-34 from there on
    let x = s.min(s.sub(s.neg(dt), bias), s.splat(80.0));
    let exp = math::exp(s, x);
    (s.div(s.splat(1.0), s.add(s.add(s.splat(1.0), squares), exp)), exp)
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
        let vectors = width / S::LANES;
        let tile = VECTORS * S::LANES;
        let mut carve = Carve::new(scratch);
        let kq = carve.take(2 * states * CHUNK);
        let records = carve.take(FORWARD_FIELDS * width * CHUNK);
        let h = carve.take(states * width);
        match &state {
            Some(state) => pack_states(s, state.as_rows(), h, states, width),
            None => h.fill(0.0),
        }
        for (chunk, start) in (0..dims.time).step_by(CHUNK).enumerate() {
            let rows = CHUNK.min(dims.time - start);
            if let Some(boundaries) = &mut boundaries {
                let n = dims.state;
                // SAFETY: the only use of the task's own block.
                let to = unsafe { boundaries.shared_block(chunk * n..(chunk + 1) * n, 0..boundaries.cols()) };
                unpack_states(s, h, to, states, width);
            }
            let end = start + rows;
            pack_pair(inputs.k.slice_rows(start, end), inputs.q.slice_rows(start, end), kq, states);
            for t in 0..rows {
                let squares = s.splat(sum_of_squares(inputs.k.row(start + t)));
                let (u, dt) = (inputs.u.row(start + t), inputs.dt.row(start + t));
                for v in 0..vectors {
                    let i = v * S::LANES;
                    let (e, _) = step_size(s, load(s, dt, i), load_or_zero(s, inputs.t_bias, i), squares);
                    let r = &mut records[record::<S>(FORWARD_FIELDS, t, v)..];
                    s.store(&mut r[E * tile..], e);
                    s.store(&mut r[EU * tile..], s.mul(e, load(s, u, i)));
                    s.store(&mut r[Y * tile..], s.zero());
                }
            }
            for v in (0..vectors).step_by(VECTORS) {
                for n in (0..states).step_by(STATES) {
                    let h = &mut h[state_at::<S>(states, n, v)..][..STATES * tile];
                    let r = &mut records[record::<S>(FORWARD_FIELDS, 0, v)..][..rows * FORWARD_FIELDS * tile];
                    let kq = &kq[..rows * 2 * states];
                    // SAFETY: the slices have the lengths that the function asks for; n + STATES <= states.
                    unsafe { advance(s, rows, kq.as_ptr().add(n), states, r.as_mut_ptr(), h.as_mut_ptr()) };
                }
            }
            for t in 0..rows {
                let (u, y) = (inputs.u.row(start + t), y.row(start + t));
                let gate = inputs.gate.map(|z| z.row(start + t));
                for v in 0..vectors {
                    let i = v * S::LANES;
                    let r = s.load(&records[record::<S>(FORWARD_FIELDS, t, v) + Y * tile..]);
                    let r = s.fma(load_or_zero(s, inputs.skip, i), load(s, u, i), r);
                    let r = match gate {
                        Some(gate) => {
                            let z = load(s, gate, i);
                            s.mul(r, s.mul(z, math::sigmoid(s, z)))
                        }
                        None => r,
                    };
                    store(s, y, i, r);
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
        let vectors = width / S::LANES;
        let tile = VECTORS * S::LANES;
        let one = s.splat(1.0);
        let mut carve = Carve::new(scratch);
        let kq = carve.take(2 * states * CHUNK);
        let records = carve.take(FIELDS * width * CHUNK);
        let adjoint = carve.take(states * width);
        let rho = carve.take(VECTORS * CHUNK * STATES * LINE);
        let sums = carve.take(2 * CHUNK * STATES * LINE);
        let (dbias, dskip) = carve.take(2 * width).split_at_mut(width);
        adjoint.fill(0.0);
        dbias.fill(0.0);
        dskip.fill(0.0);
        for chunk in (0..dims.chunks()).rev() {
            let start = chunk * CHUNK;
            let rows = CHUNK.min(dims.time - start);
            let end = start + rows;
            pack_pair(inputs.k.slice_rows(start, end), inputs.q.slice_rows(start, end), kq, states);
            for t in 0..rows {
                let squares = s.splat(sum_of_squares(inputs.k.row(start + t)));
                let (u, dt, dy) = (inputs.u.row(start + t), inputs.dt.row(start + t), dy.row(start + t));
                let gate = inputs.gate.map(|z| z.row(start + t));
                for v in 0..vectors {
                    let i = v * S::LANES;
                    let (e, exp) = step_size(s, load(s, dt, i), load_or_zero(s, inputs.t_bias, i), squares);
                    let r = &mut records[record::<S>(FIELDS, t, v)..][..(FIELDS - 1) * tile + S::LANES];
                    s.store(&mut r[E * tile..], e);
                    s.store(&mut r[EU * tile..], s.mul(e, load(s, u, i)));
                    s.store(&mut r[SLOPE * tile..], s.mul(e, exp));
                    for field in [Y, S_SUM, M_SUM] {
                        s.store(&mut r[field * tile..], s.zero());
                    }
                    let mut dy = load(s, dy, i);
                    if let Some(gate) = gate {
                        let z = load(s, gate, i);
                        let sigmoid = math::sigmoid(s, z);
                        let slope = s.mul(sigmoid, s.fma(z, s.sub(one, sigmoid), one));
                        s.store(&mut r[GATE * tile..], s.mul(dy, slope));
                        dy = s.mul(dy, s.mul(z, sigmoid));
                    }
                    s.store(&mut r[DY * tile..], dy);
                }
            }
            for n in (0..states).step_by(STATES) {
                let sums = &mut sums[..rows * 2 * STATES * S::LANES];
                sums.fill(0.0);
                for v in (0..vectors).step_by(VECTORS) {
                    let mut h = [[s.zero(); VECTORS]; STATES];
                    for (j, h) in h.iter_mut().enumerate().take(dims.state - n) {
                        let from = boundaries.row(chunk * dims.state + n + j);
                        *h = std::array::from_fn(|w| load(s, from, (v + w) * S::LANES));
                    }
                    let r = &mut records[record::<S>(FIELDS, 0, v)..][..rows * FIELDS * tile];
                    let adjoint = &mut adjoint[state_at::<S>(states, n, v)..][..STATES * tile];
                    let rho = &mut rho[..rows * STATES * tile];
                    let kq = &kq[..rows * 2 * states];
                    // SAFETY: the slices have the lengths that the functions ask for; n + STATES <= states.
                    unsafe {
                        let kq = kq.as_ptr().add(n);
                        recompute(s, rows, kq, states, r.as_mut_ptr(), h, rho.as_mut_ptr(), sums.as_mut_ptr());
                        let adjoint = adjoint.as_mut_ptr();
                        retreat(s, rows, kq, states, r.as_mut_ptr(), adjoint, rho.as_ptr(), sums.as_mut_ptr());
                    }
                }
                for t in 0..rows {
                    let pair = out.pairs.row(start + t);
                    for j in 0..STATES.min(dims.state - n) {
                        let sum = |side: usize| s.sum(s.load(&sums[((2 * t + side) * STATES + j) * S::LANES..]));
                        pair[n + j] = sum(0);
                        pair[dims.state + n + j] = sum(1);
                    }
                }
            }
            for t in 0..rows {
                let u = inputs.u.row(start + t);
                let (du, ddt) = (out.u.row(start + t), out.dt.row(start + t));
                let mut dz = out.gate.as_mut().map(|dz| dz.row(start + t));
                let mut squares = s.zero();
                for v in 0..vectors {
                    let i = v * S::LANES;
                    let r = &records[record::<S>(FIELDS, t, v)..][..(FIELDS - 1) * tile + S::LANES];
                    let field = |f: usize| s.load(&r[f * tile..]);
                    let (u, skip) = (load(s, u, i), load_or_zero(s, inputs.skip, i));
                    let (e, dy) = (field(E), field(DY));
                    if let Some(dz) = &mut dz {
                        store(s, dz, i, s.mul(field(GATE), s.fma(skip, u, field(Y))));
                    }
                    store(s, du, i, s.fma(e, field(M_SUM), s.mul(skip, dy)));
                    let d = s.mul(field(S_SUM), field(SLOPE));
                    store(s, ddt, i, d);
                    accumulate(s, dbias, i, d);
                    accumulate(s, dskip, i, s.mul(dy, u));
                    squares = s.fma(e, field(S_SUM), squares);
                }
                let squares = 2.0 * s.sum(squares);
                let dk = &mut out.pairs.row(start + t)[dims.state..];
                dk.iter_mut().zip(inputs.k.row(start + t)).for_each(|(dk, k)| *dk -= squares * k);
            }
        }
        let channels = out.per_channel.cols();
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
unsafe fn advance<S: Simd>(
    s: S,
    rows: usize,
    kq: *const f32,
    states: usize,
    records: *mut f32,
    state: *mut f32,
) {
    let tile = VECTORS * S::LANES;
    // SAFETY: all offsets lie within what the caller promises.
    unsafe {
        let mut h: [[S::F; VECTORS]; STATES] =
            std::array::from_fn(|n| std::array::from_fn(|v| s.load_ptr(state.add(n * tile + v * S::LANES))));
        for t in 0..rows {
            let (k, r) = (kq.add(t * 2 * states), records.add(t * FORWARD_FIELDS * tile));
            let field = |f: usize, v: usize| r.add(f * tile + v * S::LANES);
            let e: [S::F; VECTORS] = std::array::from_fn(|v| s.load_ptr(field(E, v)));
            let eu: [S::F; VECTORS] = std::array::from_fn(|v| s.load_ptr(field(EU, v)));
            let mut y: [S::F; VECTORS] = std::array::from_fn(|v| s.load_ptr(field(Y, v)));
            for n in 0..STATES {
                let (k, q) = (s.splat(*k.add(n)), s.splat(*k.add(states + n)));
                for v in 0..VECTORS {
                    let rho = s.fnma(s.mul(e[v], k), h[n][v], eu[v]);
                    h[n][v] = s.fma(k, rho, h[n][v]);
                    y[v] = s.fma(q, h[n][v], y[v]);
                }
            }
            for v in 0..VECTORS {
                s.store_ptr(field(Y, v), y[v]);
            }
        }
        for n in 0..STATES {
            for v in 0..VECTORS {
                s.store_ptr(state.add(n * tile + v * S::LANES), h[n][v]);
            }
        }
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
            let field = |f: usize, v: usize| r.add(f * tile + v * S::LANES);
            let e: [S::F; VECTORS] = std::array::from_fn(|v| s.load_ptr(field(E, v)));
            let eu: [S::F; VECTORS] = std::array::from_fn(|v| s.load_ptr(field(EU, v)));
            let dy: [S::F; VECTORS] = std::array::from_fn(|v| s.load_ptr(field(DY, v)));
            let mut y: [S::F; VECTORS] = std::array::from_fn(|v| s.load_ptr(field(Y, v)));
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
            for v in 0..VECTORS {
                s.store_ptr(field(Y, v), y[v]);
            }
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
        let mut lambda: [[S::F; VECTORS]; STATES] =
            std::array::from_fn(|n| std::array::from_fn(|v| s.load_ptr(adjoint.add(n * tile + v * S::LANES))));
        for t in (0..rows).rev() {
            let (k, r) = (kq.add(t * 2 * states), records.add(t * BACKWARD_FIELDS * tile));
            let (rhos, dk) = (rhos.add(t * STATES * tile), sums.add((t * 2 + 1) * STATES * S::LANES));
            let field = |f: usize, v: usize| r.add(f * tile + v * S::LANES);
            let e: [S::F; VECTORS] = std::array::from_fn(|v| s.load_ptr(field(E, v)));
            let eu: [S::F; VECTORS] = std::array::from_fn(|v| s.load_ptr(field(EU, v)));
            let dy: [S::F; VECTORS] = std::array::from_fn(|v| s.load_ptr(field(DY, v)));
            let mut s_sum: [S::F; VECTORS] = std::array::from_fn(|v| s.load_ptr(field(S_SUM, v)));
            let mut m_sum: [S::F; VECTORS] = std::array::from_fn(|v| s.load_ptr(field(M_SUM, v)));
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
            for v in 0..VECTORS {
                s.store_ptr(field(S_SUM, v), s_sum[v]);
                s.store_ptr(field(M_SUM, v), m_sum[v]);
            }
        }
        for n in 0..STATES {
            for v in 0..VECTORS {
                s.store_ptr(adjoint.add(n * tile + v * S::LANES), lambda[n][v]);
            }
        }
    }
}
