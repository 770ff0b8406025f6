//! The driver of the scans with a diagonal state: [`longhorn`](super::longhorn), [`selective_scan`](super::selective_scan).
//!
//! A scan runs one recurrence per (batch element, channel, state); a [`Recurrence`] is its arithmetic, all the rest
//! is here. The vector lanes go along the channels, so what belongs to a state alone (a key, a query) is a broadcast
//! scalar, and nothing is summed across lanes in the forward pass.
//!
//! * A **task** is one batch element and a block of channels ([`Split`]). It walks through time in chunks of
//!   [`CHUNK`] rows.
//! * A chunk is **prepared** row by row, in the order in which the inputs lie in memory: the functions of one
//!   (row, channel) - sigmoid, softplus, gate - go to a *record* in scratch memory, with zeros where channels or
//!   states are missing, so that the recurrence has no special cases.
//! * The **recurrence** then runs over the chunk for tiles of [`STATES`] × [`VECTORS`] vectors of channels. That
//!   many states stay in registers on any machine, each broadcast serves two vectors, and eight independent
//!   chains hide the latency of the arithmetic. The records of a tile are consecutive in memory. As this part needs
//!   no memory beyond the caches, it prefetches the inputs of the next chunk.
//! * The chunk is **finished** row by row like it was prepared.
//!
//! The forward pass keeps only the state at the start of each chunk, `1 / CHUNK` of all states. The backward pass
//! goes through the chunks from the last to the first; for four states at a time it computes the states of the
//! chunk again, keeps what the gradient needs of them in a scratch that fits in the caches, and runs the adjoint
//! recurrence over it. The gradients of keys and queries are sums over channels: they stay in vectors until a chunk of
//! a channel block is done, and are then summed over the lanes, and at the end over the channel blocks.

use std::marker::PhantomData;
use std::ops::Range;

use super::simd::{Simd, SimdKernel, dispatch};
use super::threads::{parallel_for, parallel_ranges, with_scratch};
use crate::rows::SharedSlice;
use crate::{Rows, RowsMut};

/// Rows of a chunk: the distance of the states that the forward pass keeps for the backward pass.
pub const CHUNK: usize = 32;
/// States of a tile.
const STATES: usize = 4;
/// Vectors of channels of a tile.
const VECTORS: usize = 2;
/// Floats of a cache line, and the widest vector. Channel blocks are multiples of `VECTORS * LINE`.
const LINE: usize = 16;

/// Sizes of a scan.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Dims {
    /// Sequences, B.
    pub batch: usize,
    /// Rows of a sequence, T.
    pub time: usize,
    /// Channels, D.
    pub channels: usize,
    /// States per channel, N.
    pub state: usize,
}

impl Dims {
    /// Rows of an activation, B T.
    pub fn rows(&self) -> usize {
        self.batch * self.time
    }

    /// Elements of the state of all sequences: `[B, N, D]`.
    pub fn state_len(&self) -> usize {
        self.batch * self.state * self.channels
    }

    /// Chunks of a sequence.
    pub fn chunks(&self) -> usize {
        self.time.div_ceil(CHUNK)
    }

    /// Elements that the forward pass saves for the backward pass: the state before each chunk,
    /// `[B, chunks, N, D]`.
    pub fn boundaries_len(&self) -> usize {
        self.chunks() * self.state_len()
    }

    /// `state` rounded up to whole tiles.
    fn padded_state(&self) -> usize {
        self.state.next_multiple_of(STATES)
    }

    #[track_caller]
    fn check(&self, what: &str, shape: (usize, usize), cols: usize) {
        assert_eq!(shape, (self.rows(), cols), "{what}: rows and columns");
    }
}

/// The partition of a scan into tasks, which depends on the sizes alone.
#[derive(Clone, Copy)]
struct Split {
    /// Channels of a task.
    pub width: usize,
    /// Tasks per batch element.
    pub groups: usize,
}

impl Split {
    pub fn new(dims: &Dims) -> Self {
        // about 32 tasks (enough for many threads) of at least 2^16 elements (so that a decoding step stays on
        // one thread), whose records of a chunk fit in the second-level cache
        let rows = dims.time.clamp(1, CHUNK);
        let smallest = (1usize << 16).div_ceil((dims.time * dims.state).max(1)).max(128);
        let largest = 8192 / rows;
        let width = (dims.batch * dims.channels).div_ceil(32).max(smallest).min(largest).min(dims.channels.max(1));
        let width = width.next_multiple_of(VECTORS * LINE);
        Self { width, groups: dims.channels.div_ceil(width) }
    }

    /// Batch element, group and channels of a task.
    pub fn task(&self, dims: &Dims, task: usize) -> (usize, usize, std::ops::Range<usize>) {
        let (batch, group) = (task / self.groups, task % self.groups);
        (batch, group, group * self.width..((group + 1) * self.width).min(dims.channels))
    }
}

/// The arithmetic of a scan. `h = decay h + input` per state, where both come from two functions of a channel
/// (`first`, `second`), a scalar of the state (`k`) and, for some scans, a rate per channel and state.
pub(super) trait Recurrence: Copy + Send + Sync {
    /// Whether there are rates.
    const RATES: bool;
    /// Whether `prepare` needs `|k|²`.
    const SQUARES: bool;
    /// Vectors that `update` keeps for `adjoint`: 1 or 2.
    const KEPT: usize;

    /// `first`, `second` and a `slope` for `gradients`, from the step size with its bias, the input and `|k|²`.
    fn prepare<S: Simd>(s: S, step: S::F, u: S::F, squares: S::F) -> [S::F; 3];

    /// The next state, and what to keep; `forward` is `first` and `second`.
    fn update<S: Simd>(s: S, forward: [S::F; 2], k: S::F, rate: S::F, h: S::F) -> (S::F, [S::F; 2]);

    /// From the gradient `lambda` of a state to that of the state before; adds to the sums.
    fn adjoint<S: Simd>(
        s: S,
        forward: [S::F; 2],
        k: S::F,
        rate: S::F,
        kept: [S::F; 2],
        lambda: S::F,
        sums: &mut Sums<S>,
    ) -> S::F;

    /// Gradients of `u` (but for the skip connection), of the step size, and of `|k|²`, from what `prepare` returned
    /// and the sums over the states.
    fn gradients<S: Simd>(s: S, prepared: [S::F; 3], u: S::F, sums: [S::F; 2]) -> [S::F; 3];
}

/// What [`Recurrence::adjoint`] adds to.
pub(super) struct Sums<S: Simd> {
    /// Two sums over the states of a channel.
    pub channel: [S::F; 2],
    /// Gradient of `k`, over channels.
    pub k: S::F,
    /// Gradient of the rate, over time.
    pub rate: S::F,
}

/// Inputs of a scan: of a call, or of one task.
#[derive(Clone, Copy)]
pub(super) struct Inputs<'a> {
    pub u: Rows<'a>,
    pub step: Rows<'a>,
    pub q: Rows<'a>,
    pub k: Rows<'a>,
    pub bias: Option<&'a [f32]>,
    pub skip: Option<&'a [f32]>,
    pub gate: Option<Rows<'a>>,
    /// `[N, D]`
    pub rates: Option<Rows<'a>>,
}

/// Gradients of a scan; see [`Inputs`].
pub(super) struct Gradients<'a> {
    pub u: RowsMut<'a>,
    pub step: RowsMut<'a>,
    pub q: RowsMut<'a>,
    pub k: RowsMut<'a>,
    pub bias: Option<&'a mut [f32]>,
    pub skip: Option<&'a mut [f32]>,
    pub gate: Option<RowsMut<'a>>,
    /// `[D, N]`; what is given for the rates is multiplied by `rate * rate_scale`.
    pub rates: Option<&'a mut [f32]>,
    pub rate_scale: f32,
}

impl<'a> Inputs<'a> {
    fn check(&self, dims: &Dims) {
        dims.check("u", (self.u.rows(), self.u.cols()), dims.channels);
        dims.check("step size", (self.step.rows(), self.step.cols()), dims.channels);
        dims.check("query", (self.q.rows(), self.q.cols()), dims.state);
        dims.check("key", (self.k.rows(), self.k.cols()), dims.state);
        if let Some(gate) = self.gate {
            dims.check("gate", (gate.rows(), gate.cols()), dims.channels);
        }
        for parameter in [self.bias, self.skip].into_iter().flatten() {
            assert_eq!(parameter.len(), dims.channels, "parameter per channel");
        }
    }

    /// What a task reads: one sequence, some channels.
    fn block(&self, rows: Range<usize>, channels: Range<usize>) -> Inputs<'a> {
        let columns = |x: Rows<'a>| x.slice_cols(channels.start, channels.end);
        let sequence = |x: Rows<'a>| x.slice_rows(rows.start, rows.end);
        Inputs {
            u: columns(sequence(self.u)),
            step: columns(sequence(self.step)),
            q: sequence(self.q),
            k: sequence(self.k),
            bias: self.bias.map(|x| &x[channels.clone()]),
            skip: self.skip.map(|x| &x[channels.clone()]),
            gate: self.gate.map(|x| columns(sequence(x))),
            rates: self.rates.map(columns),
        }
    }
}

/// The forward pass; see [`longhorn::forward`](super::longhorn::forward).
pub(super) fn forward<R: Recurrence>(
    dims: Dims,
    inputs: &Inputs<'_>,
    y: RowsMut<'_>,
    state: Option<&mut [f32]>,
    boundaries: Option<&mut [f32]>,
) {
    inputs.check(&dims);
    dims.check("y", (y.rows(), y.cols()), dims.channels);
    let split = Split::new(&dims);
    let (n, d, c) = (dims.state, dims.channels, dims.chunks() * dims.state);
    let state = state.map(|x| {
        assert_eq!(x.len(), dims.state_len(), "state");
        RowsMut::new(x, dims.batch * n, d, d)
    });
    let boundaries = boundaries.map(|x| {
        assert_eq!(x.len(), dims.boundaries_len(), "boundaries");
        RowsMut::new(x, dims.batch * c, d, d)
    });
    parallel_for(dims.batch * split.groups, |task| {
        let (b, _, channels) = split.task(&dims, task);
        let rows = b * dims.time..(b + 1) * dims.time;
        with_scratch(forward_scratch(&dims, split.width), |scratch| {
            // SAFETY: tasks differ in the sequence or in the channels.
            let (y, state, boundaries) = unsafe {
                (
                    y.shared_block(rows.clone(), channels.clone()),
                    state.as_ref().map(|x| x.shared_block(b * n..(b + 1) * n, channels.clone())),
                    boundaries.as_ref().map(|x| x.shared_block(b * c..(b + 1) * c, channels.clone())),
                )
            };
            let inputs = inputs.block(rows, channels);
            let recurrence = PhantomData::<R>;
            dispatch(ForwardTask { recurrence, dims, width: split.width, inputs, y, state, boundaries, scratch });
        });
    });
}

/// The backward pass; see [`longhorn::backward`](super::longhorn::backward).
pub(super) fn backward<R: Recurrence>(
    dims: Dims,
    inputs: &Inputs<'_>,
    dy: Rows<'_>,
    boundaries: &[f32],
    gradients: Gradients<'_>,
) {
    inputs.check(&dims);
    let g = gradients;
    dims.check("gradient of y", (dy.rows(), dy.cols()), dims.channels);
    dims.check("gradient of u", (g.u.rows(), g.u.cols()), dims.channels);
    dims.check("gradient of the step size", (g.step.rows(), g.step.cols()), dims.channels);
    dims.check("gradient of the query", (g.q.rows(), g.q.cols()), dims.state);
    dims.check("gradient of the key", (g.k.rows(), g.k.cols()), dims.state);
    assert_eq!(g.gate.is_some(), inputs.gate.is_some(), "a gradient for the gate exactly if there is one");
    if let Some(gate) = &g.gate {
        dims.check("gradient of the gate", (gate.rows(), gate.cols()), dims.channels);
    }
    assert_eq!(boundaries.len(), dims.boundaries_len(), "boundaries");
    let split = Split::new(&dims);
    let (n, d, c) = (dims.state, dims.channels, dims.chunks() * dims.state);
    let boundaries = Rows::new(boundaries, dims.batch * c, d, d);
    let per_channel = if R::RATES { 2 + n } else { 2 };
    let (pair_len, channel_len) = (split.groups * dims.rows() * 2 * n, dims.batch * per_channel * d);
    with_scratch(pair_len + channel_len, |partial| {
        let (pairs, channel_sums) = partial.split_at_mut(pair_len);
        let shared_pairs = RowsMut::new(pairs, split.groups * dims.rows(), 2 * n, 2 * n);
        let shared_sums = RowsMut::new(channel_sums, dims.batch * per_channel, d, d);
        parallel_for(dims.batch * split.groups, |task| {
            let (b, group, channels) = split.task(&dims, task);
            let rows = b * dims.time..(b + 1) * dims.time;
            let first = group * dims.rows();
            with_scratch(backward_scratch::<R>(&dims, split.width), |scratch| {
                // SAFETY: tasks differ in the sequence or in the channels, and so in the group.
                let out = unsafe {
                    TaskGradients {
                        u: g.u.shared_block(rows.clone(), channels.clone()),
                        step: g.step.shared_block(rows.clone(), channels.clone()),
                        gate: g.gate.as_ref().map(|x| x.shared_block(rows.clone(), channels.clone())),
                        pairs: shared_pairs.shared_block(first + rows.start..first + rows.end, 0..2 * n),
                        sums: shared_sums.shared_block(b * per_channel..(b + 1) * per_channel, channels.clone()),
                    }
                };
                let boundaries = boundaries.slice_rows(b * c, (b + 1) * c).slice_cols(channels.start, channels.end);
                let dy = dy.slice_rows(rows.start, rows.end).slice_cols(channels.start, channels.end);
                let (width, recurrence) = (split.width, PhantomData::<R>);
                let inputs = inputs.block(rows, channels);
                dispatch(BackwardTask { recurrence, dims, width, inputs, dy, boundaries, out, scratch });
            });
        });
        reduce_pair(pairs, split.groups, g.q, g.k);
        for (field, to) in [g.bias, g.skip].into_iter().enumerate() {
            if let Some(to) = to {
                assert_eq!(to.len(), d, "parameter per channel");
                reduce_batch(channel_sums, per_channel, field, to);
            }
        }
        if let (Some(to), Some(rates)) = (g.rates, inputs.rates) {
            assert_eq!(to.len(), d * n, "rates");
            reduce_rates(channel_sums, rates, g.rate_scale, to);
        }
    });
}

/// What a task of the backward pass writes: blocks of the gradients, and partial sums.
struct TaskGradients<'a> {
    u: RowsMut<'a>,
    step: RowsMut<'a>,
    gate: Option<RowsMut<'a>>,
    /// Gradients of query and key over the channels of the task, `[T, 2 N]`.
    pairs: RowsMut<'a>,
    /// Gradients of bias, skip connection and rates over the sequence of the task, `[2 + N, channels]`.
    sums: RowsMut<'a>,
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

fn forward_scratch(dims: &Dims, width: usize) -> usize {
    let states = dims.padded_state();
    Carve::len(&[2 * states * CHUNK, FORWARD_FIELDS * width * CHUNK, states * width, states * width, width, width])
}

fn backward_scratch<R: Recurrence>(dims: &Dims, width: usize) -> usize {
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
struct ForwardTask<'a, R> {
    recurrence: PhantomData<R>,
    dims: Dims,
    width: usize,
    inputs: Inputs<'a>,
    y: RowsMut<'a>,
    state: Option<RowsMut<'a>>,
    boundaries: Option<RowsMut<'a>>,
    scratch: &'a mut [f32],
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
            let ahead = [Some(inputs.u), Some(inputs.step), inputs.gate, None];
            for v in (0..vectors).step_by(VECTORS) {
                for n in (0..states).step_by(STATES) {
                    let ahead = Ahead::new(ahead[n / STATES % 4], end, v * S::LANES);
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
struct BackwardTask<'a, R> {
    recurrence: PhantomData<R>,
    dims: Dims,
    width: usize,
    inputs: Inputs<'a>,
    dy: Rows<'a>,
    boundaries: Rows<'a>,
    out: TaskGradients<'a>,
    scratch: &'a mut [f32],
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
            let ahead = [Some(inputs.u), Some(inputs.step), inputs.gate, Some(dy)];
            for n in (0..states).step_by(STATES) {
                let sums = &mut sums[..rows * 2 * STATES * S::LANES];
                sums.fill(0.0);
                for v in (0..vectors).step_by(VECTORS) {
                    let h = gather_states(s, boundary, n, v);
                    let ahead = Ahead::new(ahead[n / STATES % 4], start.saturating_sub(CHUNK), v * S::LANES);
                    let at = state_at::<S>(states, n, v);
                    // SAFETY: all of these have room for `rows` rows of `states`, of `width`, or of a tile.
                    unsafe {
                        let r = records.add(record::<S>(FIELDS, 0, v));
                        let (kq, rates) = (kq.as_ptr().add(n), rates.as_ptr().add(at));
                        recompute::<S, R>(s, rows, kq, states, r, rates, h, kept, sums.as_mut_ptr(), ahead);
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

/// An input at the first row of the next chunk and the first channel of a tile, to prefetch it row by row.
#[derive(Clone, Copy)]
struct Ahead {
    from: *const f32,
    stride: usize,
}

impl Ahead {
    #[inline(always)]
    fn new(input: Option<Rows<'_>>, row: usize, channel: usize) -> Self {
        match input {
            Some(x) => Self { from: x.as_ptr().wrapping_add(row * x.stride() + channel), stride: x.stride() },
            None => Self { from: std::ptr::null(), stride: 0 },
        }
    }

    /// Asks for row `t`, which need not exist.
    #[inline(always)]
    fn row<S: Simd>(self, t: usize) {
        #[cfg(target_arch = "x86_64")]
        if self.stride != 0 {
            use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
            for line in 0..(VECTORS * S::LANES).div_ceil(LINE) {
                let at = self.from.wrapping_add(t * self.stride + line * LINE);
                // SAFETY: a prefetch has no effect but on the cache; any address is allowed.
                unsafe { _mm_prefetch::<_MM_HINT_T1>(at.cast()) };
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
    ahead: Ahead,
) {
    let tile = VECTORS * S::LANES;
    // SAFETY: all offsets lie within what the caller promises.
    unsafe {
        for t in 0..rows {
            let (k, r) = (kq.add(t * 2 * states), records.add(t * BACKWARD_FIELDS * tile));
            let (kept, dq) = (kept.add(t * STATES * R::KEPT * tile), sums.add(t * 2 * STATES * S::LANES));
            ahead.row::<S>(t);
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

/// Splits scratch memory into parts that start at cache lines.
struct Carve<'a>(&'a mut [f32]);

impl<'a> Carve<'a> {
    pub fn new(memory: &'a mut [f32]) -> Self {
        let skip = memory.as_ptr().align_offset(LINE * 4).min(memory.len());
        Self(&mut memory[skip..])
    }

    /// What [`take`](Self::take) of these lengths needs in total.
    pub fn len(parts: &[usize]) -> usize {
        parts.iter().map(|n| n.next_multiple_of(LINE)).sum::<usize>() + LINE
    }

    pub fn take(&mut self, len: usize) -> &'a mut [f32] {
        let (part, rest) = std::mem::take(&mut self.0).split_at_mut(len.next_multiple_of(LINE));
        self.0 = rest;
        &mut part[..len]
    }
}

/// The first `lanes` floats at `from`, and zeros. With the constant `S::LANES` it is a plain load.
///
/// # Safety
/// `from` must be valid for `lanes` reads.
#[inline(always)]
unsafe fn load_lanes<S: Simd>(s: S, from: *const f32, lanes: usize) -> S::F {
    // SAFETY: the caller's promise.
    unsafe {
        if lanes == S::LANES {
            s.load_ptr(from)
        } else {
            s.load_partial(std::slice::from_raw_parts(from, lanes), lanes)
        }
    }
}

/// Writes the first `lanes` lanes.
///
/// # Safety
/// `to` must be valid for `lanes` writes.
#[inline(always)]
unsafe fn store_lanes<S: Simd>(s: S, to: *mut f32, lanes: usize, v: S::F) {
    // SAFETY: the caller's promise.
    unsafe {
        if lanes == S::LANES {
            s.store_ptr(to, v);
        } else {
            s.store_partial(std::slice::from_raw_parts_mut(to, lanes), lanes, v);
        }
    }
}

/// `to += v`
///
/// # Safety
/// `to` must be valid for `S::LANES` reads and writes.
#[inline(always)]
unsafe fn accumulate<S: Simd>(s: S, to: *mut f32, v: S::F) {
    // SAFETY: the caller's promise.
    unsafe { s.store_ptr(to, s.add(s.load_ptr(to), v)) }
}

/// The vectors of a tile at `from`.
///
/// # Safety
/// `from` must be valid for `VECTORS * S::LANES` reads.
#[inline(always)]
unsafe fn load_tile<S: Simd>(s: S, from: *const f32) -> [S::F; VECTORS] {
    let mut tile = [s.zero(); VECTORS];
    for (v, x) in tile.iter_mut().enumerate() {
        // SAFETY: the caller's promise.
        *x = unsafe { s.load_ptr(from.add(v * S::LANES)) };
    }
    tile
}

/// Writes the vectors of a tile to `to`.
///
/// # Safety
/// `to` must be valid for `VECTORS * S::LANES` writes.
#[inline(always)]
unsafe fn store_tile<S: Simd>(s: S, to: *mut f32, tile: [S::F; VECTORS]) {
    for (v, &x) in tile.iter().enumerate() {
        // SAFETY: the caller's promise.
        unsafe { s.store_ptr(to.add(v * S::LANES), x) };
    }
}

/// A tile of states at `from` (`[STATES, VECTORS, LANES]`).
///
/// # Safety
/// `from` must be valid for `STATES * VECTORS * S::LANES` reads.
#[inline(always)]
unsafe fn load_states<S: Simd>(s: S, from: *const f32) -> [[S::F; VECTORS]; STATES] {
    let mut states = [[s.zero(); VECTORS]; STATES];
    for (n, x) in states.iter_mut().enumerate() {
        // SAFETY: the caller's promise.
        *x = unsafe { load_tile(s, from.add(n * VECTORS * S::LANES)) };
    }
    states
}

/// The reverse of [`load_states`].
///
/// # Safety
/// `to` must be valid for `STATES * VECTORS * S::LANES` writes.
#[inline(always)]
unsafe fn store_states<S: Simd>(s: S, to: *mut f32, states: [[S::F; VECTORS]; STATES]) {
    for (n, &x) in states.iter().enumerate() {
        // SAFETY: the caller's promise.
        unsafe { store_tile(s, to.add(n * VECTORS * S::LANES), x) };
    }
}

/// States `n..` of vectors `v..` of `[N, channels]`, with zeros for missing states and channels.
#[inline(always)]
fn gather_states<S: Simd>(s: S, from: Rows<'_>, n: usize, v: usize) -> [[S::F; VECTORS]; STATES] {
    let mut states = [[s.zero(); VECTORS]; STATES];
    for (j, x) in states.iter_mut().enumerate() {
        if n + j < from.rows() {
            let row = from.row(n + j);
            for (w, x) in x.iter_mut().enumerate() {
                *x = load(s, row, (v + w) * S::LANES);
            }
        }
    }
    states
}

/// Lanes of vector `v` that belong to one of the `channels`.
#[inline(always)]
fn lanes_of<S: Simd>(channels: usize, v: usize) -> usize {
    channels.saturating_sub(v * S::LANES).min(S::LANES)
}

/// `2^x` for `x <= 127`; at least `2^-126`.
///
/// The scans raise `e` to negative powers `N` times per channel and row, so this one leaves out what such powers
/// do not need (large results, subnormal ones) and takes the factor `log2 e` from its caller, who has a constant to
/// fold it into. The relative error is below 2e-7.
#[inline(always)]
pub(super) fn exp2<S: Simd>(s: S, x: S::F) -> S::F {
    // `max` returns its second argument on NaN, which then stays NaN
    let x = s.max(s.splat(-126.0), x);
    // the sum holds the nearest integer of x in its low bits, which the shift moves to the exponent
    let magic = s.splat(12_582_912.0);
    let shifted = s.add(x, magic);
    let r = s.sub(x, s.sub(shifted, magic));
    // relative minimax of 2^r on [-1/2, 1/2] with 2^0 = 1
    let mut p = s.splat(1.326_472_7e-3);
    #[allow(clippy::approx_constant)] // it is not ln 2, nor meant to be
    let rest = [9.671_513e-3, 5.550_733_6e-2, 0.240_222_42, 0.693_147, 1.0];
    for c in rest {
        p = s.fma(p, r, s.splat(c));
    }
    s.from_bits(s.add_i(s.bits(p), s.shl::<23>(s.bits(shifted))))
}

/// `e^-x`, between `2^-126` and `2^126`.
#[inline(always)]
pub(super) fn exp_neg<S: Simd>(s: S, x: S::F) -> S::F {
    exp2(s, s.min(s.splat(126.0), s.mul(x, s.splat(-std::f32::consts::LOG2_E))))
}

/// `1 / (1 + e^-x)`
#[inline(always)]
fn sigmoid<S: Simd>(s: S, x: S::F) -> S::F {
    let one = s.splat(1.0);
    s.div(one, s.add(one, exp_neg(s, x)))
}

/// `log(1 + e^x)` and its derivative `1 / (1 + e^-x)`, which share their exponential.
#[inline(always)]
pub(super) fn softplus_and_sigmoid<S: Simd>(s: S, x: S::F) -> (S::F, S::F) {
    let (zero, one) = (s.zero(), s.splat(1.0));
    let power = exp2(s, s.mul(s.abs(x), s.splat(-std::f32::consts::LOG2_E)));
    // log(1 + p) = 2 atanh(z), z = p / (2 + p) <= 1/3
    let z = s.div(power, s.add(power, s.splat(2.0)));
    let squared = s.mul(z, z);
    let mut p = s.splat(0.280_122_07);
    for c in [0.280_017_64, 0.400_215_3, 0.666_664_2, 2.0] {
        p = s.fma(p, squared, s.splat(c));
    }
    // `max` returns its second argument on NaN
    let softplus = s.fma(z, p, s.max(zero, x));
    (softplus, s.div(s.select(s.lt(x, zero), power, one), s.add(one, power)))
}

/// The vector at `row[i..]`, with zeros past the end.
#[inline(always)]
fn load<S: Simd>(s: S, row: &[f32], i: usize) -> S::F {
    if i + S::LANES <= row.len() {
        s.load(&row[i..])
    } else if i < row.len() {
        s.load_partial(&row[i..], row.len() - i)
    } else {
        s.zero()
    }
}

/// Writes the vector to `row[i..]`, up to the end.
#[inline(always)]
fn store<S: Simd>(s: S, row: &mut [f32], i: usize, v: S::F) {
    if i + S::LANES <= row.len() {
        s.store(&mut row[i..], v);
    } else if i < row.len() {
        let n = row.len() - i;
        s.store_partial(&mut row[i..], n, v);
    }
}

/// Where vector `v` of the channels has its record of `fields` vectors for row `t` of a chunk: field `f` is at
/// the result plus `f * VECTORS * LANES`.
#[inline(always)]
fn record<S: Simd>(fields: usize, t: usize, v: usize) -> usize {
    (((v / VECTORS) * CHUNK + t) * fields * VECTORS + v % VECTORS) * S::LANES
}

/// Where state `n` of vector `v` of the channels is in a task's array of `states` per channel.
#[inline(always)]
fn state_at<S: Simd>(states: usize, n: usize, v: usize) -> usize {
    (((v / VECTORS) * states + n) * VECTORS + v % VECTORS) * S::LANES
}

/// Copies `[N, channels]` into a task's array of states, with zeros for missing states and channels.
#[inline(always)]
fn pack_states<S: Simd>(s: S, from: Rows<'_>, to: &mut [f32], states: usize, width: usize) {
    for n in 0..states {
        let row = if n < from.rows() { from.row(n) } else { &[] };
        for v in 0..width / S::LANES {
            s.store(&mut to[state_at::<S>(states, n, v)..], load(s, row, v * S::LANES));
        }
    }
}

/// Copies a parameter of some channels to `to`, with zeros for missing channels, or all zeros.
fn pack_channels(from: Option<&[f32]>, to: &mut [f32]) {
    let from = from.unwrap_or_default();
    to[..from.len()].copy_from_slice(from);
    to[from.len()..].fill(0.0);
}

/// The reverse of [`pack_states`].
#[inline(always)]
fn unpack_states<S: Simd>(s: S, from: &[f32], mut to: RowsMut<'_>, states: usize, width: usize) {
    for n in 0..to.rows() {
        let row = to.row(n);
        for v in 0..width / S::LANES {
            store(s, row, v * S::LANES, s.load(&from[state_at::<S>(states, n, v)..]));
        }
    }
}

/// Copies rows of `a` and `b` side by side into `to` `[rows, 2, states]`, with zeros for missing states.
fn pack_pair(a: Rows<'_>, b: Rows<'_>, to: &mut [f32], states: usize) {
    for (t, pair) in to.chunks_exact_mut(2 * states).take(a.rows()).enumerate() {
        for (to, from) in pair.chunks_exact_mut(states).zip([a.row(t), b.row(t)]) {
            to[..from.len()].copy_from_slice(from);
            to[from.len()..].fill(0.0);
        }
    }
}

/// `a[r]` and `b[r]` as the sums over the groups of the two halves of `partial` `[groups, rows, 2 N]`.
fn reduce_pair(partial: &[f32], groups: usize, a: RowsMut<'_>, b: RowsMut<'_>) {
    let (rows, states) = (a.rows(), a.cols());
    parallel_ranges(rows, 256, |range| {
        for r in range {
            // SAFETY: a row belongs to one task.
            let pair = unsafe { [a.shared_row(r), b.shared_row(r)] };
            for (half, to) in pair.into_iter().enumerate() {
                for g in 0..groups {
                    let from = &partial[((g * rows + r) * 2 + half) * states..][..states];
                    if g == 0 {
                        to.copy_from_slice(from);
                    } else {
                        to.iter_mut().zip(from).for_each(|(to, x)| *to += x);
                    }
                }
            }
        }
    });
}

/// `to[d] =` the sum over the batch of `partial[b, field, d]`, for `partial` `[B, fields, D]`.
fn reduce_batch(partial: &[f32], fields: usize, field: usize, to: &mut [f32]) {
    to.fill(0.0);
    for from in partial.chunks_exact((fields * to.len()).max(1)) {
        let from = &from[field * to.len()..][..to.len()];
        to.iter_mut().zip(from).for_each(|(to, x)| *to += x);
    }
}

/// `to[d, n] = scale * rates[n, d] *` the sum over the batch of `partial[b, 2 + n, d]`.
fn reduce_rates(partial: &[f32], rates: Rows<'_>, scale: f32, to: &mut [f32]) {
    let (n, d) = (rates.rows(), rates.cols());
    let to = SharedSlice::new(to);
    parallel_ranges(d, 64, |range| {
        // SAFETY: a channel belongs to one task.
        let to = unsafe { to.range(range.start * n..range.end * n) };
        to.fill(0.0);
        for sequence in partial.chunks_exact(((2 + n) * d).max(1)) {
            for j in 0..n {
                let from = &sequence[(2 + j) * d..][range.clone()];
                from.iter().zip(to[j..].iter_mut().step_by(n)).for_each(|(x, to)| *to += x);
            }
        }
        for j in 0..n {
            let rates = &rates.row(j)[range.clone()];
            rates.iter().zip(to[j..].iter_mut().step_by(n)).for_each(|(rate, to)| *to *= scale * rate);
        }
    });
}
