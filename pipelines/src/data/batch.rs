//! Batches of inputs and targets, and what gives them.

use std::path::PathBuf;

use dataflow_graph::session::Session;

use super::token_file::{TokenFileError, Tokenizer};
use super::whole_windows::WholeWindows;

/// The target of a position that no loss is taken at.
pub const IGNORED: i32 = -1;

/// The most positions a batch may have: beyond this, byte offsets into its tensors leave 32 bits.
const MOST_POSITIONS: usize = 1 << 30;

/// `batch` sequences of `block` tokens, one row after the other.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Batch {
    /// The tokens, `[batch, block]`.
    pub inputs: Vec<i32>,
    /// What the model should answer at each position, `[batch, block]`; [`IGNORED`] where nothing.
    pub targets: Vec<i32>,
    /// Where a sequence holds several documents: how many tokens of its document are before each token, `[batch, block]`; 0
    /// where a document starts. Else empty.
    pub positions: Vec<i32>,
    /// How many sequences (B).
    pub batch: usize,
    /// How many tokens each has (T).
    pub block: usize,
    /// The step, or the number of the evaluation batch.
    pub step: u64,
}

impl Batch {
    /// A batch with room for `batch × block` tokens, all zero, and no targets.
    pub fn new(batch: usize, block: usize) -> Batch {
        let mut new = Batch::default();
        new.resize(batch, block);
        new
    }

    /// Changes the sizes; allocates only if the batch grows.
    pub fn resize(&mut self, batch: usize, block: usize) {
        (self.batch, self.block) = (batch, block);
        self.inputs.resize(batch * block, 0);
        self.targets.resize(batch * block, IGNORED);
    }

    /// Fills in the positions: a document starts at every `separator`, and at the beginning of a sequence.
    pub fn mark_documents(&mut self, separator: i32) {
        self.positions.resize(self.inputs.len(), 0);
        for (tokens, positions) in self.inputs.chunks(self.block).zip(self.positions.chunks_mut(self.block)) {
            let mut next = 0;
            for (&token, position) in tokens.iter().zip(positions) {
                *position = if token == separator { 0 } else { next };
                next = *position + 1;
            }
        }
    }

    /// Writes the batch to the inputs of a program.
    pub fn write_to(&self, session: &Session) {
        session.write_input("tokens", &self.inputs);
        session.write_input("targets", &self.targets);
        if !self.positions.is_empty() {
            session.write_input("positions", &self.positions);
        }
    }

    /// How many positions have a target.
    pub fn answers(&self) -> usize {
        self.targets.iter().filter(|&&target| target != IGNORED).count()
    }
}

/// Which part of the data.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Split {
    /// What is learned from.
    Train,
    /// What is held out.
    Validation,
}

impl Split {
    /// The name for messages.
    pub fn name(self) -> &'static str {
        match self {
            Split::Train => "train",
            Split::Validation => "validation",
        }
    }
}

/// What a batch is drawn for. Training and evaluation draw from streams of their own, so that how often
/// and how long one evaluates never changes what is trained on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Purpose {
    /// A training step.
    Training,
    /// An estimate of the loss.
    Evaluation,
}

/// Says which batch: the same draw from the same source gives the same batch, whatever was drawn before.
/// So a run can resume at any step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Draw {
    /// Which part of the data.
    pub split: Split,
    /// What for.
    pub purpose: Purpose,
    /// The step, or the number of the evaluation batch.
    pub step: u64,
}

impl Draw {
    /// The batch of a training step.
    pub fn training(step: u64) -> Draw {
        Draw { split: Split::Train, purpose: Purpose::Training, step }
    }

    /// An evaluation batch. The same numbers at every evaluation make losses comparable between steps.
    pub fn evaluation(split: Split, number: u64) -> Draw {
        Draw { split, purpose: Purpose::Evaluation, step: number }
    }
}

/// Gives batches.
pub trait BatchSource: Send + Sync {
    /// How many sequences and tokens per sequence ([`Batch::batch`], [`Batch::block`]).
    fn shape(&self) -> (usize, usize);

    /// Every token and target is below this.
    fn vocabulary(&self) -> usize;

    /// What turned a text into tokens, where there is one.
    fn tokenizer(&self) -> Option<&Tokenizer> {
        None
    }

    /// The tokenizer's file, where it has one.
    fn tokenizer_file(&self) -> Option<PathBuf> {
        None
    }

    /// Whether sequences hold several documents, so that batches have [`positions`](Batch::positions).
    fn packed(&self) -> bool {
        false
    }

    /// Makes `batch` the one that `draw` says, reusing its memory.
    fn fill(&mut self, draw: Draw, batch: &mut Batch) -> Result<(), BatchError>;

    /// Whether targets are right answers, so that accuracy means something, and not just the next token.
    fn has_answers(&self) -> bool {
        false
    }

    /// All of a split once, in order, where the split is finite: the exact loss instead of an estimate.
    fn whole_windows(&self, _split: Split) -> Result<Option<WholeWindows>, BatchError> {
        Ok(None)
    }

    /// Another source of the same batches, for another thread.
    fn duplicate(&self) -> Box<dyn BatchSource>;
}

/// Why there is no batch.
#[derive(Debug, thiserror::Error)]
pub enum BatchError {
    /// A size is zero.
    #[error("{attribute}: 0 makes no batch; it must be at least 1")]
    Zero {
        /// The attribute that gives it.
        attribute: &'static str,
    },
    /// The product of the sizes is out of reach.
    #[error("batch: {batch} times block: {block} is more than {MOST_POSITIONS} tokens; use a smaller batch")]
    TooManyPositions {
        /// How many sequences.
        batch: usize,
        /// How many tokens each.
        block: usize,
    },
    /// A split is shorter than one window.
    #[error(
        "block: {block} needs at least {} tokens in each split, but the {} split ({file}) has {tokens}; \
         use a smaller block or a longer text",
        block.saturating_add(1), split.name()
    )]
    BlockTooLong {
        /// The length of a window.
        block: usize,
        /// The split.
        split: Split,
        /// Its file.
        file: String,
        /// Its length.
        tokens: usize,
    },
    /// Nothing says where documents begin.
    #[error(
        "{file} does not say which token is between its documents; give it as an attribute of `Packed`, such as \
         `end_of_text: 50256` for GPT-2's"
    )]
    NoSeparator {
        /// The token file.
        file: String,
    },
    /// A token that is none.
    #[error("end_of_text: {separator} is no token: the vocabulary has {vocabulary}")]
    WrongSeparator {
        /// What was given.
        separator: u32,
        /// All tokens are below this.
        vocabulary: usize,
    },
    /// The tokens cannot be read.
    #[error(transparent)]
    TokenFile(#[from] TokenFileError),
    /// The recall task is impossible.
    #[error(transparent)]
    Recall(#[from] super::recall::RecallError),
    /// The thread that makes the batches ended by a bug.
    #[error("the thread that prepares batches panicked: {0}; this is a bug, please report it")]
    Panicked(String),
    /// The thread that makes the batches could not be started.
    #[error("cannot start the thread that prepares batches: {0}")]
    Thread(std::io::Error),
    /// The error was reported before, and there will be no more batches.
    #[error("there are no more batches since the last error")]
    Ended,
}

/// Checks the sizes of a batch before anything is allocated.
pub(crate) fn check_shape(batch: usize, block: usize) -> Result<(), BatchError> {
    for (attribute, size) in [("batch", batch), ("block", block)] {
        if size == 0 {
            return Err(BatchError::Zero { attribute });
        }
    }
    match batch.checked_mul(block) {
        Some(positions) if positions <= MOST_POSITIONS => Ok(()),
        _ => Err(BatchError::TooManyPositions { batch, block }),
    }
}
