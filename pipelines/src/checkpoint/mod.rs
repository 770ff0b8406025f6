//! What a run saves of itself, so that it can go on where it was.
//!
//! A checkpoint is a folder of three files: `weights.safetensors` (the parameters under the names of PyTorch's
//! `state_dict`, in `f32`, with the model file and the vocabulary in its header), `optimizer.safetensors` (moments and
//! counters) and `checkpoint.ron` (everything else, with checksums of all three). The folder appears under its name
//! only when all of it is on the disk, and what does not agree with its checksums is not read.

pub mod sidecar;
pub mod store;
pub mod tensors;
pub mod writer;

pub use sidecar::Sidecar;
pub use store::{Store, WEIGHTS};
pub use tensors::{Numbers, Tensor, Tensors};
pub use writer::{Job, Writer};

use std::collections::BTreeMap;
use std::path::PathBuf;

use crossbeam::channel::Receiver;

use crate::files::FileError;

/// Why a checkpoint cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// A file cannot be read or written.
    #[error(transparent)]
    File(#[from] FileError),
    /// A file is not what was written.
    #[error("{} is damaged: {what}", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// How one can tell.
        what: String,
    },
    /// Written by a later version.
    #[error("{} has format {found}, and this program knows formats up to {known}: use a newer version", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// Its format.
        found: u32,
        /// The newest that is known.
        known: u32,
    },
    /// It fits no session of this pipeline.
    #[error("{0}")]
    Misfit(String),
}

/// A run at one moment.
#[derive(Debug)]
pub struct Snapshot {
    /// All but the tensors and the files' checksums.
    pub sidecar: Sidecar,
    /// Notes for the header of the weights.
    pub notes: BTreeMap<String, String>,
    /// The parameters.
    pub parameters: Tensors,
    /// Moments and counters of the optimizer; none of an imported model.
    pub states: Option<Tensors>,
    /// Closes once the figures of all steps before are on the disk.
    pub recorded: Option<Receiver<()>>,
}
