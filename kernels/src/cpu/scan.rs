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
//!   chains hide the latency of the arithmetic. The records of a tile are consecutive in memory. In the forward pass it also
//!   prefetches the inputs of the next chunk, as it needs no memory beyond the caches itself.
//! * The chunk is **finished** row by row like it was prepared.
//!
//! The forward pass keeps only the state at the start of each chunk, `1 / CHUNK` of all states. The backward pass
//! goes through the chunks from the last to the first; for four states at a time it computes the states of the
//! chunk again, keeps what the gradient needs of them in a scratch that fits in the caches, and runs the adjoint
//! recurrence over it. The gradients of keys and queries are sums over channels: they stay in vectors until a chunk of
//! a channel block is done, and are then summed over the lanes, and at the end over the channel blocks.

use std::marker::PhantomData;
use std::ops::Range;

use super::simd::{Simd, dispatch};
use super::threads::{parallel_for, parallel_ranges, with_scratch};
use crate::rows::SharedSlice;
use crate::{Rows, RowsMut};

mod task;
mod vectors;

use task::{BackwardTask, ForwardTask, TaskGradients, backward_scratch, forward_scratch};
pub(super) use vectors::{exp_neg, exp2, softplus_and_sigmoid};

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

/// `a[r]` and `b[r]` as the sums over the groups of the two halves of `partial` `[groups, rows, 2 N]`.
fn reduce_pair(partial: &[f32], groups: usize, a: RowsMut<'_>, b: RowsMut<'_>) {
    let (rows, states) = (a.rows(), a.cols());
    parallel_ranges(rows, 256, |range| {
        for r in range {
            // SAFETY: a row belongs to one task.
            let pair = unsafe { [a.shared_row(r), b.shared_row(r)] };
            for (half, to) in pair.into_iter().enumerate() {
                to.fill(0.0);
                for g in 0..groups {
                    let from = &partial[((g * rows + r) * 2 + half) * states..][..states];
                    to.iter_mut().zip(from).for_each(|(to, x)| *to += x);
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
