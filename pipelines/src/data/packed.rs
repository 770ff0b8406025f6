//! Sequences that hold several documents, each of which is one of its own to the model.

use std::path::PathBuf;

use super::batch::{Batch, BatchError, BatchSource, Draw, Split};
use super::sequential::{Sequential, SequentialBatches};
use super::token_file::{TokenSplits, Tokenizer};
use super::whole_windows::WholeWindows;

/// `Packed(batch: 64, block: 256)`: the windows of [`Sequential`], with the places where documents start. There ops that
/// look back start anew: attention sees no further, states are empty, positions begin at 0.
///
/// The end-of-text token is the target of a document's last token and the first input of the next document, so that every
/// token is a target and the first token of a document is learned too: given nothing but that one begins. What is left of a
/// document at the start of a window begins there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Packed {
    /// The windows.
    pub sequential: Sequential,
    /// The token that documents start at; what `Tokenize` has put between them if it is not given.
    pub end_of_text: Option<u32>,
}

impl Packed {
    /// The source of batches for a text. Both splits must be longer than a window.
    pub fn over(&self, splits: TokenSplits, seed: u64) -> Result<PackedBatches, BatchError> {
        let vocabulary = splits.train.vocabulary();
        let Some(separator) = self.end_of_text.or_else(|| splits.train.end_of_text()) else {
            return Err(BatchError::NoSeparator { file: splits.train.path().display().to_string() });
        };
        if separator as usize >= vocabulary {
            return Err(BatchError::WrongSeparator { separator, vocabulary });
        }
        Ok(PackedBatches { sequential: self.sequential.over(splits, seed)?, separator: separator as i32 })
    }
}

/// The windows of a text, with the places where documents start.
#[derive(Clone, Debug)]
pub struct PackedBatches {
    sequential: SequentialBatches,
    separator: i32,
}

impl BatchSource for PackedBatches {
    fn shape(&self) -> (usize, usize) {
        self.sequential.shape()
    }

    fn vocabulary(&self) -> usize {
        self.sequential.vocabulary()
    }

    fn tokenizer(&self) -> Option<&Tokenizer> {
        self.sequential.tokenizer()
    }

    fn tokenizer_file(&self) -> Option<PathBuf> {
        self.sequential.tokenizer_file()
    }

    fn packed(&self) -> bool {
        true
    }

    fn fill(&mut self, draw: Draw, batch: &mut Batch) -> Result<(), BatchError> {
        self.sequential.fill(draw, batch)?;
        batch.mark_documents(self.separator);
        Ok(())
    }

    fn whole_windows(&self, split: Split) -> Result<Option<WholeWindows>, BatchError> {
        Ok(self.sequential.whole_windows(split)?.map(|windows| windows.packed(self.separator)))
    }

    fn duplicate(&self) -> Box<dyn BatchSource> {
        Box::new(self.clone())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::data::token_file::tests::token_file;

    fn source(numbers: &[u16], end_of_text: Option<u32>) -> Result<PackedBatches, BatchError> {
        let (_folder, file) = token_file(numbers, 10);
        let splits = TokenSplits { train: Arc::clone(&file), validation: file };
        Packed { sequential: Sequential { batch: 2, block: 5, shuffle: false }, end_of_text }.over(splits, 1)
    }

    #[test]
    fn documents_start_at_the_separator() {
        let numbers = [1, 2, 3, 9, 4, 9, 9, 5, 6, 7, 8];
        let mut source = source(&numbers, Some(9)).unwrap();
        let mut batch = Batch::default();
        source.fill(Draw::training(0), &mut batch).unwrap();
        assert_eq!(batch.inputs, [1, 2, 3, 9, 4, 9, 9, 5, 6, 7]);
        assert_eq!(batch.targets, [2, 3, 9, 4, 9, 9, 5, 6, 7, 8]);
        assert_eq!(batch.positions, [0, 1, 2, 0, 1, 0, 0, 1, 2, 3]);
        // the windows of an exact loss have them too
        let mut windows = source.whole_windows(Split::Validation).unwrap().unwrap();
        batch = Batch::default();
        assert!(windows.fill(&mut batch).unwrap());
        assert_eq!(batch.positions, [0, 1, 2, 0, 1, 0, 0, 1, 2, 3]);
    }

    #[test]
    fn a_separator_is_needed() {
        let message = source(&[0; 20], None).unwrap_err().to_string();
        assert!(message.contains("train.bin does not say which token is between its documents"), "{message}");
        let message = source(&[0; 20], Some(10)).unwrap_err().to_string();
        assert!(message.contains("end_of_text: 10 is no token: the vocabulary has 10"), "{message}");
    }
}
