//! Packing of the factors into panels, as `f32` or as pairs of `bf16`.

use std::mem::MaybeUninit;
use std::ops::Range;

use super::kernel::Kernel;
use super::product::{ON_STACK, Product, Stack, TASK, for_each, piece};
use crate::device::Bf16;

/// Rows that are packed at a time where an operand lies across `k`.
const PACK_ROWS: usize = 16;

/// Steps of `k` that are paired at a time where an operand lies along `k`.
const PAIRED_COLS: usize = 256;

/// The panels of b for a range of `k` and of columns: element `(k, j)` of panel `p` (each [`Kernel::NR`] wide) at
/// `ptr + p * panel + k * step + j`.
#[derive(Clone, Copy)]
pub(super) struct Panels {
    pub ptr: *mut f32,
    pub panel: usize,
    pub step: usize,
}

// SAFETY: written at different places by the packing tasks, then only read.
unsafe impl Send for Panels {}
// SAFETY: as above.
unsafe impl Sync for Panels {}

impl Panels {
    /// The panels from `panel` on, from step `k` on.
    pub fn skip(self, panel: usize, k: usize) -> Self {
        Self { ptr: self.ptr.wrapping_add(panel * self.panel + k * self.step), ..self }
    }
}

/// The panels of a: packed, or where they lie.
#[derive(Clone, Copy)]
pub(super) struct PanelsOfA {
    pub ptr: *const f32,
    pub panel: usize,
    pub step: usize,
    pub along_k: bool,
}

// SAFETY: written before the tasks that read them.
unsafe impl Send for PanelsOfA {}
// SAFETY: as above.
unsafe impl Sync for PanelsOfA {}

impl PanelsOfA {
    /// Packed panels, from `panel` on, from step `k` on.
    pub fn skip(self, panel: usize, k: usize) -> Self {
        Self { ptr: self.ptr.wrapping_add(panel * self.panel + k * self.step), ..self }
    }
}

impl Product<'_> {
    pub(super) unsafe fn pack_b<K: Kernel>(&self, s: K, to: Panels, k: Range<usize>, columns: Range<usize>) {
        let panels = columns.len().div_ceil(K::NR);
        let width = |p: usize| (columns.len() - p * K::NR).min(K::NR);
        if self.b.col == 1 {
            // a few rows at a time, so that they are read along the row and stay on few pages
            let per_task = (TASK / 32 / columns.len()).max(1).next_multiple_of(PACK_ROWS);
            for_each(self.parallel, k.len().div_ceil(per_task), |task| {
                for d in piece(task, per_task, k.len()).step_by(PACK_ROWS) {
                    let rows = (k.len().min((task + 1) * per_task) - d).min(PACK_ROWS);
                    for p in 0..panels {
                        let from = self.b.at(k.start + d, columns.start + p * K::NR);
                        let whole = width(p).next_multiple_of(K::LANES);
                        let to = to.skip(p, self.packed_steps(d)).ptr;
                        // SAFETY: each row of a panel is written by one task.
                        unsafe { self.copy(s, self.b.narrow, from, self.b.row, rows, width(p), to, K::NR, whole) };
                    }
                }
            });
        } else {
            let per_task = (TASK / 32 / (K::NR * k.len()).max(1)).clamp(1, panels);
            for_each(self.parallel, panels.div_ceil(per_task), |task| {
                for p in piece(task, per_task, panels) {
                    for v in (0..width(p)).step_by(K::LANES) {
                        let from = self.b.at(k.start, columns.start + p * K::NR + v);
                        let rows = (width(p) - v).min(K::LANES);
                        // SAFETY: each panel is written by one task.
                        unsafe {
                            let to = to.skip(p, 0).ptr.add(v);
                            self.transpose(s, self.b.narrow, from, self.b.col, rows, k.len(), to, K::NR)
                        };
                    }
                }
            });
        }
    }

    /// [`Kernel::copy`], or as pairs of rows, which may be `narrow`.
    #[allow(clippy::too_many_arguments)]
    unsafe fn copy<K: Kernel>(
        &self,
        s: K,
        narrow: bool,
        from: *const f32,
        from_step: usize,
        rows: usize,
        cols: usize,
        to: *mut f32,
        to_step: usize,
        width: usize,
    ) {
        // SAFETY: the caller's promise.
        unsafe {
            if narrow {
                s.pair_halves(from.cast(), from_step, rows, cols, to, to_step, width)
            } else if self.pairs {
                s.pair_rows(from, from_step, rows, cols, to, to_step, width)
            } else {
                s.copy(from, from_step, rows, cols, to, to_step, width)
            }
        }
    }

    /// [`Kernel::transpose`] of at most [`Kernel::LANES`] rows, or of their pairs of columns, which may be `narrow`.
    #[allow(clippy::too_many_arguments)]
    unsafe fn transpose<K: Kernel>(
        &self,
        s: K,
        narrow: bool,
        from: *const f32,
        from_step: usize,
        rows: usize,
        cols: usize,
        to: *mut f32,
        to_step: usize,
    ) {
        // SAFETY: the caller's promise; the stack holds `LANES` rows of a piece.
        unsafe {
            if !self.pairs {
                return s.transpose(from, from_step, rows, cols, to, to_step);
            }
            if narrow && from_step.is_multiple_of(2) && cols.is_multiple_of(2) && from.is_aligned() {
                // neighbours are pairs as they lie
                return s.transpose(from, from_step / 2, rows, cols / 2, to, to_step);
            }
            const { assert!(K::LANES * PAIRED_COLS / 2 <= ON_STACK) };
            let mut stack = Stack([MaybeUninit::uninit(); ON_STACK]);
            let paired = stack.0.as_mut_ptr().cast::<f32>();
            for c in (0..cols).step_by(PAIRED_COLS) {
                let n = (cols - c).min(PAIRED_COLS);
                if narrow {
                    for r in 0..rows {
                        let (from, to) = (from.cast::<Bf16>().add(r * from_step + c), paired.add(r * PAIRED_COLS / 2));
                        to.add(n / 2).write(0.0);
                        from.copy_to_nonoverlapping(to.cast(), n);
                    }
                } else {
                    s.pair_cols(from.add(c), from_step, rows, n, paired, PAIRED_COLS / 2);
                }
                s.transpose(paired, PAIRED_COLS / 2, rows, n.div_ceil(2), to.add(c / 2 * to_step), to_step);
            }
        }
    }

    /// [`Product::pack_a`] by all threads.
    pub(super) unsafe fn pack_all_of_a<K: Kernel>(
        &self,
        s: K,
        to: *mut f32,
        panel: usize,
        k: Range<usize>,
        rows: Range<usize>,
    ) {
        let to = Panels { ptr: to, panel, step: K::MR };
        if self.a.col == 1 {
            let panels = rows.len().div_ceil(K::MR);
            let per_task = (TASK / 32 / (K::MR * k.len()).max(1)).clamp(1, panels);
            for_each(self.parallel, panels.div_ceil(per_task), |task| {
                let i = piece(task, per_task * K::MR, rows.len());
                let (to, rows) = (to.skip(task * per_task, 0).ptr, rows.start + i.start..rows.start + i.end);
                // SAFETY: each panel is written by one task.
                unsafe { self.pack_a(s, to, panel, k.clone(), rows) };
            });
        } else {
            let per_task = (TASK / 32 / rows.len()).max(1).next_multiple_of(PACK_ROWS);
            for_each(self.parallel, k.len().div_ceil(per_task), |task| {
                let depth = piece(task, per_task, k.len());
                let to = to.skip(0, self.packed_steps(depth.start)).ptr;
                // SAFETY: each step of each panel is written by one task.
                unsafe { self.pack_across(s, to, panel, k.start + depth.start..k.start + depth.end, rows.clone()) };
            });
        }
    }

    /// [`Product::pack_a`] of rows that lie across `k`, a few steps at a time. Does not spill past the last one, where another
    /// task may write.
    unsafe fn pack_across<K: Kernel>(&self, s: K, to: *mut f32, panel: usize, k: Range<usize>, rows: Range<usize>) {
        const { assert!(K::MR.next_multiple_of(K::LANES) <= ON_STACK) };
        let mut stack = Stack([MaybeUninit::uninit(); ON_STACK]);
        let spilled = stack.0.as_mut_ptr().cast::<f32>();
        let width = K::MR.next_multiple_of(K::LANES);
        // the last step, one or two rows
        let rest = if self.pairs && k.len().is_multiple_of(2) { 2 } else { 1 };
        for d in (0..k.len()).step_by(PACK_ROWS) {
            let depth = (k.len() - d).min(PACK_ROWS);
            let ends = d + depth == k.len();
            let free = if ends { depth - rest } else { depth };
            for (p, i) in rows.clone().step_by(K::MR).enumerate() {
                let height = (rows.end - i).min(K::MR);
                let whole = height.next_multiple_of(K::LANES);
                // SAFETY: what a row spills past its end is written again by the next; the last one spills on the stack.
                unsafe {
                    let to = to.add(p * panel + self.packed_steps(d) * K::MR);
                    let from = self.a.at(i, k.start + d);
                    self.copy(s, self.a.narrow, from, self.a.col, free, height, to, K::MR, whole);
                    if ends {
                        let from = self.a.at(i, k.start + d + free);
                        self.copy(s, self.a.narrow, from, self.a.col, rest, height, spilled, width, whole);
                        spilled.copy_to_nonoverlapping(to.add(self.packed_steps(free) * K::MR), K::MR);
                    }
                }
            }
        }
    }

    /// Packs panels that are `panel` apart. Writes whole vectors, so each needs a vector of room after it.
    pub(super) unsafe fn pack_a<K: Kernel>(
        &self,
        s: K,
        to: *mut f32,
        panel: usize,
        k: Range<usize>,
        rows: Range<usize>,
    ) {
        if self.a.col != 1 {
            // SAFETY: the caller's promise.
            return unsafe { self.pack_across(s, to, panel, k, rows) };
        }
        for (p, i) in rows.clone().step_by(K::MR).enumerate() {
            let height = (rows.end - i).min(K::MR);
            for v in (0..height).step_by(K::LANES) {
                let (from, rows) = (self.a.at(i + v, k.start), (height - v).min(K::LANES));
                // SAFETY: what a row spills past its end is written again by the next, or room.
                unsafe {
                    let to = to.add(p * panel + v);
                    self.transpose(s, self.a.narrow, from, self.a.row, rows, k.len(), to, K::MR);
                }
            }
        }
    }
}
