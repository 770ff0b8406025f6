//! Windows at random places of a token file.

use std::path::PathBuf;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::batch::{Batch, BatchError, BatchSource, Draw, IGNORED, Split, check_shape};
use super::streams::row_stream;
use super::token_file::{TokenFile, TokenSplits, Tokenizer};
use super::whole_windows::WholeWindows;

/// `Windows(batch: 64, block: 256)`: each row starts at a random token and is asked for the next token at
/// each of its own, as nanoGPT's `get_batch`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Windows {
    /// How many windows are in a batch (B).
    pub batch: usize,
    /// How many tokens are in a window (T).
    pub block: usize,
}

impl Windows {
    /// The source of batches for a text. Both splits must be longer than a window.
    pub fn over(&self, splits: TokenSplits, seed: u64) -> Result<WindowBatches, BatchError> {
        check_shape(self.batch, self.block)?;
        for (split, file) in [(Split::Train, &splits.train), (Split::Validation, &splits.validation)] {
            check_length(self.block, split, file)?;
        }
        Ok(WindowBatches { windows: self.clone(), splits, seed })
    }
}

/// A window is `block` inputs and the target of the last one.
pub(crate) fn check_length(block: usize, split: Split, file: &TokenFile) -> Result<(), BatchError> {
    if file.len() > block {
        return Ok(());
    }
    let (tokens, file) = (file.len(), file.path().display().to_string());
    Err(BatchError::BlockTooLong { block, split, file, tokens })
}

/// Random windows of the two splits of a text.
#[derive(Clone, Debug)]
pub struct WindowBatches {
    windows: Windows,
    splits: TokenSplits,
    seed: u64,
}

impl WindowBatches {
    /// The tokens of a split.
    pub fn tokens(&self, split: Split) -> &Arc<TokenFile> {
        match split {
            Split::Train => &self.splits.train,
            Split::Validation => &self.splits.validation,
        }
    }
}

impl BatchSource for WindowBatches {
    fn shape(&self) -> (usize, usize) {
        (self.windows.batch, self.windows.block)
    }

    fn vocabulary(&self) -> usize {
        self.splits.train.vocabulary()
    }

    fn tokenizer(&self) -> Option<&Tokenizer> {
        Some(&self.splits.train.description().tokenizer)
    }

    fn tokenizer_file(&self) -> Option<PathBuf> {
        match &self.splits.train.description().tokenizer {
            Tokenizer::Json { file, .. } => Some(self.splits.train.path().with_file_name(file)),
            _ => None,
        }
    }

    fn fill(&mut self, draw: Draw, batch: &mut Batch) -> Result<(), BatchError> {
        let Windows { batch: rows, block } = self.windows;
        batch.resize(rows, block);
        batch.step = draw.step;
        let file = Arc::clone(self.tokens(draw.split));
        // The last window starts where one token is left for its last target.
        let starts = file.len() - block;
        for row in 0..rows {
            let start = row_stream(self.seed, draw, row).below(starts);
            copy_window(&file, start, block, row, batch)?;
        }
        Ok(())
    }

    fn whole_windows(&self, split: Split) -> Result<Option<WholeWindows>, BatchError> {
        let Windows { batch, block } = self.windows;
        WholeWindows::new(Arc::clone(self.tokens(split)), split, batch, block).map(Some)
    }

    fn duplicate(&self) -> Box<dyn BatchSource> {
        Box::new(self.clone())
    }
}

/// Makes one row of `batch` the window of `len` tokens that starts at token `start`, read from the file to where the device
/// takes it. If `len` is less than the block, the rest has inputs 0 and no targets.
pub(crate) fn copy_window(
    file: &TokenFile,
    start: usize,
    len: usize,
    row: usize,
    batch: &mut Batch,
) -> Result<(), BatchError> {
    let row = row * batch.block..(row + 1) * batch.block;
    let (inputs, targets) = (&mut batch.inputs[row.clone()], &mut batch.targets[row]);
    file.read(start, &mut inputs[..len])?;
    file.read(start + 1, &mut targets[..len])?;
    inputs[len..].fill(0);
    targets[len..].fill(IGNORED);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::token_file::tests::token_file;

    fn source(tokens: u16, batch: usize, block: usize) -> (tempfile::TempDir, Result<WindowBatches, BatchError>) {
        let numbers: Vec<u16> = (0..tokens).collect();
        let (folder, file) = token_file(&numbers, tokens.into());
        let splits = TokenSplits { train: Arc::clone(&file), validation: file };
        (folder, Windows { batch, block }.over(splits, 1337))
    }

    #[test]
    fn targets_are_the_next_tokens() {
        let (_folder, source) = source(100, 8, 10);
        let mut source = source.unwrap();
        let mut batch = Batch::default();
        source.fill(Draw::training(0), &mut batch).unwrap();
        assert_eq!((batch.batch, batch.block, batch.inputs.len()), (8, 10, 80));
        for (input, target) in batch.inputs.iter().zip(&batch.targets) {
            assert_eq!(input + 1, *target);
        }
    }

    #[test]
    fn a_draw_says_it_all() {
        let (_folder, source) = source(1000, 4, 16);
        let mut source = source.unwrap();
        let mut fill = |draw: Draw| {
            let mut batch = Batch::default();
            source.fill(draw, &mut batch).unwrap();
            batch
        };
        let seventh = fill(Draw::training(7));
        fill(Draw::training(8));
        assert_eq!(fill(Draw::training(7)), seventh);
        assert_ne!(fill(Draw::training(6)).inputs, seventh.inputs);
        assert_ne!(fill(Draw::evaluation(Split::Train, 7)).inputs, seventh.inputs);
        // Both splits are the same file here, yet not the same draws.
        let train = fill(Draw::evaluation(Split::Train, 7)).inputs;
        assert_ne!(fill(Draw::evaluation(Split::Validation, 7)).inputs, train);
    }

    #[test]
    fn every_start_is_drawn() {
        let (_folder, source) = source(12, 1, 8);
        let mut source = source.unwrap();
        let mut seen = [0; 4];
        let mut batch = Batch::default();
        for step in 0..400 {
            source.fill(Draw::training(step), &mut batch).unwrap();
            seen[batch.inputs[0] as usize] += 1;
        }
        assert!(seen.iter().all(|&count| (60..140).contains(&count)), "{seen:?}");
    }

    #[test]
    fn memory_is_reused() {
        let (_folder, source) = source(100, 8, 10);
        let mut source = source.unwrap();
        let mut batch = Batch::default();
        source.fill(Draw::training(0), &mut batch).unwrap();
        let before = (batch.inputs.as_ptr(), batch.targets.as_ptr());
        source.fill(Draw::training(1), &mut batch).unwrap();
        assert_eq!(before, (batch.inputs.as_ptr(), batch.targets.as_ptr()));
    }

    #[test]
    fn impossible_sizes_are_errors() {
        let message = |batch, block| source(100, batch, block).1.unwrap_err().to_string();
        let text = message(4, 100);
        assert!(text.contains("block: 100 needs at least 101 tokens"), "{text}");
        assert!(text.contains("the train split") && text.contains("has 100;"), "{text}");
        assert!(source(100, 4, 99).1.is_ok());
        assert!(message(1, usize::MAX).contains("more than 1073741824 tokens"));
        assert!(message(0, 8).contains("batch: 0"));
        assert!(message(8, 0).contains("block: 0"));
        assert!(message(usize::MAX, 2).contains("use a smaller batch"));
    }
}
