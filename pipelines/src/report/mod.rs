//! What a run shows and leaves behind: its folder, metrics, curves, and the progress on the screen.

pub mod append;
pub mod curve;
pub mod folder;
pub mod metrics;
pub mod notices;
pub mod progress;
pub mod recorder;
pub mod tensorboard;

pub use folder::RunFolder;
pub use metrics::{EvaluationRow, Losses, Row, StepRow};
pub use notices::Notices;
pub use recorder::{Recorder, Sink};

use std::path::PathBuf;

use crate::files::FileError;

/// Why a run cannot be recorded.
#[derive(Debug, thiserror::Error)]
pub enum ReportError {
    /// A file or folder cannot be read or written.
    #[error(transparent)]
    File(#[from] FileError),
    /// The folder belongs to another run.
    #[error("{} already holds a run; choose another folder with --out", .0.display())]
    FolderInUse(PathBuf),
    /// Nothing to resume.
    #[error("{} holds no run to resume (there is no {}); check --out, or start anew without --resume", path.display(), missing)]
    NothingToResume {
        /// The folder.
        path: PathBuf,
        /// The file that every run has.
        missing: &'static str,
    },
    /// A row of an earlier run makes no sense.
    #[error("{}, line {line}: not a row of metrics: {source}; remove the line", path.display())]
    Metrics {
        /// The file.
        path: PathBuf,
        /// The line, counted from one.
        line: usize,
        /// What is wrong with it.
        source: serde_json::Error,
    },
    /// The picture cannot be drawn.
    #[error("cannot draw the loss curves: {0}")]
    Drawing(String),
    /// The thread that writes could not be started.
    #[error("cannot start the thread that writes the metrics: {0}")]
    Thread(std::io::Error),
    /// The thread that writes ended by a bug.
    #[error("the thread that writes the metrics panicked: {0}; this is a bug, please report it")]
    Panicked(String),
    /// The error was reported before.
    #[error("nothing is recorded any more since the last error")]
    Ended,
}
