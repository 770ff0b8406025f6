//! All windows of a split, once and in order, for an exact loss.

use std::sync::Arc;

use super::batch::{Batch, BatchError, IGNORED, Split, check_shape};
use super::token_file::TokenFile;
use super::windows::{check_length, copy_window};

/// The whole windows of a split that do not overlap, `(tokens - 1) / block` of them, in batches. Each token
/// but the first and an incomplete window at the end is a target exactly once.
#[derive(Clone, Debug)]
pub struct WholeWindows {
    tokens: Arc<TokenFile>,
    split: Split,
    batch: usize,
    block: usize,
    next: usize,
    /// What documents start at, if sequences hold several.
    separator: Option<i32>,
}

impl WholeWindows {
    /// The windows of `block` tokens, `batch` at a time.
    pub fn new(tokens: Arc<TokenFile>, split: Split, batch: usize, block: usize) -> Result<WholeWindows, BatchError> {
        check_shape(batch, block)?;
        check_length(block, split, &tokens)?;
        Ok(WholeWindows { tokens, split, batch, block, next: 0, separator: None })
    }

    /// The same, with the positions of tokens in their documents, each of which starts at a `separator`.
    pub fn packed(self, separator: i32) -> WholeWindows {
        WholeWindows { separator: Some(separator), ..self }
    }

    /// The same tokens in windows of another length.
    pub fn cut(&self, batch: usize, block: usize) -> Result<WholeWindows, BatchError> {
        let windows = WholeWindows::new(Arc::clone(&self.tokens), self.split, batch, block)?;
        Ok(WholeWindows { separator: self.separator, ..windows })
    }

    /// How many tokens the split has.
    pub fn tokens(&self) -> usize {
        self.tokens.len()
    }

    /// Whether sequences hold several documents.
    pub fn is_packed(&self) -> bool {
        self.separator.is_some()
    }

    /// How many windows there are.
    pub fn windows(&self) -> usize {
        (self.tokens.len() - 1) / self.block
    }

    /// How many batches there are.
    pub fn batches(&self) -> usize {
        self.windows().div_ceil(self.batch)
    }

    /// Fills the next batch; `false` when all windows have been given. The last batch is as large as the
    /// others, so that one plan runs them all: the rows that are left over have inputs 0 and no targets.
    /// A mean over batches must therefore weigh them by [`Batch::answers`].
    pub fn fill(&mut self, batch: &mut Batch) -> Result<bool, BatchError> {
        if self.next >= self.windows() {
            return Ok(false);
        }
        batch.resize(self.batch, self.block);
        batch.step = (self.next / self.batch) as u64;
        let rows = self.batch.min(self.windows() - self.next);
        for row in 0..rows {
            copy_window(&self.tokens, (self.next + row) * self.block, self.block, row, batch)?;
        }
        batch.inputs[rows * self.block..].fill(0);
        batch.targets[rows * self.block..].fill(IGNORED);
        if let Some(separator) = self.separator {
            batch.mark_documents(separator);
        }
        self.next += rows;
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::token_file::tests::token_file;

    fn targets(tokens: u16, batch: usize, block: usize) -> (usize, Vec<i32>) {
        let numbers: Vec<u16> = (0..tokens).collect();
        let (_folder, file) = token_file(&numbers, tokens.into());
        let mut windows = WholeWindows::new(file, Split::Validation, batch, block).unwrap();
        let (mut filled, mut batches, mut all) = (Batch::default(), 0, Vec::new());
        while windows.fill(&mut filled).unwrap() {
            assert_eq!((filled.targets.len(), filled.step), (batch * block, batches as u64));
            let answered = filled.inputs.iter().zip(&filled.targets).filter(|&(_, &target)| target != IGNORED);
            all.extend(answered.map(|(&input, &target)| {
                assert_eq!(input + 1, target);
                target
            }));
            batches += 1;
        }
        assert_eq!(batches, windows.batches());
        assert_eq!(all.len(), windows.windows() * block);
        (batches, all)
    }

    #[test]
    fn each_target_once() {
        assert_eq!(targets(31, 2, 5), (3, (1..31).collect()));
        assert_eq!(targets(30, 2, 5), (3, (1..26).collect()));
        assert_eq!(targets(6, 4, 5), (1, (1..6).collect()));
    }

    #[test]
    fn a_window_longer_than_the_split_is_an_error() {
        let (_folder, file) = token_file(&[0; 64], 1);
        let error = WholeWindows::new(file, Split::Validation, 1, 64).unwrap_err().to_string();
        assert!(error.contains("block: 64 needs at least 65 tokens") && error.contains("validation split"), "{error}");
    }
}
