//! Batches of sequences that are at different positions, each with its state in a slot of a pool.
//!
//! A recurrent kernel takes `[batch * time, C]` activations of which the first `length` rows of each sequence count, and
//! continues the state that lies in the sequence's slot. So one pool serves sequences of any length that come and go,
//! and a batch holds just those that are active.

use std::ops::Range;

use super::threads::parallel_for;
use crate::device::KernelError;
use crate::{Rows, RowsMut};

/// One sequence of a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sequence {
    /// Its place in the batch.
    pub row: usize,
    /// Where its state lies.
    pub slot: usize,
    /// Tokens before these.
    pub position: usize,
    /// Number of its tokens, at least 1.
    pub len: usize,
    /// Its first row among the rows of the batch.
    first: usize,
}

impl Sequence {
    /// The rows of an activation `[batch * time, C]` that are this sequence's tokens.
    pub fn rows(&self) -> Range<usize> {
        self.first..self.first + self.len
    }

    /// Those rows.
    pub fn of<'a>(&self, activation: Rows<'a>) -> Rows<'a> {
        activation.slice_rows(self.first, self.first + self.len)
    }
}

/// The sequences of a batch; one number of each slice for each.
#[derive(Clone, Copy, Debug)]
pub struct Sequences<'a> {
    /// Rows of a sequence in the batch.
    pub time: usize,
    /// Where the state of a sequence lies.
    pub slots: &'a [i32],
    /// Tokens before these; at 0 the state counts as empty, whatever the slot holds.
    pub positions: &'a [i32],
    /// How many rows of each sequence count; 0 for one that rests.
    pub lengths: &'a [i32],
}

impl Sequences<'_> {
    /// Sequence `row`, or `None` if it rests.
    fn get(&self, row: usize) -> Option<Sequence> {
        let [slot, position, len] = [self.slots, self.positions, self.lengths].map(|x| x[row] as usize);
        (len > 0).then_some(Sequence { row, slot, position, len, first: row * self.time })
    }

    /// Fails unless the slots are among `slots` and differ, lengths fit the batch, and no sequence becomes longer than
    /// `limit`.
    fn check(&self, slots: usize, limit: Option<usize>) -> Result<(), KernelError> {
        for row in 0..self.slots.len() {
            let Some(sequence) = self.get(row) else { continue };
            let Sequence { slot, position, len, .. } = sequence;
            if slot >= slots || len > self.time || self.positions[row] < 0 {
                let message =
                    format!("{len} tokens at position {position} in slot {slot}: there are {slots} slots, and");
                return Err(KernelError(format!("{message} room for {} tokens in a batch", self.time)));
            }
            if let Some(limit) = limit.filter(|limit| position + len > *limit) {
                return Err(KernelError(format!("there is room for {limit} tokens, not for {}", position + len)));
            }
            if (0..row).any(|other| self.get(other).is_some_and(|other| other.slot == slot)) {
                return Err(KernelError(format!("two sequences share the slot {slot}")));
            }
        }
        Ok(())
    }

    /// Runs `task(sequence, results, states)` for every sequence that does not rest, in parallel.
    ///
    /// `results` are activations `[batch * time, C]`, of which a task has its rows; `states` are `[slots * n, C]`, of which
    /// it has the `n` rows of its slot, filled with zeros where the sequence begins, unless they are a `cache` whose rows
    /// are written before they are read. Matrices without rows stay so.
    ///
    /// # Errors
    /// Slots that are shared or not there, more tokens than rows, sequences longer than `limit`.
    pub fn run<const R: usize, const S: usize>(
        &self,
        slots: usize,
        limit: Option<usize>,
        cache: bool,
        results: [RowsMut<'_>; R],
        states: [RowsMut<'_>; S],
        task: impl Fn(Sequence, [RowsMut<'_>; R], [RowsMut<'_>; S]) + Sync + Send,
    ) -> Result<(), KernelError> {
        self.check(slots, limit)?;
        let batch = self.slots.len();
        assert!(results.iter().all(|x| x.rows() == 0 || x.rows() == batch * self.time), "rows of the results");
        assert!(states.iter().all(|x| x.rows().is_multiple_of(slots.max(1))), "rows of the states");
        parallel_for(batch, |row| {
            let Some(sequence) = self.get(row) else { return };
            // SAFETY: sequences differ in their rows and, as was checked, in their slots.
            let (results, mut states) = unsafe {
                let rows = sequence.rows();
                let results = results.each_ref().map(|x| {
                    let rows = if x.rows() == 0 { 0..0 } else { rows.clone() };
                    x.shared_block(rows, 0..x.cols())
                });
                let states = states.each_ref().map(|x| {
                    let each = x.rows() / slots;
                    x.shared_block(sequence.slot * each..(sequence.slot + 1) * each, 0..x.cols())
                });
                (results, states)
            };
            if sequence.position == 0 && !cache {
                for state in &mut states {
                    (0..state.rows()).for_each(|r| state.row(r).fill(0.0));
                }
            }
            task(sequence, results, states);
        });
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn batch<'a>(slots: &'a [i32], positions: &'a [i32], lengths: &'a [i32]) -> Sequences<'a> {
        Sequences { time: 2, slots, positions, lengths }
    }

    #[test]
    fn each_sequence_has_its_rows_and_its_slot() {
        let (mut y, mut state) = (vec![0.0; 6], vec![7.0; 4]);
        let sequences = batch(&[3, 0, 1], &[5, 0, 0], &[2, 0, 1]);
        let [y_rows, states] = [&mut y, &mut state].map(|x| RowsMut::contiguous(x, 1));
        let done = sequences.run(4, None, false, [y_rows], [states], |s, [mut y], [mut state]| {
            assert_eq!(y.rows(), s.len);
            (0..s.len).for_each(|t| y.row(t)[0] = (10 * s.row + t + s.position) as f32);
            state.row(0)[0] += 1.0;
        });
        done.unwrap();
        assert_eq!((y, state), (vec![5.0, 6.0, 0.0, 0.0, 20.0, 0.0], vec![7.0, 1.0, 7.0, 8.0]));
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let run = |slots: &[i32], positions: &[i32], lengths: &[i32]| {
            batch(slots, positions, lengths).run(2, Some(8), false, [], [], |_, [], []| ())
        };
        assert!(run(&[0, 1], &[6, 0], &[2, 1]).is_ok());
        assert!(run(&[0, 0], &[0, 0], &[1, 0]).is_ok());
        for (slots, positions, lengths) in
            [([0, 0], [0, 0], [1, 1]), ([0, 2], [0, 0], [1, 1]), ([0, 1], [7, 0], [2, 1]), ([0, 1], [0, 0], [1, 3])]
        {
            assert!(run(&slots, &positions, &lengths).is_err(), "{slots:?} {positions:?} {lengths:?}");
        }
        assert!(run(&[-1, 1], &[0, 0], &[1, 1]).is_err() && run(&[0, 1], &[-3, 0], &[1, 1]).is_err());
    }
}
