//! Row lookup and its gradient.
//!
//! Both directions move memory and compute next to nothing. Forward copies rows in parallel. The weight gradient first
//! sorts the positions by id (a counting sort, stable), so that every row of the gradient belongs to one task, is
//! written once, and sums its positions in their order: deterministic, without a zero fill before and without atomics.
//! Tasks are ranges of the vocabulary of about equal cost, times blocks of columns, so that a vocabulary of 65 letters
//! keeps all threads busy as well as one of 50 thousand words, of which a few make up most of a text.

use std::ops::Range;

use super::lanes::{add, grain, lanes, ld, st};
use super::threads::{parallel_for, parallel_ranges, with_scratch};
use crate::device::Bf16;
use crate::rows::SharedSlice;
use crate::{Rows, RowsMut, simd_fn};

/// An id that is no row of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("id {id} at position {position} is outside of a table of {rows} rows")]
pub struct IdOutOfRange {
    /// Index into the ids.
    pub position: usize,
    /// The id there.
    pub id: i32,
    /// Rows of the table.
    pub rows: usize,
}

fn check(ids: &[i32], rows: usize) -> Result<(), IdOutOfRange> {
    // a negative id is a large one as u32; without an early exit the loop is vectorised
    if ids.iter().fold(0, |largest, &id| largest.max(id as u32)) < rows as u32 || ids.is_empty() {
        return Ok(());
    }
    let position = ids.iter().position(|&id| id < 0 || id as usize >= rows).unwrap();
    Err(IdOutOfRange { position, id: ids[position], rows })
}

/// `out[n] = weight[ids[n]]`; weight `[V, C]`, out `[N, C]`.
pub fn forward(ids: &[i32], weight: &[f32], out: RowsMut<'_>) -> Result<(), IdOutOfRange> {
    let cols = out.cols();
    assert_eq!(ids.len(), out.rows());
    if cols == 0 {
        return Ok(());
    }
    assert!(weight.len().is_multiple_of(cols));
    check(ids, weight.len() / cols)?;
    parallel_ranges(ids.len(), grain(cols), |range| {
        for n in range {
            let id = ids[n] as usize;
            // SAFETY: this task alone has row n.
            unsafe { out.shared_row(n) }.copy_from_slice(&weight[id * cols..(id + 1) * cols]);
        }
    });
    Ok(())
}

/// [`forward`] of a table in `bf16`.
pub fn forward_narrow(ids: &[i32], weight: Rows<'_, Bf16>, mut out: RowsMut<'_>) -> Result<(), IdOutOfRange> {
    assert!(ids.len() == out.rows() && weight.cols() == out.cols());
    check(ids, weight.rows())?;
    for (n, &id) in ids.iter().enumerate() {
        out.row(n).iter_mut().zip(weight.row(id as usize)).for_each(|(to, from)| *to = from.to_f32());
    }
    Ok(())
}

/// Rows of a small vocabulary, of which single ones have many positions, are split into columns.
fn columns_per_task(vocabulary: usize, cols: usize) -> usize {
    if vocabulary < 1024 { 512.min(cols) } else { cols }
}

/// `dweight[v]` = the sum of `dy[n]` over the positions n with `ids[n] = v`; dy `[N, C]`, dweight `[V, C]`.
pub fn backward(ids: &[i32], dy: Rows<'_>, dweight: &mut [f32]) -> Result<(), IdOutOfRange> {
    scatter(ids, dy, dweight, false)
}

/// [`backward`] that adds to what `dweight` holds, and touches only the rows of ids that occur.
pub fn backward_add(ids: &[i32], dy: Rows<'_>, dweight: &mut [f32]) -> Result<(), IdOutOfRange> {
    scatter(ids, dy, dweight, true)
}

fn scatter(ids: &[i32], dy: Rows<'_>, dweight: &mut [f32], adding: bool) -> Result<(), IdOutOfRange> {
    let cols = dy.cols();
    assert_eq!(ids.len(), dy.rows());
    if cols == 0 {
        return Ok(());
    }
    assert!(dweight.len().is_multiple_of(cols));
    let vocabulary = dweight.len() / cols;
    check(ids, vocabulary)?;
    // a row that is only zeroed costs about half of one position
    let cost = 2 * ids.len() + vocabulary;
    let tasks = cost.div_ceil((cost / 64).max(64));
    let width = columns_per_task(vocabulary, cols);
    let blocks = cols.div_ceil(width);
    let dweight = SharedSlice::new(dweight);
    with_scratch(vocabulary + 1 + ids.len() + tasks + 1, |scratch| {
        let scratch = as_u32(scratch);
        let (starts, rest) = scratch.split_at_mut(vocabulary + 1);
        let (order, bounds) = rest.split_at_mut(ids.len());
        sort(ids, starts, order);
        split(starts, cost, bounds);
        let (starts, order, bounds) = (&*starts, &*order, &*bounds);
        parallel_for(tasks * blocks, |task| {
            let (part, block) = (task / blocks, task % blocks);
            let columns = block * width..((block + 1) * width).min(cols);
            let (mut v, end) = (bounds[part] as usize, bounds[part + 1] as usize);
            while v < end {
                let positions = &order[starts[v] as usize..starts[v + 1] as usize];
                // whole rows without positions are zeroed together: a long fill need not read memory first
                let run = if width == cols { (v..end).take_while(|&v| starts[v + 1] == starts[v]).count() } else { 0 };
                // SAFETY: this task alone has these columns of the rows before `end`.
                unsafe {
                    if run > 0 && adding {
                        // nothing to add
                    } else if run > 0 {
                        dweight.range(v * cols..(v + run) * cols).fill(0.0);
                    } else {
                        let out = dweight.range(v * cols + columns.start..v * cols + columns.end);
                        sum_rows(dy, columns.clone(), positions, adding, out);
                    }
                }
                v += run.max(1);
            }
        });
    });
    Ok(())
}

simd_fn! {
    /// `out` = the sum, in order, of the rows of dy at these positions, and of what `out` holds if `adding`.
    fn sum_rows(s: S, dy: Rows<'_>, columns: Range<usize>, positions: &[u32], adding: bool, out: &mut [f32]) {
        let row = |n: u32| &dy.row(n as usize)[columns.clone()];
        let mut rest = positions;
        if !adding {
            let Some((&start, others)) = positions.split_first() else { return out.fill(0.0) };
            out.copy_from_slice(row(start));
            rest = others;
        }
        // four rows at a time: out is read and written once for them, and their cache misses overlap
        while let Some((&[a, b, c, d], after)) = rest.split_first_chunk() {
            let (a, b, c, d) = (row(a), row(b), row(c), row(d));
            lanes!(S, out.len(), |i, n| {
                // SAFETY: all have the length of `columns`.
                unsafe {
                    let sum = s.add(s.add(ld(s, out, i, n), ld(s, a, i, n)), ld(s, b, i, n));
                    let sum = s.add(s.add(sum, ld(s, c, i, n)), ld(s, d, i, n));
                    st(s, out, i, n, sum);
                }
            });
            rest = after;
        }
        for &n in rest {
            add(row(n), out);
        }
    }
}

/// `order` = the positions sorted by id; those of id v are `order[starts[v]..starts[v + 1]]`, ascending.
fn sort(ids: &[i32], starts: &mut [u32], order: &mut [u32]) {
    starts.fill(0);
    for &id in ids {
        starts[id as usize + 1] += 1;
    }
    for v in 1..starts.len() {
        starts[v] += starts[v - 1];
    }
    // starts[v] walks to the end of v while positions are placed, which is the start of v + 1
    for (n, &id) in ids.iter().enumerate() {
        let place = &mut starts[id as usize];
        order[*place as usize] = n as u32;
        *place += 1;
    }
    for v in (1..starts.len()).rev() {
        starts[v] = starts[v - 1];
    }
    starts[0] = 0;
}

/// `bounds` = limits of vocabulary ranges of about equal cost, where a row costs 1 and each of its positions 2.
fn split(starts: &[u32], cost: usize, bounds: &mut [u32]) {
    let (vocabulary, parts) = (starts.len() - 1, bounds.len() - 1);
    let mut v = 0;
    for (part, bound) in bounds.iter_mut().enumerate() {
        while v < vocabulary && (v + 2 * starts[v] as usize) * parts < part * cost {
            v += 1;
        }
        *bound = if part == parts { vocabulary as u32 } else { v as u32 };
    }
}

fn as_u32(scratch: &mut [f32]) -> &mut [u32] {
    // SAFETY: f32 and u32 have the same size and alignment, and any bits are a value of either.
    unsafe { std::slice::from_raw_parts_mut(scratch.as_mut_ptr().cast(), scratch.len()) }
}
