//! `checkpoint.ron`: where a run was, and the checksums of the files beside it.
//!
//! The last line is a comment with the SHA-256 of all that stands above it.

use std::path::Path;

use ron::ser::PrettyConfig;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::CheckpointError;
use crate::data::text::hexadecimal;
use crate::report::{EvaluationRow, Losses};

/// The newest format of checkpoints that this program writes and reads.
pub const FORMAT: u32 = 1;

const LAST_LINE: &str = "// sha256 of all above: ";

/// What a checkpoint holds besides tensors.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename = "Checkpoint", deny_unknown_fields)]
pub struct Sidecar {
    /// See [`FORMAT`].
    pub format: u32,
    /// The version of the program that wrote it.
    pub dataflow: String,
    /// What the program ran on.
    pub device: String,
    /// Updates made.
    pub step: u64,
    /// Tokens trained on.
    pub tokens: u64,
    /// Training batches drawn, those that were dropped among them: the next batch is the one of this number. Batches
    /// are functions of seed and number, so that this is the position in the data.
    pub batches: u64,
    /// Updates that were dropped because they were not finite.
    pub skipped: u64,
    /// The seed of everything random. Random numbers are functions of the seed and of the counters in
    /// `optimizer.safetensors`, so that there is no other state of a generator.
    pub seed: u64,
    /// The learning-rate schedule.
    pub schedule: String,
    /// The last evaluation.
    pub evaluation: Option<Evaluation>,
    /// A hash of the compiled step: its launches, parameters and states.
    pub graph: String,
    /// The other files of the checkpoint.
    pub files: Vec<FileSum>,
    /// The pipeline as it ran.
    pub pipeline: String,
}

/// An evaluation: a row of `metrics.jsonl`, in the form of RON, which has numbers that are not finite.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Evaluation {
    /// Updates made.
    pub step: u64,
    /// Loss on the split that is learned from.
    pub train: f64,
    /// Loss on the split that is held out.
    pub val: f64,
    /// The part of the answers that are right, where the task has right answers.
    pub accuracy: Option<f64>,
}

impl From<EvaluationRow> for Evaluation {
    fn from(row: EvaluationRow) -> Self {
        let EvaluationRow { step, eval: Losses { train, val }, accuracy } = row;
        Self { step, train, val, accuracy }
    }
}

impl From<Evaluation> for EvaluationRow {
    fn from(evaluation: Evaluation) -> Self {
        let Evaluation { step, train, val, accuracy } = evaluation;
        Self { step, eval: Losses { train, val }, accuracy }
    }
}

/// A file with its checksum.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileSum {
    /// Its name.
    pub name: String,
    /// Its length.
    pub bytes: u64,
    /// Its SHA-256, in hexadecimal.
    pub sha256: String,
}

impl Sidecar {
    /// The text of the file.
    ///
    /// # Errors
    /// None that are known: everything in it has a form in RON.
    pub fn to_text(&self) -> Result<String, ron::Error> {
        let pretty = PrettyConfig::new().escape_strings(false).struct_names(true);
        let mut text = ron::ser::to_string_pretty(self, pretty)?;
        text.push('\n');
        let sum = hexadecimal(&Sha256::digest(&text));
        Ok(format!("{text}{LAST_LINE}{sum}\n"))
    }

    /// Reads a text and checks its sum.
    ///
    /// # Errors
    /// What is wrong with it; `path` is for the message.
    pub fn parse(path: &Path, bytes: &[u8]) -> Result<Self, CheckpointError> {
        let damaged = |what: &str| CheckpointError::Damaged { path: path.into(), what: what.into() };
        let text = std::str::from_utf8(bytes).map_err(|_| damaged("it is no text"))?;
        let start = text.rfind(LAST_LINE).ok_or_else(|| damaged("its last line, a checksum, is missing"))?;
        let (above, last) = text.split_at(start);
        let sum = hexadecimal(&Sha256::digest(above));
        if last != format!("{LAST_LINE}{sum}\n") {
            return Err(damaged("its checksum is another one"));
        }
        // what follows is as it was written, perhaps by another version
        #[derive(Deserialize)]
        struct Format {
            format: u32,
        }
        let wrong = |e: ron::error::SpannedError| damaged(&format!("it does not describe a checkpoint: {e}"));
        // `struct_names` is written, and any name is read here
        let body = above.trim_start().trim_start_matches("Checkpoint");
        let Format { format } = ron::from_str(body).map_err(wrong)?;
        if format > FORMAT {
            return Err(CheckpointError::Format { path: path.into(), found: format, known: FORMAT });
        }
        ron::from_str(above).map_err(wrong)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn example() -> Sidecar {
        Sidecar {
            format: FORMAT,
            dataflow: "0.1.0".into(),
            device: "cpu".into(),
            step: 250,
            tokens: 192_000,
            batches: 251,
            skipped: 1,
            seed: u64::MAX,
            schedule: "Constant(0.001)".into(),
            evaluation: Some(Evaluation { step: 250, train: 0.1 + 0.2, val: f64::NAN, accuracy: None }),
            graph: "ab".into(),
            files: vec![FileSum { name: "weights.safetensors".into(), bytes: 12, sha256: "00".into() }],
            pipeline: "Pipeline(\n    stages: [(\"a\", B(c: r#\"x\"#), [])],\n)\n".into(),
        }
    }

    #[test]
    fn what_is_written_is_read() {
        let text = example().to_text().unwrap();
        let again = Sidecar::parse(Path::new("checkpoint.ron"), text.as_bytes()).unwrap();
        // NaN is not equal to itself
        assert_eq!(again.to_text().unwrap(), text);
        assert_eq!((again.seed, again.pipeline), (example().seed, example().pipeline));
    }

    #[test]
    fn every_flipped_bit_is_noticed() {
        let text = example().to_text().unwrap();
        for byte in 0..text.len() {
            for bit in 0..8 {
                let mut bytes = text.clone().into_bytes();
                bytes[byte] ^= 1 << bit;
                assert!(Sidecar::parse(Path::new("c.ron"), &bytes).is_err(), "bit {bit} of byte {byte}");
            }
            assert!(Sidecar::parse(Path::new("c.ron"), &text.as_bytes()[..byte]).is_err(), "cut at {byte}");
        }
    }

    #[test]
    fn later_formats_are_refused_in_words() {
        let later = Sidecar { format: 9, ..example() }.to_text().unwrap();
        let message = Sidecar::parse(Path::new("c.ron"), later.as_bytes()).unwrap_err().to_string();
        assert_eq!(message, "c.ron has format 9, and this program knows formats up to 1: use a newer version");
    }
}
