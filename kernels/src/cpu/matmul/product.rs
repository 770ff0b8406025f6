//! Blocking, packing and the split into tasks.

use std::mem::MaybeUninit;
use std::ops::Range;

use super::kernel::{DOT_X, DOT_Y, Dot, Kernel, Start, Tile, WIDE};
use crate::cpu::threads::{parallel_for, with_scratch};

/// A matrix: element `(i, j)` at `ptr + i * row + j * col`, where one of the steps is 1.
#[derive(Clone, Copy)]
pub(super) struct Operand {
    pub ptr: *const f32,
    pub row: usize,
    pub col: usize,
}

impl Operand {
    fn at(&self, i: usize, j: usize) -> *const f32 {
        self.ptr.wrapping_add(i * self.row + j * self.col)
    }
}

/// `c = start + a b`.
#[derive(Clone, Copy)]
pub(super) struct Product {
    pub m: usize,
    pub n: usize,
    pub k: usize,
    pub a: Operand,
    pub b: Operand,
    pub c: *mut f32,
    pub c_step: usize,
    pub start: Start,
    pub parallel: bool,
}

// SAFETY: the tasks of a product read its operands and write different tiles of its result.
unsafe impl Send for Product {}
// SAFETY: as above.
unsafe impl Sync for Product {}

/// Most steps of `k` in one pass over the packed panels.
const KC: usize = 256;
/// Most panels of a in a task.
const MC_PANELS: usize = 8;
/// Most columns of the result in a task.
const NC: usize = 1024;
/// Elements of b that are packed at once for all tasks.
const CHUNK: usize = 1 << 20;
/// Elements that are packed on the stack.
const ON_STACK: usize = 8192;
/// Multiplications that are worth a task.
const TASK: usize = 1 << 20;
/// b is read where it lies, if it lies along the columns, up to this many rows of the result.
const PACK_B_ROWS: usize = 48;
/// a is read where it lies up to this many columns of the result.
const PACK_A_COLS: usize = 128;

#[repr(align(64))]
struct Stack([MaybeUninit<f32>; ON_STACK]);

/// The panels of b for a range of `k` and of columns: element `(k, j)` of panel `p` (each [`Kernel::NR`] wide) at
/// `ptr + p * panel + k * step + j`.
#[derive(Clone, Copy)]
struct Panels {
    ptr: *mut f32,
    panel: usize,
    step: usize,
}

// SAFETY: written at different places by the packing tasks, then only read.
unsafe impl Send for Panels {}
// SAFETY: as above.
unsafe impl Sync for Panels {}

impl Panels {
    /// The panels from `panel` on, from step `k` on.
    fn skip(self, panel: usize, k: usize) -> Self {
        Self { ptr: self.ptr.wrapping_add(panel * self.panel + k * self.step), ..self }
    }
}

/// `len` elements at a multiple of 64 bytes, uninitialised.
fn with_aligned<R>(len: usize, body: impl FnOnce(*mut f32) -> R) -> R {
    with_scratch(len + 16, |scratch| {
        let p = scratch.as_mut_ptr();
        body(p.wrapping_add(p.align_offset(64)))
    })
}

fn for_each(parallel: bool, tasks: usize, task: impl Fn(usize) + Sync + Send) {
    if parallel { parallel_for(tasks, task) } else { (0..tasks).for_each(task) }
}

/// Piece `i` of `0..len` in pieces of `size`.
fn piece(i: usize, size: usize, len: usize) -> Range<usize> {
    i * size..((i + 1) * size).min(len)
}

impl Product {
    /// # Safety
    /// The operands must be valid for reads and the result for writes.
    pub unsafe fn run<K: Kernel>(mut self, s: K) {
        if self.m == 0 || self.n == 0 {
            return;
        }
        // SAFETY: the caller's promise.
        unsafe {
            let (a_rows, b_rows) = (self.a.col == 1 || self.k == 1, self.b.row == 1 || self.k == 1);
            if a_rows && b_rows && self.m.min(self.n) <= DOT_X {
                return self.dots(s);
            }
            if self.m == 1 && self.b.col == 1 {
                return self.wide(s);
            }
            self.parallel &= self.m * self.n * self.k >= 2 * TASK;
            let panels = self.n.div_ceil(K::NR);
            if self.m <= PACK_B_ROWS && self.b.col == 1 && !self.parallel {
                return self.columns_in_place(s);
            }
            let nc = self.n.min((CHUNK / self.k.max(1)).max(512)).next_multiple_of(K::NR);
            let kc = self.k.min((CHUNK / nc).next_multiple_of(KC));
            let len = nc.min(panels * K::NR) * kc;
            if len <= ON_STACK {
                let mut stack = Stack([MaybeUninit::uninit(); ON_STACK]);
                self.chunks(s, nc, kc, stack.0.as_mut_ptr().cast());
            } else {
                with_aligned(len, |p| self.chunks(s, nc, kc, p));
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
                let b = Panels { ptr: buffer, panel: K::NR * depth.len(), step: K::NR };
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

    unsafe fn pack_b<K: Kernel>(&self, s: K, to: Panels, k: Range<usize>, columns: Range<usize>) {
        let panels = columns.len().div_ceil(K::NR);
        let per_task = (TASK / 32 / (K::NR * k.len()).max(1)).clamp(1, panels);
        for_each(self.parallel, panels.div_ceil(per_task), |task| {
            for p in piece(task, per_task, panels) {
                let j = columns.start + p * K::NR;
                let width = (columns.end - j).min(K::NR);
                // SAFETY: each panel is written by one task.
                unsafe {
                    let to = to.skip(p, 0).ptr;
                    let whole = width.next_multiple_of(K::LANES);
                    if self.b.col == 1 {
                        s.copy(self.b.at(k.start, j), self.b.row, k.len(), width, to, K::NR, whole);
                    } else {
                        for v in (0..whole).step_by(K::LANES) {
                            let rows = (width - v).min(K::LANES);
                            s.transpose(self.b.at(k.start, j + v), self.b.col, rows, k.len(), to.add(v), K::NR);
                        }
                    }
                }
            }
        });
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
        let down = self.m.div_ceil(mc);
        let across = columns.len().div_ceil(nc);
        for_each(self.parallel, down * across, |task| {
            let rows = piece(task % down, mc, self.m);
            let j = piece(task / down, nc, columns.len());
            let b = b.skip(j.start / K::NR, 0);
            // SAFETY: the tasks' tiles differ.
            unsafe { self.block(s, b, k.clone(), rows, columns.start + j.start..columns.start + j.end) }
        });
    }

    /// One task: a block of the result.
    unsafe fn block<K: Kernel>(&self, s: K, b: Panels, k: Range<usize>, rows: Range<usize>, columns: Range<usize>) {
        let pieces = k.len().div_ceil(KC).max(1);
        let kc = k.len().div_ceil(pieces).next_multiple_of(4);
        let packed = columns.len() > PACK_A_COLS;
        let body = |buffer: *mut f32| {
            for i in 0..pieces {
                let depth = piece(i, kc, k.len());
                let first = k.start + depth.start;
                let start = if first == 0 { self.start } else { Start::Accumulate };
                let b = b.skip(0, depth.start);
                // SAFETY: the buffer holds the rows of a to this depth.
                unsafe {
                    let a = if packed {
                        self.pack_a(s, buffer, first..first + depth.len(), rows.clone());
                        PanelsOfA { ptr: buffer, panel: K::MR * depth.len(), step: K::MR, along_k: false }
                    } else {
                        self.a_in_place::<K>(rows.start, first)
                    };
                    self.tiles(s, a, b, depth.len(), rows.clone(), columns.clone(), start);
                }
            }
        };
        if packed {
            // the transpose writes whole vectors, which may reach past the last panel
            with_aligned(rows.len().next_multiple_of(K::MR) * kc + K::LANES, body)
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

    unsafe fn pack_a<K: Kernel>(&self, s: K, to: *mut f32, k: Range<usize>, rows: Range<usize>) {
        for (p, i) in rows.clone().step_by(K::MR).enumerate() {
            let height = (rows.end - i).min(K::MR);
            // SAFETY: writes a panel, and what it spills past the end is written again by the next.
            unsafe {
                let to = to.add(p * K::MR * k.len());
                if self.a.row == 1 && self.a.col != 1 {
                    let whole = height.next_multiple_of(K::LANES);
                    s.copy(self.a.at(i, k.start), self.a.col, k.len(), height, to, K::MR, whole);
                } else {
                    for v in (0..height).step_by(K::LANES) {
                        let height = (height - v).min(K::LANES);
                        s.transpose(self.a.at(i + v, k.start), self.a.row, height, k.len(), to.add(v), K::MR);
                    }
                }
            }
        }
    }

    /// All tiles of a block, whose panels are ready.
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
    ) {
        for (q, j) in columns.clone().step_by(K::NR).enumerate() {
            let cols = (columns.end - j).min(K::NR);
            let start = match start {
                Start::Bias(p) => Start::Bias(p.wrapping_add(j)),
                other => other,
            };
            for (p, i) in rows.clone().step_by(K::MR).enumerate() {
                let tile = Tile {
                    a: a.ptr.wrapping_add(p * a.panel),
                    a_step: a.step,
                    b: b.ptr.wrapping_add(q * b.panel),
                    b_step: b.step,
                    k,
                    c: self.c.wrapping_add(i * self.c_step + j),
                    c_step: self.c_step,
                    cols,
                    start,
                };
                // SAFETY: the caller's promise.
                unsafe { s.tile((rows.end - i).min(K::MR), a.along_k, &tile) }
            }
        }
    }

    /// A product of few rows or small sizes, with b read where it lies; only its last columns are packed.
    unsafe fn columns_in_place<K: Kernel>(&self, s: K) {
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
                self.tiles(s, a, b, depth.len(), 0..self.m, 0..whole, start);
                if whole < self.n {
                    with_aligned(depth.len() * K::LANES, |p| {
                        let from = self.b.at(depth.start, whole);
                        s.copy(from, self.b.row, depth.len(), self.n - whole, p, K::LANES, K::LANES);
                        let b = Panels { ptr: p, panel: 0, step: K::LANES };
                        self.tiles(s, a, b, depth.len(), 0..self.m, whole..self.n, start);
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
                    start: match self.start {
                        Start::Bias(p) => Start::Bias(p.wrapping_add(j)),
                        other => other,
                    },
                };
                // SAFETY: all these columns exist.
                unsafe { s.wide_tile(&tile) };
                j += width;
            }
            if whole < self.n && columns.end == whole {
                let rest = Product {
                    n: self.n - whole,
                    b: Operand { ptr: self.b.at(0, whole), ..self.b },
                    c: self.c.wrapping_add(whole),
                    start: match self.start {
                        Start::Bias(p) => Start::Bias(p.wrapping_add(whole)),
                        other => other,
                    },
                    ..*self
                };
                // SAFETY: the last columns of a valid product.
                unsafe { rest.columns_in_place(s) };
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
                let dot = Dot {
                    x: x.0,
                    x_step: x.1,
                    y: y.0.wrapping_add(j * y.1),
                    y_step: y.1,
                    k: self.k,
                    c: self.c.wrapping_add(j * c_steps.1),
                    c_steps,
                    start: match self.start {
                        Start::Bias(p) => Start::Bias(p.wrapping_add(j * bias_steps.1)),
                        other => other,
                    },
                    bias_steps,
                };
                // SAFETY: the rows exist, and each product is computed by one task.
                unsafe { s.dot(xs, (ys - j).min(DOT_Y), &dot) }
            }
        });
    }
}

/// The panels of a: packed, or where they lie.
#[derive(Clone, Copy)]
struct PanelsOfA {
    ptr: *const f32,
    panel: usize,
    step: usize,
    along_k: bool,
}
