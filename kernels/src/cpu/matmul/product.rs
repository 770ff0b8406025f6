//! Blocking and the split into tasks.
//!
//! A product takes one of these routes, by its sizes alone:
//!
//! * at most [`DOT_MOST`] rows or columns, both operands along `k`: dot products, nothing is packed ([`Product::dots`]);
//! * one row, b along its columns: a sum of rows of b ([`Product::wide`]);
//! * at most [`MC_PANELS`] panels of rows: tasks own ranges of columns and pack their own panels of b, if at all;
//! * otherwise a chunk of b is packed by all threads, then used by all tasks, which own tiles of the result.
//!
//! b is packed into panels as wide as a register tile, because its vectors are read once per tile of rows. a is
//! only broadcast, which works in place in either orientation, so it is packed only where its elements are used
//! often enough to pay. `k` is cut so that a panel of a stays in the first cache while a row of tiles is computed.
//! Where the result has columns for half a vector (24, 65, ..), its transpose may be cheaper and is stored across.
//!
//! With factors in `bf16` ([`Product::pairs`]) the packed panels hold pairs of them, two steps of `k` in 32 bits, so that
//! panels, tiles and blocks are those of half the `k`. Products that pack nothing stay as they are.

use std::mem::MaybeUninit;
use std::ops::Range;

use super::kernel::{DOT_X, DOT_Y, Dot, Kernel, Start, Tile, WIDE};
use super::packing::{Panels, PanelsOfA};
use crate::cpu::threads::{parallel_for, with_scratch};
use crate::device::Bf16;

/// A matrix: element `(i, j)` at `ptr + i * row + j * col`, where one of the steps is 1.
#[derive(Clone, Copy)]
pub(super) struct Operand {
    pub ptr: *const f32,
    pub row: usize,
    pub col: usize,
    /// Whether `ptr` points to numbers of `bf16`; then only pairs can be made of them.
    pub narrow: bool,
}

impl Operand {
    pub fn at(&self, i: usize, j: usize) -> *const f32 {
        let offset = i * self.row + j * self.col;
        if self.narrow { self.ptr.cast::<Bf16>().wrapping_add(offset).cast() } else { self.ptr.wrapping_add(offset) }
    }

    /// The `[rows, cols]` of it in `f32`, which lie in `to` in the same order.
    ///
    /// # Safety
    /// They must be `bf16` and valid.
    unsafe fn widened(&self, rows: usize, cols: usize, to: &mut [f32]) -> Self {
        let (lines, len, step) = if self.col == 1 { (rows, cols, self.row) } else { (cols, rows, self.col) };
        for (line, to) in to.chunks_exact_mut(len.max(1)).enumerate().take(lines) {
            // SAFETY: the caller's promise.
            let from = unsafe { std::slice::from_raw_parts(self.ptr.cast::<Bf16>().add(line * step), len) };
            to.iter_mut().zip(from).for_each(|(to, from)| *to = from.to_f32());
        }
        let (row, col) = if self.col == 1 { (len, 1) } else { (1, len) };
        Self { ptr: to.as_ptr(), row, col, narrow: false }
    }
}

/// What follows a product. Parts are rows and columns of `c` as it lies in memory.
pub(super) trait After: Sync {
    /// A part is about to be computed.
    fn ahead(&self, rows: Range<usize>, columns: Range<usize>);
    /// A part is complete; called once for each element, by the task that has computed it. Where the result has no place of
    /// its own, `at` is the address that its element `(0, 0)` would have now, and the step from row to row.
    fn complete(&self, rows: Range<usize>, columns: Range<usize>, at: Option<(*const f32, usize)>);
}

/// Where the result of a product goes.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Result {
    /// To `c`.
    Stays,
    /// Nobody needs it but what follows: a row of tiles at a time goes to scratch memory.
    Passes,
    /// As [`Result::Passes`], by way of `c`.
    Stored,
}

/// `c = start + a b`.
#[derive(Clone, Copy)]
pub(super) struct Product<'a> {
    pub m: usize,
    pub n: usize,
    pub k: usize,
    pub a: Operand,
    pub b: Operand,
    pub c: *mut f32,
    pub c_step: usize,
    /// Whether `c` holds the transpose: element `(i, j)` at `c + i + j * c_step`, one bias per row.
    pub across: bool,
    pub start: Start,
    pub parallel: bool,
    /// Whether the factors are rounded to `bf16` while they are packed, where packing pays. A packed element is then a pair
    /// of them, of two steps of `k`.
    pub pairs: bool,
    /// The row and column of the whole product at which this part of it starts.
    pub origin: (usize, usize),
    /// What follows.
    pub after: Option<&'a dyn After>,
    /// Where the result goes; if it passes, its sizes must not be [thin](is_thin), and it starts from zero or a bias.
    pub result: Result,
}

// SAFETY: the tasks of a product read its operands and write different tiles of its result.
unsafe impl Send for Product<'_> {}
// SAFETY: as above.
unsafe impl Sync for Product<'_> {}

/// Most steps of `k` in one pass over the packed panels.
const KC: usize = 384;
/// Most panels of a in a task.
const MC_PANELS: usize = 16;
/// Most columns of the result in a task.
const NC: usize = 1024;
/// Into so many groups of rows the tasks of a product are sorted at most.
const ROW_GROUPS: usize = 8;
/// Elements of b that are packed at once for all tasks.
const CHUNK: usize = 1 << 20;
/// As [`CHUNK`], by a task for itself: they stay in its second-level cache.
const OWN_CHUNK: usize = 1 << 17;
/// Elements that are packed on the stack.
pub(super) const ON_STACK: usize = 8192;
/// Multiplications that are worth a task.
pub(super) const TASK: usize = 1 << 20;
/// Most rows (or columns) of the result that are computed as dot products.
const DOT_MOST: usize = 8;
/// b is read where it lies, if it lies along the columns, up to this many rows of the result.
const PACK_B_ROWS: usize = 48;
/// a is read where it lies up to this many columns of the result.
const PACK_A_COLS: usize = 128;

#[repr(align(64))]
pub(super) struct Stack(pub [MaybeUninit<f32>; ON_STACK]);

/// `len` elements at a multiple of 64 bytes, uninitialised.
fn with_aligned<R>(len: usize, body: impl FnOnce(*mut f32) -> R) -> R {
    with_scratch(len + 16, |scratch| {
        let p = scratch.as_mut_ptr();
        body(p.wrapping_add(p.align_offset(64)))
    })
}

pub(super) fn for_each(parallel: bool, tasks: usize, task: impl Fn(usize) + Sync + Send) {
    if parallel { parallel_for(tasks, task) } else { (0..tasks).for_each(task) }
}

/// Piece `i` of `0..len` in pieces of `size`.
pub(super) fn piece(i: usize, size: usize, len: usize) -> Range<usize> {
    i * size..((i + 1) * size).min(len)
}

/// Whether a product of these sizes may take a route that knows no [`After`].
pub(super) fn is_thin(m: usize, n: usize) -> bool {
    m.min(n) <= DOT_MOST
}

impl Product<'_> {
    /// # Safety
    /// The operands must be valid for reads and the result for writes. If there is something to do afterwards, the sizes must
    /// not be [thin](is_thin).
    pub unsafe fn run<K: Kernel>(mut self, s: K) {
        let (m, n, k) = (self.m, self.n, self.k);
        if m == 0 || n == 0 {
            return;
        }
        self.parallel &= m * n * k >= TASK / 4;
        self.pairs &= m.min(n) > DOT_MOST && k > 1;
        if !self.pairs && self.a.narrow {
            // SAFETY: the caller's promise.
            return with_scratch(m * k, |wide| unsafe { Product { a: self.a.widened(m, k, wide), ..self }.run(s) });
        }
        if !self.pairs && self.b.narrow {
            // SAFETY: the caller's promise.
            return with_scratch(k * n, |wide| unsafe { Product { b: self.b.widened(k, n, wide), ..self }.run(s) });
        }
        let (a_along_k, b_along_k) = (self.a.col == 1, self.b.row == 1);
        // SAFETY: the caller's promise.
        unsafe {
            if a_along_k && n == 1 && !b_along_k {
                // a column of a wider matrix
                return with_scratch(k, |row| {
                    (0..k).for_each(|l| row[l] = *self.b.at(l, 0));
                    Product { b: Operand { ptr: row.as_ptr(), row: 1, col: 1, narrow: false }, ..self }.dots(s)
                });
            }
            if b_along_k && m == 1 && !a_along_k {
                return with_scratch(k, |row| {
                    (0..k).for_each(|l| row[l] = *self.a.at(0, l));
                    Product { a: Operand { ptr: row.as_ptr(), row: 1, col: 1, narrow: false }, ..self }.dots(s)
                });
            }
            if a_along_k && b_along_k && m.min(n) <= DOT_MOST {
                return self.dots(s);
            }
            if m == 1 && self.b.col == 1 {
                return self.wide(s);
            }
            if n == 1 && self.a.row == 1 && self.c_step == 1 && !matches!(self.start, Start::Bias(_)) {
                return Product { across: false, ..self.transposed() }.wide(s);
            }
            let transpose = self.transpose_pays::<K>();
            if self.result == Result::Passes && (transpose || !self.is_one_pass::<K>()) {
                return with_scratch(m * n, |c| {
                    Product { c: c.as_mut_ptr(), c_step: n, result: Result::Stored, ..self }.run(s)
                });
            }
            if transpose {
                self = self.transposed();
            }
            if self.m <= MC_PANELS * K::MR {
                // nobody else would use a task's panels of b: the tasks pack their own
                let wanted = (m * n * k / TASK).clamp(1, 48);
                let width = self.n.div_ceil(wanted).next_multiple_of(K::NR).clamp(2 * K::NR, 512);
                for_each(self.parallel, self.n.div_ceil(width), |task| {
                    let part = self.columns(piece(task, width, self.n));
                    if part.m <= PACK_B_ROWS && part.b.col == 1 && !part.pairs {
                        part.in_place(s);
                    } else {
                        part.packed(s, OWN_CHUNK);
                    }
                });
            } else {
                self.packed(s, CHUNK);
            }
        }
    }

    /// `c^T = start + b^T a^T`
    fn transposed(self) -> Self {
        let transpose = |x: Operand| Operand { row: x.col, col: x.row, ..x };
        let (i, j) = self.origin;
        Self {
            m: self.n,
            n: self.m,
            a: transpose(self.b),
            b: transpose(self.a),
            across: !self.across,
            origin: (j, i),
            ..self
        }
    }

    /// Whether the columns of the result fill vectors so badly that its transpose is cheaper.
    fn transpose_pays<K: Kernel>(&self) -> bool {
        let lanes = |x: usize| x.next_multiple_of(K::LANES);
        // packing a along k costs as much as eight multiplications per element
        let packing = if self.a.col == 1 { K::LANES / 2 } else { 1 };
        // storing tiles across costs some percent, and what follows a product comes to them later
        self.k >= 64 && self.n * lanes(self.m) + packing * self.m < self.m * lanes(self.n) / 16 * 15
    }

    /// Elements of a packed panel for so many steps of `k`.
    pub(super) fn packed_steps(&self, k: usize) -> usize {
        if self.pairs { k.div_ceil(2) } else { k }
    }

    /// Some columns, on this thread.
    fn columns(&self, columns: Range<usize>) -> Self {
        let j = columns.start;
        Self {
            n: columns.len(),
            b: Operand { ptr: self.b.at(0, j), ..self.b },
            c: self.c.wrapping_add(if self.across { j * self.c_step } else { j }),
            start: if self.across { self.start } else { self.start.skip(j) },
            parallel: false,
            origin: (self.origin.0, self.origin.1 + j),
            ..*self
        }
    }

    /// Columns and steps of a chunk of b of about `chunk` elements.
    fn chunk<K: Kernel>(&self, chunk: usize) -> (usize, usize) {
        let nc = self.n.min((chunk / self.k.max(1)).max(512)).next_multiple_of(K::NR);
        (nc, self.k.min((chunk / nc).next_multiple_of(KC)))
    }

    /// Whether every tile is complete after one pass over packed panels.
    fn is_one_pass<K: Kernel>(&self) -> bool {
        let chunk = if self.m <= MC_PANELS * K::MR { OWN_CHUNK } else { CHUNK };
        self.k > 0 && self.chunk::<K>(chunk).1 == self.k && self.packed_steps(self.k) <= KC
    }

    /// Packs b in chunks of about `chunk` elements.
    unsafe fn packed<K: Kernel>(&self, s: K, chunk: usize) {
        let (nc, kc) = self.chunk::<K>(chunk);
        // SAFETY: the caller's promise.
        unsafe {
            if nc * kc <= ON_STACK {
                let mut stack = Stack([MaybeUninit::uninit(); ON_STACK]);
                self.chunks(s, nc, kc, stack.0.as_mut_ptr().cast());
            } else {
                with_aligned(nc * kc, |p| self.chunks(s, nc, kc, p));
            }
        }
    }

    /// All chunks of b in turn: packs one, then uses it in all tasks.
    unsafe fn chunks<K: Kernel>(&self, s: K, nc: usize, kc: usize, buffer: *mut f32) {
        let mut j = 0;
        while j < self.n {
            let columns = j..(j + nc).min(self.n);
            let mut k = 0;
            loop {
                let depth = k..(k + kc).min(self.k);
                let b = Panels { ptr: buffer, panel: K::NR * self.packed_steps(depth.len()), step: K::NR };
                // SAFETY: the buffer holds nc columns of depth kc.
                unsafe {
                    self.pack_b(s, b, depth.clone(), columns.clone());
                    self.tasks(s, b, depth, columns.clone());
                }
                k += kc;
                if k >= self.k {
                    break;
                }
            }
            j += nc;
        }
    }

    /// The tasks of one chunk of b.
    unsafe fn tasks<K: Kernel>(&self, s: K, b: Panels, k: Range<usize>, columns: Range<usize>) {
        let (mut mc, mut nc) = (MC_PANELS * K::MR, NC.min(columns.len().next_multiple_of(K::NR)));
        let count = |mc: usize, nc: usize| self.m.div_ceil(mc) * columns.len().div_ceil(nc);
        if self.parallel {
            // enough tasks for a machine of many cores, each large enough to pay for its packing
            let wanted = (self.m * columns.len() * k.len() / TASK).clamp(1, 48);
            while count(mc, nc) < wanted && (mc > 2 * K::MR || nc > 4 * K::NR) {
                if nc > 256.max(2 * mc) || mc <= 2 * K::MR {
                    nc = (nc / 2).next_multiple_of(K::NR);
                } else {
                    mc = (mc / 2).next_multiple_of(K::MR);
                }
            }
        }
        // pairs that several tasks read are made once for all of them; a mere copy is as cheap again from where it lies
        if columns.len() <= nc || !self.pairs {
            // SAFETY: the caller's promise.
            return unsafe { self.deal(s, None, b, k, 0..self.m, columns, (mc, nc)) };
        }
        let panel = K::MR * self.packed_steps(k.len()) + K::LANES;
        let most = (CHUNK / self.packed_steps(k.len()).max(1)).max(mc) / mc * mc;
        for first in (0..self.m).step_by(most) {
            let rows = first..(first + most).min(self.m);
            with_aligned(rows.len().div_ceil(K::MR) * panel, |ptr| {
                let a = PanelsOfA { ptr, panel, step: K::MR, along_k: false };
                // SAFETY: the buffer holds these rows.
                unsafe {
                    self.pack_all_of_a(s, ptr, panel, k.clone(), rows.clone());
                    self.deal(s, Some(a), b, k.clone(), rows.clone(), columns.clone(), (mc, nc));
                }
            });
        }
    }

    /// Deals tasks of `mc` rows and `nc` columns of these to the threads.
    #[allow(clippy::too_many_arguments)]
    unsafe fn deal<K: Kernel>(
        &self,
        s: K,
        a: Option<PanelsOfA>,
        b: Panels,
        k: Range<usize>,
        rows: Range<usize>,
        columns: Range<usize>,
        (mc, nc): (usize, usize),
    ) {
        let down = rows.len().div_ceil(mc);
        let across = columns.len().div_ceil(nc);
        // A thread of a team meets the rows of the result again that it has in its caches from what made a, and will have for
        // what reads c: tasks go through some rows, by blocks of columns of b, before the next rows.
        let together = down.div_ceil(ROW_GROUPS);
        for_each(self.parallel, down * across, |task| {
            let group = task / (together * across);
            let height = together.min(down - group * together);
            let within = task - group * together * across;
            let i = piece(group * together + within % height, mc, rows.len());
            let j = piece(within / height, nc, columns.len());
            let (a, b) = (a.map(|a| a.skip(i.start / K::MR, 0)), b.skip(j.start / K::NR, 0));
            let (rows, columns) =
                (rows.start + i.start..rows.start + i.end, columns.start + j.start..columns.start + j.end);
            // SAFETY: the tasks' tiles differ.
            unsafe { self.block(s, a, b, k.clone(), rows, columns) }
        });
    }

    /// Whether a is packed for so many columns of the result.
    fn packs_a(&self, columns: usize) -> bool {
        columns > PACK_A_COLS || self.pairs
    }

    /// One task: a block of the result. Packs its rows of a if that pays and is not done.
    unsafe fn block<K: Kernel>(
        &self,
        s: K,
        a: Option<PanelsOfA>,
        b: Panels,
        k: Range<usize>,
        rows: Range<usize>,
        columns: Range<usize>,
    ) {
        let pieces = self.packed_steps(k.len()).div_ceil(KC).max(1);
        let kc = k.len().div_ceil(pieces).next_multiple_of(4);
        let packs = a.is_none() && self.packs_a(columns.len());
        let body = |buffer: *mut f32| {
            for i in 0..pieces {
                let depth = piece(i, kc, k.len());
                let first = k.start + depth.start;
                let start = if first == 0 { self.start } else { Start::Accumulate };
                let b = b.skip(0, self.packed_steps(depth.start));
                // SAFETY: the buffer holds the rows of a to this depth.
                unsafe {
                    let a = match a {
                        Some(a) => a.skip(0, self.packed_steps(depth.start)),
                        None if packs => {
                            let panel = K::MR * self.packed_steps(depth.len()) + K::LANES;
                            self.pack_a(s, buffer, panel, first..first + depth.len(), rows.clone());
                            PanelsOfA { ptr: buffer, panel, step: K::MR, along_k: false }
                        }
                        None => self.a_in_place::<K>(rows.start, first),
                    };
                    let last = first + depth.len() == self.k;
                    self.tiles(s, a, b, depth.len(), rows.clone(), columns.clone(), start, last);
                }
            }
        };
        if packs {
            with_aligned(rows.len().div_ceil(K::MR) * (K::MR * kc + K::LANES), body)
        } else {
            body(std::ptr::null_mut())
        }
    }

    fn a_in_place<K: Kernel>(&self, row: usize, k: usize) -> PanelsOfA {
        let along_k = self.a.col == 1;
        PanelsOfA {
            ptr: self.a.at(row, k),
            panel: K::MR * self.a.row,
            step: if along_k { self.a.row } else { self.a.col },
            along_k,
        }
    }

    /// All tiles of a block, whose panels are ready; `last` if that completes them.
    #[allow(clippy::too_many_arguments)]
    unsafe fn tiles<K: Kernel>(
        &self,
        s: K,
        a: PanelsOfA,
        b: Panels,
        k: usize,
        rows: Range<usize>,
        columns: Range<usize>,
        start: Start,
        last: bool,
    ) {
        if self.result == Result::Passes {
            let step = columns.len().next_multiple_of(K::NR);
            return with_aligned(K::MR * step, |c| {
                // SAFETY: the caller's promise; the buffer holds a row of tiles.
                unsafe { self.rows_of_tiles(s, a, b, k, rows, columns, start, last, Some((c, step))) }
            });
        }
        // SAFETY: the caller's promise.
        unsafe { self.rows_of_tiles(s, a, b, k, rows, columns, start, last, None) }
    }

    /// [`Product::tiles`], each row of them into `passing` if that is given.
    #[allow(clippy::too_many_arguments)]
    unsafe fn rows_of_tiles<K: Kernel>(
        &self,
        s: K,
        a: PanelsOfA,
        b: Panels,
        k: usize,
        rows: Range<usize>,
        columns: Range<usize>,
        start: Start,
        last: bool,
        passing: Option<(*mut f32, usize)>,
    ) {
        // where a result that passes would begin, if all of it lay as this part does
        let whole = |c: *mut f32, step: usize| {
            let (i, j) = if self.across { (self.origin.1, self.origin.0) } else { self.origin };
            (self.result != Result::Stays).then(|| (c.wrapping_sub(i * step + j).cast_const(), step))
        };
        // along the rows of the result: they are read and written in order
        for (p, i) in rows.clone().step_by(K::MR).enumerate() {
            let height = (rows.end - i).min(K::MR);
            // the address that element (0, 0) has, or would have
            let (c, c_step) = match passing {
                Some((c, step)) => (c.wrapping_sub(i * step + columns.start), step),
                None => (self.c, self.c_step),
            };
            for (q, j) in columns.clone().step_by(K::NR).enumerate() {
                let tile = Tile {
                    a: a.ptr.wrapping_add(p * a.panel),
                    a_step: a.step,
                    b: b.ptr.wrapping_add(q * b.panel),
                    b_step: b.step,
                    k: self.packed_steps(k),
                    c: c.wrapping_add(if self.across { j * c_step + i } else { i * c_step + j }),
                    c_step,
                    cols: (columns.end - j).min(K::NR),
                    start: start.skip(if self.across { i } else { j }),
                };
                if last && !self.across {
                    self.follow(i..i + height, j..j + tile.cols, |f, rows, columns| f.ahead(rows, columns));
                }
                // SAFETY: the caller's promise.
                unsafe {
                    let compute = |tile: &Tile| {
                        if self.pairs { s.pair_tile(height, tile) } else { s.tile(height, a.along_k, tile) }
                    };
                    if self.across { tile_across(s, height, &tile, compute) } else { compute(&tile) }
                }
            }
            // a row of tiles is in the nearest caches; across it would be a few columns of many rows
            if last && !self.across {
                let at = whole(c, c_step);
                self.follow(i..i + height, columns.clone(), |f, rows, columns| f.complete(rows, columns, at));
            }
        }
        if last && self.across {
            let at = whole(self.c, self.c_step);
            self.follow(rows, columns, |f, rows, columns| f.complete(rows, columns, at));
        }
    }

    /// Tells what follows about these rows and columns of the result.
    fn follow(&self, rows: Range<usize>, columns: Range<usize>, tell: impl Fn(&dyn After, Range<usize>, Range<usize>)) {
        if let Some(after) = self.after.filter(|_| !rows.is_empty() && !columns.is_empty()) {
            let shift = |range: Range<usize>, by: usize| range.start + by..range.end + by;
            let (rows, columns) = (shift(rows, self.origin.0), shift(columns, self.origin.1));
            if self.across { tell(after, columns, rows) } else { tell(after, rows, columns) }
        }
    }

    /// A product of few rows or small sizes, with b read where it lies; only its last columns are packed.
    unsafe fn in_place<K: Kernel>(&self, s: K) {
        let whole = self.n / K::LANES * K::LANES;
        let pieces = self.k.div_ceil(2 * KC).max(1);
        let kc = self.k.div_ceil(pieces).next_multiple_of(4);
        for i in 0..pieces {
            let depth = piece(i, kc, self.k);
            let start = if i == 0 { self.start } else { Start::Accumulate };
            let a = self.a_in_place::<K>(0, depth.start);
            // SAFETY: the caller's promise: all of b is readable, and the last columns are copied.
            unsafe {
                let b = Panels { ptr: self.b.at(depth.start, 0).cast_mut(), panel: K::NR, step: self.b.row };
                let last = i + 1 == pieces;
                self.tiles(s, a, b, depth.len(), 0..self.m, 0..whole, start, last);
                if whole < self.n {
                    with_aligned(depth.len() * K::LANES, |p| {
                        let from = self.b.at(depth.start, whole);
                        s.copy(from, self.b.row, depth.len(), self.n - whole, p, K::LANES, K::LANES);
                        let b = Panels { ptr: p, panel: 0, step: K::LANES };
                        self.tiles(s, a, b, depth.len(), 0..self.m, whole..self.n, start, last);
                    });
                }
            }
        }
    }

    /// One row, times a matrix that lies along its columns.
    unsafe fn wide<K: Kernel>(&self, s: K) {
        let width = WIDE * K::LANES;
        let whole = self.n / K::LANES * K::LANES;
        let per_task = (TASK / 16 / (self.k * width).max(1)).max(1) * width;
        for_each(self.parallel, whole.div_ceil(per_task).max(1), |task| {
            let columns = piece(task, per_task, whole);
            let mut j = columns.start;
            while j < columns.end {
                let tile = Tile {
                    a: self.a.ptr,
                    a_step: self.a.col,
                    b: self.b.at(0, j),
                    b_step: self.b.row,
                    k: self.k,
                    c: self.c.wrapping_add(j),
                    c_step: 0,
                    cols: (columns.end - j).min(width),
                    start: self.start.skip(j),
                };
                // SAFETY: all these columns exist.
                unsafe { s.wide_tile(&tile) };
                j += width;
            }
            if whole < self.n && columns.end == whole {
                let rest = self.columns(whole..self.n);
                // SAFETY: the last columns of a valid product.
                unsafe { rest.in_place(s) };
            }
        });
    }

    /// Few rows against many, all along `k`.
    unsafe fn dots<K: Kernel>(&self, s: K) {
        let swap = self.n < self.m;
        // x is the operand of few rows
        let (xs, ys) = if swap { (self.n, self.m) } else { (self.m, self.n) };
        let (c_steps, bias_steps) = if swap { ((1, self.c_step), (1, 0)) } else { ((self.c_step, 1), (0, 1)) };
        let per_task = (TASK / 32 / self.k.max(1)).max(1).next_multiple_of(DOT_Y);
        for_each(self.parallel, ys.div_ceil(per_task), |task| {
            let (a, b) = ((self.a.ptr, self.a.row), (self.b.ptr, self.b.col));
            let (x, y) = if swap { (b, a) } else { (a, b) };
            for j in piece(task, per_task, ys).step_by(DOT_Y) {
                for i in (0..xs).step_by(DOT_X) {
                    let dot = Dot {
                        x: x.0.wrapping_add(i * x.1),
                        x_step: x.1,
                        y: y.0.wrapping_add(j * y.1),
                        y_step: y.1,
                        k: self.k,
                        c: self.c.wrapping_add(i * c_steps.0 + j * c_steps.1),
                        c_steps,
                        start: self.start.skip(i * bias_steps.0 + j * bias_steps.1),
                        bias_steps,
                    };
                    // SAFETY: the rows exist, and each product is computed by one task.
                    unsafe { s.dot((xs - i).min(DOT_X), (ys - j).min(DOT_Y), &dot) }
                }
            }
        });
    }
}

/// A tile whose result is stored transposed.
unsafe fn tile_across<K: Kernel>(s: K, rows: usize, t: &Tile, compute: impl Fn(&Tile)) {
    const { assert!(K::MR <= K::LANES && K::MR * K::NR <= ON_STACK / 2 && K::LANES * K::NR <= ON_STACK / 2) };
    let mut stack = Stack([MaybeUninit::uninit(); ON_STACK]);
    let tile = stack.0.as_mut_ptr().cast::<f32>();
    let columns = tile.wrapping_add(ON_STACK / 2);
    // SAFETY: the caller's promise; both buffers hold a tile.
    unsafe {
        compute(&Tile { c: tile, c_step: K::NR, start: Start::Zero, ..*t });
        s.transpose(tile, K::NR, rows, t.cols, columns, K::LANES);
        s.add_rows(columns, t.cols, rows, t.c, t.c_step, t.start);
    }
}
