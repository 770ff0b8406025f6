//! What the scans with a diagonal state ([`longhorn`](super::longhorn), [`selective_scan`](super::selective_scan))
//! have in common: the partition of the work, the layout of a task's scratch memory, packing and reductions.
//!
//! A scan runs one recurrence per (batch element, channel, state). The vector lanes go along the channels, so
//! what belongs to a state alone (a key, a query) is a broadcast scalar, and nothing is summed across lanes in
//! the forward pass.
//!
//! * A **task** is one batch element and a block of channels ([`Split`]). It walks through time in chunks of
//!   [`CHUNK`] rows.
//! * A chunk is **prepared** row by row, in the order in which the inputs lie in memory: the functions of one
//!   (row, channel) - sigmoid, softplus, gate - go to a *record* in scratch memory, with zeros where channels or
//!   states are missing, so that the recurrence has no special cases.
//! * The **recurrence** then runs over the chunk for tiles of [`STATES`] × [`VECTORS`] vectors of channels. That
//!   many states stay in registers on any machine, each broadcast serves two vectors, and eight independent
//!   chains hide the latency of the arithmetic. The records of a tile are consecutive in memory.
//! * The chunk is **finished** row by row like it was prepared.
//!
//! The forward pass keeps only the state at the start of each chunk, `1 / CHUNK` of all states. The backward pass
//! goes through the chunks from the last to the first; for four states at a time it computes the states of the
//! chunk again, into a scratch of a few kilobytes, and runs the adjoint recurrence over them.

use super::simd::Simd;
use crate::{Rows, RowsMut};

/// Rows of a chunk: the distance of the states that the forward pass keeps for the backward pass.
pub const CHUNK: usize = 32;
/// States of a tile.
pub(super) const STATES: usize = 4;
/// Vectors of channels of a tile.
pub(super) const VECTORS: usize = 2;
/// Floats of a cache line, and the widest vector. Channel blocks are multiples of `VECTORS * LINE`.
pub(super) const LINE: usize = 16;

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
    pub(super) fn padded_state(&self) -> usize {
        self.state.next_multiple_of(STATES)
    }

    #[track_caller]
    pub(super) fn check(&self, what: &str, shape: (usize, usize), cols: usize) {
        assert_eq!(shape, (self.rows(), cols), "{what}: rows and columns");
    }
}

/// The partition of a scan into tasks, which depends on the sizes alone.
#[derive(Clone, Copy)]
pub(super) struct Split {
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

/// Splits scratch memory into parts that start at cache lines.
pub(super) struct Carve<'a>(&'a mut [f32]);

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
pub(super) unsafe fn load_lanes<S: Simd>(s: S, from: *const f32, lanes: usize) -> S::F {
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
pub(super) unsafe fn store_lanes<S: Simd>(s: S, to: *mut f32, lanes: usize, v: S::F) {
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
pub(super) unsafe fn accumulate<S: Simd>(s: S, to: *mut f32, v: S::F) {
    // SAFETY: the caller's promise.
    unsafe { s.store_ptr(to, s.add(s.load_ptr(to), v)) }
}

/// The vectors of a tile at `from`.
///
/// # Safety
/// `from` must be valid for `VECTORS * S::LANES` reads.
#[inline(always)]
pub(super) unsafe fn load_tile<S: Simd>(s: S, from: *const f32) -> [S::F; VECTORS] {
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
pub(super) unsafe fn store_tile<S: Simd>(s: S, to: *mut f32, tile: [S::F; VECTORS]) {
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
pub(super) unsafe fn load_states<S: Simd>(s: S, from: *const f32) -> [[S::F; VECTORS]; STATES] {
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
pub(super) unsafe fn store_states<S: Simd>(s: S, to: *mut f32, states: [[S::F; VECTORS]; STATES]) {
    for (n, &x) in states.iter().enumerate() {
        // SAFETY: the caller's promise.
        unsafe { store_tile(s, to.add(n * VECTORS * S::LANES), x) };
    }
}

/// States `n..` of vectors `v..` of `[N, channels]`, with zeros for missing states and channels.
#[inline(always)]
pub(super) fn gather_states<S: Simd>(s: S, from: Rows<'_>, n: usize, v: usize) -> [[S::F; VECTORS]; STATES] {
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
pub(super) fn lanes_of<S: Simd>(channels: usize, v: usize) -> usize {
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
    for c in [9.671_513e-3, 5.550_733_6e-2, 0.240_222_42, 0.693_147, 1.0] {
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
pub(super) fn sigmoid<S: Simd>(s: S, x: S::F) -> S::F {
    let one = s.splat(1.0);
    s.div(one, s.add(one, exp_neg(s, x)))
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
pub(super) fn record<S: Simd>(fields: usize, t: usize, v: usize) -> usize {
    (((v / VECTORS) * CHUNK + t) * fields * VECTORS + v % VECTORS) * S::LANES
}

/// Where state `n` of vector `v` of the channels is in a task's array of `states` per channel.
#[inline(always)]
pub(super) fn state_at<S: Simd>(states: usize, n: usize, v: usize) -> usize {
    (((v / VECTORS) * states + n) * VECTORS + v % VECTORS) * S::LANES
}

/// Copies `[N, channels]` into a task's array of states, with zeros for missing states and channels.
#[inline(always)]
pub(super) fn pack_states<S: Simd>(s: S, from: Rows<'_>, to: &mut [f32], states: usize, width: usize) {
    for n in 0..states {
        let row = if n < from.rows() { from.row(n) } else { &[] };
        for v in 0..width / S::LANES {
            s.store(&mut to[state_at::<S>(states, n, v)..], load(s, row, v * S::LANES));
        }
    }
}

/// Copies a parameter of some channels to `to`, with zeros for missing channels, or all zeros.
pub(super) fn pack_channels(from: Option<&[f32]>, to: &mut [f32]) {
    let from = from.unwrap_or_default();
    to[..from.len()].copy_from_slice(from);
    to[from.len()..].fill(0.0);
}

/// The reverse of [`pack_states`].
#[inline(always)]
pub(super) fn unpack_states<S: Simd>(s: S, from: &[f32], mut to: RowsMut<'_>, states: usize, width: usize) {
    for n in 0..to.rows() {
        let row = to.row(n);
        for v in 0..width / S::LANES {
            store(s, row, v * S::LANES, s.load(&from[state_at::<S>(states, n, v)..]));
        }
    }
}

/// Copies rows of `a` and `b` side by side into `to` `[rows, 2, states]`, with zeros for missing states.
pub(super) fn pack_pair(a: Rows<'_>, b: Rows<'_>, to: &mut [f32], states: usize) {
    for (t, pair) in to.chunks_exact_mut(2 * states).take(a.rows()).enumerate() {
        for (to, from) in pair.chunks_exact_mut(states).zip([a.row(t), b.row(t)]) {
            to[..from.len()].copy_from_slice(from);
            to[from.len()..].fill(0.0);
        }
    }
}

/// `rows [r] = partial[0][r] + partial[1][r] + …` for the two halves of `partial` `[groups, rows, 2 N]`.
pub(super) fn reduce_pair(partial: &[f32], groups: usize, mut a: RowsMut<'_>, mut b: RowsMut<'_>) {
    let (rows, states) = (a.rows(), a.cols());
    for r in 0..rows {
        for (to, offset) in [(a.row(r), 0), (b.row(r), states)] {
            to.fill(0.0);
            for g in 0..groups {
                let from = &partial[(g * rows + r) * 2 * states + offset..][..states];
                to.iter_mut().zip(from).for_each(|(to, x)| *to += x);
            }
        }
    }
}

/// `to[d] =` the sum over the batch of `partial[b, field, d]`, for `partial` `[B, fields, D]`.
pub(super) fn reduce_batch(partial: &[f32], fields: usize, field: usize, to: &mut [f32]) {
    to.fill(0.0);
    for from in partial.chunks_exact((fields * to.len()).max(1)) {
        let from = &from[field * to.len()..][..to.len()];
        to.iter_mut().zip(from).for_each(|(to, x)| *to += x);
    }
}
