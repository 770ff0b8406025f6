//! The folder of a run.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use super::ReportError;
use crate::files::{self, FileError};

/// The pipeline as it ran: the file that makes a folder a run's.
pub const RESOLVED: &str = "resolved.ron";

/// How the run was started.
pub const ORIGIN: &str = "run.ron";

/// The tokenizer that made the tokens, where it has a file.
pub const TOKENIZER: &str = "tokenizer.json";

/// The folder that a run writes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RunFolder {
    path: PathBuf,
    /// What [`ORIGIN`] and [`RESOLVED`] hold, in the order in which they are written.
    texts: Vec<(&'static str, String)>,
}

impl RunFolder {
    /// A new folder `<pipeline>-<number>` in `runs`, with the first number that is free.
    pub fn create(runs: &Path, pipeline: &str) -> Result<RunFolder, ReportError> {
        files::create_folder(runs)?;
        let pipeline = safe(pipeline);
        let mut number = largest_number(runs, &pipeline)? + 1;
        loop {
            let path = runs.join(format!("{pipeline}-{number:03}"));
            // Creating and testing in one: two runs that start together get different folders.
            match fs::create_dir(&path) {
                Ok(()) => return Ok(RunFolder { path, texts: Vec::new() }),
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => number += 1,
                Err(source) => return Err(FileError { action: "create the folder", path, source }.into()),
            }
        }
    }

    /// The folder the user chose for a new run. It may exist, but not hold a run.
    pub fn at(path: &Path) -> Result<RunFolder, ReportError> {
        files::create_folder(path)?;
        let folder = RunFolder { path: path.into(), texts: Vec::new() };
        match folder.resolved().exists() || folder.metrics().exists() {
            true => Err(ReportError::FolderInUse(path.into())),
            false => Ok(folder),
        }
    }

    /// The folder of an earlier run.
    pub fn resume(path: &Path) -> Result<RunFolder, ReportError> {
        let folder = RunFolder { path: path.into(), texts: Vec::new() };
        match folder.resolved().is_file() {
            true => Ok(folder),
            false => Err(ReportError::NothingToResume { path: path.into(), missing: RESOLVED }),
        }
    }

    /// The folder of the latest run of a pipeline in `runs`, for `--resume` without a folder.
    pub fn latest(runs: &Path, pipeline: &str) -> Result<RunFolder, ReportError> {
        let pipeline = safe(pipeline);
        let number = largest_number(runs, &pipeline)?;
        RunFolder::resume(&runs.join(format!("{pipeline}-{number:03}")))
    }

    /// Writes how the run was started and the pipeline as it runs.
    pub fn describe(&mut self, origin: String, resolved: String) -> Result<(), FileError> {
        // the one that makes the folder a run's comes last
        self.texts = vec![(ORIGIN, origin), (RESOLVED, resolved)];
        self.texts.iter().try_for_each(|text| self.write(text))
    }

    fn write(&self, (name, text): &(&'static str, String)) -> Result<(), FileError> {
        files::write_atomically(&self.file(name), |file| file.write_all(text.as_bytes()))
    }

    /// Makes the folder and its description anew where somebody removed them; whether that was so.
    pub fn restore(&self) -> Result<bool, FileError> {
        let missing = |text: &&(&'static str, String)| !self.file(text.0).exists();
        let missing: Vec<_> = self.texts.iter().filter(missing).collect();
        missing.iter().try_for_each(|text| self.write(text))?;
        Ok(!missing.is_empty())
    }

    /// Copies a file to the folder.
    pub fn keep(&self, file: &Path, name: &str) -> Result<(), FileError> {
        let bytes = fs::read(file).map_err(FileError::on("read", file))?;
        files::write_atomically(&self.file(name), |to| to.write_all(&bytes))
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A file of the folder.
    pub fn file(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// How the run was started.
    pub fn origin(&self) -> PathBuf {
        self.file(ORIGIN)
    }

    /// The pipeline as it ran.
    pub fn resolved(&self) -> PathBuf {
        self.file(RESOLVED)
    }

    /// The rows of metrics.
    pub fn metrics(&self) -> PathBuf {
        self.file("metrics.jsonl")
    }

    /// The picture of the losses.
    pub fn curve(&self) -> PathBuf {
        self.file("loss.svg")
    }
}

/// A name that is good for a folder.
fn safe(name: &str) -> String {
    let safe = |c: char| if c.is_alphanumeric() || matches!(c, '-' | '_' | '.') { c } else { '_' };
    name.chars().map(safe).collect()
}

/// The largest number of the folders `<pipeline>-<number>`; 0 when there are none.
fn largest_number(runs: &Path, pipeline: &str) -> Result<u64, FileError> {
    let entries = match fs::read_dir(runs) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(0),
        other => other.map_err(FileError::on("list", runs))?,
    };
    let number = |name: &str| name.strip_prefix(pipeline)?.strip_prefix('-')?.parse::<u32>().ok();
    let numbers = entries.flatten().filter_map(|entry| number(entry.file_name().to_str()?));
    Ok(numbers.max().map_or(0, u64::from))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_go_up() {
        let folder = tempfile::tempdir().unwrap();
        let runs = folder.path().join("runs");
        assert!(RunFolder::create(&runs, "recall").unwrap().path().ends_with("recall-001"));
        assert!(RunFolder::create(&runs, "recall").unwrap().path().ends_with("recall-002"));
        assert!(RunFolder::create(&runs, "a/b c").unwrap().path().ends_with("a_b_c-001"));
        fs::create_dir(runs.join("recall-1234")).unwrap();
        let last = RunFolder::create(&runs, "recall").unwrap();
        assert!(last.path().ends_with("recall-1235"));
        fs::write(last.resolved(), "").unwrap();
        assert_eq!(RunFolder::latest(&runs, "recall").unwrap(), last);
    }

    #[test]
    fn a_folder_holds_one_run() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("out");
        let message = RunFolder::resume(&path).unwrap_err().to_string();
        assert!(message.contains("holds no run to resume (there is no resolved.ron)"), "{message}");
        let run = RunFolder::at(&path).unwrap();
        fs::write(run.resolved(), "").unwrap();
        let message = RunFolder::at(&path).unwrap_err().to_string();
        assert!(message.contains("already holds a run") && message.contains("--out"), "{message}");
        assert_eq!(RunFolder::resume(&path).unwrap(), run);
        assert!(RunFolder::latest(folder.path(), "none").is_err());
    }

    #[test]
    fn a_folder_that_is_gone_is_made_anew() {
        let folder = tempfile::tempdir().unwrap();
        let mut run = RunFolder::at(&folder.path().join("out")).unwrap();
        run.describe("origin".into(), "resolved".into()).unwrap();
        assert!(!run.restore().unwrap());
        fs::remove_dir_all(run.path()).unwrap();
        assert!(run.restore().unwrap());
        assert_eq!(fs::read_to_string(run.origin()).unwrap(), "origin");
        assert_eq!(fs::read_to_string(run.resolved()).unwrap(), "resolved");
    }

    #[test]
    fn a_file_in_the_way_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("file");
        fs::write(&file, "").unwrap();
        assert!(RunFolder::at(&file).unwrap_err().to_string().contains("cannot create the folder"));
        assert!(RunFolder::create(&file, "x").is_err());
    }
}
