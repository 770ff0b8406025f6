//! Batches whose rows hold several documents, one behind the other, each of which is a sequence of its own.
//!
//! An op that looks back runs its kernel once for each document, as for a batch of one sequence of that length. So what it
//! computes for a document is, bit for bit, what it computes for the document alone.

use std::ops::Range;

use super::lanes::add;
use super::threads::{parallel_for, with_scratch};
use crate::device::KernelError;
use crate::rows::SharedSlice;
use crate::{Rows, RowsMut};

/// One document of a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Document {
    /// Its first row among the rows of the batch.
    pub first: usize,
    /// Number of its tokens, at least 1.
    pub len: usize,
}

impl Document {
    /// The rows of an activation `[batch * time, C]` that are this document's tokens.
    pub fn of<'a>(&self, activation: Rows<'a>) -> Rows<'a> {
        activation.slice_rows(self.first, self.first + self.len)
    }

    fn rows(&self) -> Range<usize> {
        self.first..self.first + self.len
    }
}

/// The documents of a batch.
#[derive(Clone, Copy, Debug)]
pub struct Documents<'a> {
    /// Tokens of a row of the batch.
    pub time: usize,
    /// Of each token of the batch, how many of its document are before it in the row: a document starts at 0.
    pub positions: &'a [i32],
}

impl Documents<'_> {
    /// Fails unless every row of the batch starts with a document, and each position is 0 or one more than that before.
    fn check(&self) -> Result<(), KernelError> {
        for (row, positions) in self.positions.chunks(self.time).enumerate() {
            let mut expected = 0;
            for (t, &position) in positions.iter().enumerate() {
                if position != 0 && position != expected {
                    let message = format!("token {t} of row {row} cannot have the position {position} in its document");
                    return Err(KernelError(message));
                }
                expected = position + 1;
            }
        }
        Ok(())
    }

    /// The documents of a row of the batch.
    fn of_row(&self, row: usize) -> impl Iterator<Item = Document> {
        let first = row * self.time;
        self.positions[first..first + self.time].chunk_by(|_, next| *next != 0).scan(first, |first, positions| {
            let document = Document { first: *first, len: positions.len() };
            *first += document.len;
            Some(document)
        })
    }

    /// Runs `task(document, outputs)` for every document, rows of the batch in parallel.
    ///
    /// The first `activations` of the outputs are `[batch * time, C]`, of which a task has its document's rows. The others
    /// become the sum, in the order of the documents within each row and then of the rows, of what the tasks write to
    /// them: gradients of parameters. Matrices without rows stay so.
    ///
    /// # Errors
    /// Positions that no documents have.
    pub fn run<const N: usize>(
        &self,
        mut outputs: [RowsMut<'_>; N],
        activations: usize,
        task: impl Fn(Document, [RowsMut<'_>; N]) + Sync + Send,
    ) -> Result<(), KernelError> {
        self.check()?;
        let batch = self.positions.len() / self.time.max(1);
        let is_sum = |i: usize| i >= activations;
        assert!((0..N).all(|i| is_sum(i) || outputs[i].rows() == 0 || outputs[i].rows() == self.positions.len()));
        let sizes: [usize; N] =
            std::array::from_fn(|i| if is_sum(i) { outputs[i].rows() * outputs[i].cols() } else { 0 });
        let total: usize = sizes.iter().sum();
        with_scratch(batch * total, |sums| {
            let shared = SharedSlice::new(sums);
            parallel_for(batch, |row| {
                // SAFETY: each row of the batch has a sum of its own.
                let sum = unsafe { shared.range(row * total..(row + 1) * total) };
                sum.fill(0.0);
                with_scratch(total, |part| {
                    for document in self.of_row(row) {
                        let mut parts = &mut *part;
                        let given: [RowsMut<'_>; N] = std::array::from_fn(|i| {
                            if is_sum(i) {
                                let (own, rest) = std::mem::take(&mut parts).split_at_mut(sizes[i]);
                                parts = rest;
                                return RowsMut::contiguous(own, outputs[i].cols());
                            }
                            let rows = if outputs[i].rows() == 0 { 0..0 } else { document.rows() };
                            // SAFETY: documents have no row in common.
                            unsafe { outputs[i].shared_block(rows, 0..outputs[i].cols()) }
                        });
                        task(document, given);
                        if total > 0 {
                            add(part, sum);
                        }
                    }
                });
            });
            // SAFETY: all tasks are done.
            let sums = unsafe { shared.range(0..batch * total) };
            let mut from = 0;
            for (i, output) in outputs.iter_mut().enumerate().filter(|(i, _)| is_sum(*i)) {
                let cols = output.cols();
                for r in 0..output.rows() {
                    let to = output.row(r);
                    to.fill(0.0);
                    (0..batch).for_each(|row| add(&sums[row * total + from + r * cols..][..cols], to));
                }
                from += sizes[i];
            }
        });
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_document_has_its_rows() {
        let positions = [0, 1, 2, 0, 0, 1, 0, 1];
        let documents = Documents { time: 4, positions: &positions };
        let (mut lengths, mut count) = (vec![0.0; 8], vec![9.0; 2]);
        let [rows, sums] = [&mut lengths, &mut count].map(|x| RowsMut::contiguous(x, 1));
        let done = documents.run([rows, sums], 1, |document, [mut y, mut sum]| {
            (0..y.rows()).for_each(|r| y.row(r)[0] = document.len as f32);
            sum.row(0)[0] = 1.0;
            sum.row(1)[0] = document.first as f32;
        });
        done.unwrap();
        assert_eq!(lengths, [3.0, 3.0, 3.0, 1.0, 2.0, 2.0, 2.0, 2.0]);
        assert_eq!(count, [4.0, 13.0]);
    }

    #[test]
    fn positions_that_no_documents_have() {
        for (positions, wrong) in [([1, 2], "token 0 of row 0"), ([0, 2], "token 1 of row 0"), ([0, -1], "token 1")] {
            let documents = Documents { time: 2, positions: &positions };
            let message = documents.run([], 0, |_, []| {}).unwrap_err().to_string();
            assert!(message.contains(wrong), "{message}");
        }
    }
}
