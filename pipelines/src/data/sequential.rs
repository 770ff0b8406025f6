//! Each token of a token file once per epoch.

use std::path::PathBuf;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::batch::{Batch, BatchError, BatchSource, Draw, Purpose, Split, check_shape};
use super::streams::epoch_permutation;
use super::token_file::{TokenFile, TokenSplits, Tokenizer};
use super::whole_windows::WholeWindows;
use super::windows::{WindowBatches, Windows, check_length, copy_window};

/// `Sequential(batch: 64, block: 256)`: the file is cut into windows that do not overlap, and each is seen once before
/// any is seen again, in an order of its own in every epoch. So each token but the first is a target once per epoch; in the
/// window at the end, positions that are left over have none. Evaluation draws windows at random, as [`Windows`] does.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Sequential {
    /// How many windows are in a batch (B).
    pub batch: usize,
    /// How many tokens are in a window (T).
    pub block: usize,
    /// Whether each epoch has an order of its own; else all follow the file.
    pub shuffle: bool,
}

impl Sequential {
    /// The source of batches for a text. Both splits must be longer than a window.
    pub fn over(&self, splits: TokenSplits, seed: u64) -> Result<SequentialBatches, BatchError> {
        let Sequential { batch, block, shuffle } = *self;
        check_shape(batch, block)?;
        check_length(block, Split::Train, &splits.train)?;
        let windows = Windows { batch, block }.over(splits.clone(), seed)?;
        Ok(SequentialBatches { tokens: splits.train, windows, batch, block, shuffle, seed })
    }
}

/// The windows of the training split, epoch after epoch.
#[derive(Clone, Debug)]
pub struct SequentialBatches {
    tokens: Arc<TokenFile>,
    /// For evaluation.
    windows: WindowBatches,
    batch: usize,
    block: usize,
    shuffle: bool,
    seed: u64,
}

impl SequentialBatches {
    /// The windows of an epoch: `(tokens - 1) / block`, and one more if tokens are left over.
    pub fn windows_per_epoch(&self) -> u64 {
        (self.tokens.len() - 1).div_ceil(self.block) as u64
    }
}

impl BatchSource for SequentialBatches {
    fn shape(&self) -> (usize, usize) {
        (self.batch, self.block)
    }

    fn vocabulary(&self) -> usize {
        self.tokens.vocabulary()
    }

    fn tokenizer(&self) -> Option<&Tokenizer> {
        self.windows.tokenizer()
    }

    fn tokenizer_file(&self) -> Option<PathBuf> {
        self.windows.tokenizer_file()
    }

    fn fill(&mut self, draw: Draw, batch: &mut Batch) -> Result<(), BatchError> {
        if (draw.split, draw.purpose) != (Split::Train, Purpose::Training) {
            return self.windows.fill(draw, batch);
        }
        batch.resize(self.batch, self.block);
        batch.step = draw.step;
        let windows = self.windows_per_epoch();
        for row in 0..self.batch {
            // rows go through the windows of all epochs, one after the other
            let number = draw.step * self.batch as u64 + row as u64;
            let (epoch, place) = (number / windows, number % windows);
            let window = if self.shuffle { epoch_permutation(self.seed, epoch, windows, place) } else { place };
            let start = window as usize * self.block;
            copy_window(&self.tokens, start, self.block.min(self.tokens.len() - 1 - start), row, batch)?;
        }
        Ok(())
    }

    fn whole_windows(&self, split: Split) -> Result<Option<WholeWindows>, BatchError> {
        self.windows.whole_windows(split)
    }

    fn duplicate(&self) -> Box<dyn BatchSource> {
        Box::new(self.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::batch::IGNORED;
    use crate::data::token_file::tests::token_file;

    /// Batches of 3 windows of 4 tokens, of the tokens 0, 1, … below `tokens`: what was asked for, step by step.
    fn targets(tokens: u16, shuffle: bool, steps: std::ops::Range<u64>) -> Vec<i32> {
        let numbers: Vec<u16> = (0..tokens).collect();
        let (_folder, file) = token_file(&numbers, tokens.into());
        let splits = TokenSplits { train: Arc::clone(&file), validation: file };
        let mut source = Sequential { batch: 3, block: 4, shuffle }.over(splits, 1337).unwrap();
        assert_eq!(source.windows_per_epoch(), (u64::from(tokens) - 1).div_ceil(4));
        let (mut batch, mut all) = (Batch::default(), Vec::new());
        for step in steps {
            source.fill(Draw::training(step), &mut batch).unwrap();
            for (&input, &target) in batch.inputs.iter().zip(&batch.targets) {
                assert!(target == input + 1 || (input, target) == (0, IGNORED));
                all.extend((target != IGNORED).then_some(target));
            }
        }
        all
    }

    #[test]
    fn each_token_once_per_epoch() {
        // of 101 tokens 25 steps of 3 windows are 3 epochs; of 102 and 103 it takes 26 steps, and a window has few tokens
        for (tokens, steps) in [(101, 25), (102, 26), (103, 26)] {
            let all: Vec<i32> = (1..tokens).collect();
            let epochs: Vec<Vec<i32>> =
                targets(tokens as u16, true, 0..steps).chunks(all.len()).map(<[i32]>::to_vec).collect();
            for epoch in &epochs {
                let mut sorted = epoch.clone();
                sorted.sort_unstable();
                assert_eq!(sorted, all);
            }
            assert_eq!(epochs.len(), 3);
            assert!(epochs[0] != epochs[1] && epochs[1] != epochs[2] && epochs[0] != epochs[2]);
            let plain = targets(tokens as u16, false, 0..steps);
            assert!(plain.chunks(all.len()).all(|epoch| epoch == all));
        }
    }

    #[test]
    fn a_step_depends_on_no_other() {
        assert_eq!(targets(101, true, 0..25)[7 * 12..], targets(101, true, 7..25));
    }
}
