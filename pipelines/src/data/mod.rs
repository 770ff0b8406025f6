//! What feeds a training step: texts, token files, and batches of inputs and targets.

pub mod archive;
pub mod batch;
pub mod chars;
pub mod documents;
pub mod download;
pub mod layout;
pub mod packed;
pub mod prefetch;
pub mod prepare;
pub mod recall;
pub mod sequential;
mod streams;
pub mod text;
pub mod token_file;
pub mod tokenizer;
pub mod whole_windows;
pub mod windows;

pub use batch::{Batch, BatchError, BatchSource, Draw, Purpose, Split};
pub use prefetch::Prefetcher;
pub use text::{Text, TextError, TextSource};
pub use token_file::{TokenFile, TokenFileError, TokenSplits, Tokenizer};
