//! `metrics.jsonl`: one JSON object per line, for a training step or an evaluation.

use std::fs;
use std::io::{self, Write};
use std::path::Path;

use serde::{Deserialize, Deserializer, Serialize};

use super::append::AppendFile;
use super::{ReportError, Sink};
use crate::files::{self, FileError};

/// A line. Losses are in nats per token. Numbers are printed with as many digits as it takes to read the
/// same bits back; one that is not finite is `null`.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Row {
    /// A training step.
    Step(StepRow),
    /// An evaluation.
    Evaluation(EvaluationRow),
}

impl Row {
    /// The step it belongs to.
    pub fn step(&self) -> u64 {
        match self {
            Row::Step(row) => row.step,
            Row::Evaluation(row) => row.step,
        }
    }
}

/// A training step.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct StepRow {
    /// The step, counted from zero.
    pub step: u64,
    /// How many tokens have been trained on, with this step.
    pub tokens: u64,
    /// The loss of the step's batch.
    #[serde(deserialize_with = "null_is_nan_f32")]
    pub loss: f32,
    /// The norm of the gradient before clipping.
    #[serde(deserialize_with = "null_is_nan_f32")]
    pub grad_norm: f32,
    /// The learning rate.
    #[serde(deserialize_with = "null_is_nan_f32")]
    pub lr: f32,
    /// The speed.
    #[serde(deserialize_with = "null_is_nan")]
    pub tokens_per_s: f64,
    /// The model's flops over the device's peak, where that is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mfu: Option<f64>,
}

/// An evaluation after a step.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct EvaluationRow {
    /// The step.
    pub step: u64,
    /// The losses.
    pub eval: Losses,
    /// The part of the answers that are right, from 0 to 1, where the task has right answers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub accuracy: Option<f64>,
}

/// The losses of both splits.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Losses {
    /// Of the split that is learned from.
    #[serde(deserialize_with = "null_is_nan")]
    pub train: f64,
    /// Of the split that is held out.
    #[serde(deserialize_with = "null_is_nan")]
    pub val: f64,
}

fn null_is_nan<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or(f64::NAN))
}

fn null_is_nan_f32<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f32, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or(f32::NAN))
}

/// The rows of an earlier run. A last line without an end, which a crash may leave, is left out.
pub fn read(path: &Path) -> Result<Vec<Row>, ReportError> {
    let text = fs::read_to_string(path).map_err(FileError::on("read", path))?;
    let whole = text.rfind('\n').map_or("", |end| &text[..end]);
    let rows = whole.lines().enumerate().filter(|(_, line)| !line.is_empty());
    rows.map(|(index, line)| {
        serde_json::from_str(line).map_err(|source| ReportError::Metrics { path: path.into(), line: index + 1, source })
    })
    .collect()
}

/// The file, open for more rows.
#[derive(Debug)]
pub struct MetricsFile {
    file: AppendFile,
    line: Vec<u8>,
}

impl MetricsFile {
    /// An empty file.
    pub fn create(path: &Path) -> Result<MetricsFile, ReportError> {
        Ok(MetricsFile { file: AppendFile::create(path)?, line: Vec::new() })
    }

    /// The file of a run that goes on with `step`: the rows before it stay and are returned, later ones,
    /// written after the checkpoint, go.
    pub fn resume(path: &Path, step: u64) -> Result<(MetricsFile, Vec<Row>), ReportError> {
        let mut rows = if path.exists() { read(path)? } else { Vec::new() };
        rows.retain(|row| row.step() < step);
        files::write_atomically(path, |file| rows.iter().try_for_each(|row| write_row(file, row)))?;
        Ok((MetricsFile { file: AppendFile::extend(path)?, line: Vec::new() }, rows))
    }
}

fn write_row(file: &mut impl Write, row: &Row) -> io::Result<()> {
    serde_json::to_writer(&mut *file, row)?;
    file.write_all(b"\n")
}

impl Sink for MetricsFile {
    fn record(&mut self, row: &Row) -> Result<(), ReportError> {
        self.line.clear();
        write_row(&mut self.line, row).map_err(FileError::on("write", self.file.path()))?;
        self.file.push(&self.line);
        Ok(())
    }

    fn flush(&mut self) -> Result<(), ReportError> {
        Ok(self.file.flush()?)
    }

    fn sync(&mut self) -> Result<(), ReportError> {
        Ok(self.file.sync()?)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn step(step: u64, loss: f32) -> Row {
        let (grad_norm, lr) = (1.234_567_9, 1e-3);
        Row::Step(StepRow { step, tokens: 768 * (step + 1), loss, grad_norm, lr, tokens_per_s: 15012.5, mfu: None })
    }

    pub(crate) fn evaluation(step: u64, train: f64, val: f64) -> Row {
        Row::Evaluation(EvaluationRow { step, eval: Losses { train, val }, accuracy: None })
    }

    #[test]
    fn lines() {
        let line = |row: &Row| serde_json::to_string(row).unwrap();
        assert_eq!(
            line(&step(0, 2.5)),
            r#"{"step":0,"tokens":768,"loss":2.5,"grad_norm":1.2345679,"lr":0.001,"tokens_per_s":15012.5}"#
        );
        assert_eq!(line(&evaluation(250, 1.5, 1.75)), r#"{"step":250,"eval":{"train":1.5,"val":1.75}}"#);
        let losses = Losses { train: 0.25, val: f64::INFINITY };
        let row = Row::Evaluation(EvaluationRow { step: 1, eval: losses, accuracy: Some(0.99) });
        assert_eq!(line(&row), r#"{"step":1,"eval":{"train":0.25,"val":null},"accuracy":0.99}"#);
        let Row::Step(mut row) = step(0, 2.5) else { panic!() };
        row.mfu = Some(0.5);
        assert!(line(&Row::Step(row)).ends_with(r#","mfu":0.5}"#));
    }

    #[test]
    fn bits_survive() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        let mut random = dataflow_kernels::random::Stream::new(1, 2);
        let mut rows = Vec::new();
        while rows.len() < 2000 {
            let (loss, wide) = (f32::from_bits(random.next_u32()), f64::from_bits(random.next_u64()));
            if loss.is_finite() && wide.is_finite() {
                rows.push(step(rows.len() as u64, loss));
                rows.push(evaluation(rows.len() as u64, wide, loss.into()));
            }
        }
        let mut file = MetricsFile::create(&path).unwrap();
        rows.iter().for_each(|row| file.record(row).unwrap());
        file.finish().unwrap();
        let again = read(&path).unwrap();
        again.iter().zip(&rows).for_each(|(again, row)| assert_eq!(again, row));
        // Equality of floats takes 0 for -0, so compare the text as well.
        assert_eq!(serde_json::to_string(&again).unwrap(), serde_json::to_string(&rows).unwrap());
    }

    #[test]
    fn null_is_read_as_nan() {
        let text = serde_json::to_string(&step(1, f32::NAN)).unwrap();
        let Row::Step(row) = serde_json::from_str(&text).unwrap() else { panic!() };
        assert!(row.loss.is_nan());
    }

    #[test]
    fn resumes_after_a_step() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        let mut file = MetricsFile::create(&path).unwrap();
        (0..10).for_each(|n| file.record(&step(n, n as f32)).unwrap());
        file.finish().unwrap();
        // The line that a crash cut off.
        let mut text = fs::read_to_string(&path).unwrap();
        text.push_str("{\"step\":10,\"tok");
        fs::write(&path, text).unwrap();
        let (mut file, rows) = MetricsFile::resume(&path, 7).unwrap();
        assert_eq!(rows.len(), 7);
        file.record(&step(7, 70.0)).unwrap();
        file.finish().unwrap();
        let steps: Vec<u64> = read(&path).unwrap().iter().map(Row::step).collect();
        assert_eq!(steps, (0..8).collect::<Vec<_>>());
        fs::write(&path, "{\"step\":1,\"eval\":{\"train\":1,\"val\":2}}\n\nnonsense\n").unwrap();
        let message = read(&path).unwrap_err().to_string();
        assert!(message.contains("metrics.jsonl, line 3: not a row of metrics"), "{message}");
    }
}
