//! The checkpoints of a run: folders that are whole or not there.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use super::sidecar::{FileSum, Sidecar};
use super::tensors::{self, Tensors};
use super::{CheckpointError, Snapshot};
use crate::data::text::hexadecimal;
use crate::files::{self, FileError};

/// The parameters.
pub const WEIGHTS: &str = "weights.safetensors";
/// Moments and counters.
pub const OPTIMIZER: &str = "optimizer.safetensors";
/// Everything else.
pub const SIDECAR: &str = "checkpoint.ron";

/// Checkpoints that were kept for another reason than to resume.
const BEST: &str = "best";
/// All others.
const STEP: &str = "step";

/// The folder `checkpoints` of a run.
#[derive(Clone, Debug)]
pub struct Store {
    path: PathBuf,
}

/// The name of a checkpoint: `step-00000250` or `best-00000250`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Entry {
    /// Updates made.
    pub step: u64,
    /// Whether it is kept for its validation loss.
    pub best: bool,
}

impl Entry {
    /// The name of its folder.
    pub fn name(self) -> String {
        format!("{}-{:08}", if self.best { BEST } else { STEP }, self.step)
    }

    fn parse(name: &str) -> Option<Self> {
        let (kind, number) = name.split_once('-')?;
        let best = match kind {
            BEST => true,
            STEP => false,
            _ => return None,
        };
        Some(Self { step: number.parse().ok()?, best })
    }
}

/// The checkpoint that was asked for, if one is whole, and what is wrong with those that would have come before it.
pub type Selection = (Option<(Entry, Verified)>, Vec<CheckpointError>);

/// A checkpoint whose files agree with their checksums.
#[derive(Debug)]
pub struct Verified {
    /// Its folder.
    pub path: PathBuf,
    /// Where the run was.
    pub sidecar: Sidecar,
    weights: Vec<u8>,
    optimizer: Vec<u8>,
}

impl Verified {
    /// Reads a checkpoint's files and checks every byte.
    ///
    /// # Errors
    /// A file that is missing or damaged.
    pub fn open(path: &Path) -> Result<Self, CheckpointError> {
        let file = path.join(SIDECAR);
        let sidecar = Sidecar::parse(&file, &fs::read(&file).map_err(FileError::on("read", &file))?)?;
        let read = |name: &str| match sidecar.files.iter().find(|f| f.name == name) {
            Some(sum) => read_checked(&path.join(name), sum),
            None => Ok(Vec::new()),
        };
        let (weights, optimizer) = (read(WEIGHTS)?, read(OPTIMIZER)?);
        Ok(Self { path: path.into(), sidecar, weights, optimizer })
    }

    /// The parameters and the notes beside them.
    ///
    /// # Errors
    /// If the program that wrote them wrote no tensors.
    pub fn parameters(&self) -> Result<(Tensors, std::collections::BTreeMap<String, String>), CheckpointError> {
        let damaged = |what| CheckpointError::Damaged { path: self.path.join(WEIGHTS), what };
        tensors::parse(&self.weights).map_err(damaged)
    }

    /// Moments and counters.
    ///
    /// # Errors
    /// If the program that wrote them wrote no tensors.
    pub fn states(&self) -> Result<Tensors, CheckpointError> {
        let path = self.path.join(OPTIMIZER);
        if self.optimizer.is_empty() {
            let what = "there is none: an imported model is no run to resume".into();
            return Err(CheckpointError::Damaged { path, what });
        }
        tensors::parse(&self.optimizer).map(|t| t.0).map_err(|what| CheckpointError::Damaged { path, what })
    }
}

fn read_checked(path: &Path, sum: &FileSum) -> Result<Vec<u8>, CheckpointError> {
    let damaged = |what: String| CheckpointError::Damaged { path: path.into(), what };
    let bytes = fs::read(path).map_err(FileError::on("read", path))?;
    if bytes.len() as u64 != sum.bytes {
        return Err(damaged(format!("it has {} bytes and had {}", bytes.len(), sum.bytes)));
    }
    match hexadecimal(&Sha256::digest(&bytes)) == sum.sha256 {
        true => Ok(bytes),
        false => Err(damaged("its checksum is another one".into())),
    }
}

impl Store {
    /// The checkpoints of a run folder, which need not be there yet.
    pub fn of(run: &Path) -> Self {
        Self { path: run.join("checkpoints") }
    }

    /// Where a checkpoint is or will be.
    pub fn path(&self, entry: Entry) -> PathBuf {
        self.path.join(entry.name())
    }

    /// All checkpoints, whole or damaged, the latest first; of one step, those to resume from first.
    ///
    /// # Errors
    /// If the folder is there and cannot be listed.
    pub fn list(&self) -> Result<Vec<Entry>, FileError> {
        let entries = match fs::read_dir(&self.path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            other => other.map_err(FileError::on("list", &self.path))?,
        };
        let mut found: Vec<Entry> = entries.flatten().filter_map(|e| Entry::parse(e.file_name().to_str()?)).collect();
        found.sort_by_key(|e| (std::cmp::Reverse(e.step), e.best));
        Ok(found)
    }

    /// The latest checkpoint that is whole, and what is wrong with later ones.
    ///
    /// # Errors
    /// If the folder cannot be listed.
    pub fn latest(&self) -> Result<Selection, FileError> {
        self.first(self.list()?)
    }

    /// The checkpoint of the lowest validation loss if the run keeps it, else the latest one that is whole.
    ///
    /// # Errors
    /// If the folder cannot be listed.
    pub fn best(&self) -> Result<Selection, FileError> {
        let mut list = self.list()?;
        list.sort_by_key(|e| !e.best);
        self.first(list)
    }

    fn first(&self, list: Vec<Entry>) -> Result<Selection, FileError> {
        let mut damaged = Vec::new();
        for entry in list {
            match Verified::open(&self.path(entry)) {
                Ok(verified) => return Ok((Some((entry, verified)), damaged)),
                Err(error) => damaged.push(error),
            }
        }
        Ok((None, damaged))
    }

    /// Writes a checkpoint. It has its name only when all of it is on the disk.
    ///
    /// # Errors
    /// What the operating system says; what was there before is untouched.
    pub fn save(&self, entry: Entry, snapshot: &Snapshot) -> Result<(), FileError> {
        files::create_folder(&self.path)?;
        let hidden = |what: &str| self.path.join(format!(".{}.{what}-{}", entry.name(), std::process::id()));
        let (temporary, path) = (hidden("tmp"), self.path(entry));
        let written = self.write(&temporary, snapshot).and_then(|()| {
            // a folder cannot be renamed over another one
            let old = hidden("old");
            let replaces = path.exists();
            if replaces {
                fs::rename(&path, &old).map_err(FileError::on("replace", &path))?;
            }
            fs::rename(&temporary, &path).map_err(FileError::on("write", &path))?;
            if replaces {
                let _ = fs::remove_dir_all(&old);
            }
            Ok(())
        });
        if written.is_err() {
            // the error that led here matters more
            let _ = fs::remove_dir_all(&temporary);
        }
        sync_folder(&self.path);
        written
    }

    fn write(&self, folder: &Path, snapshot: &Snapshot) -> Result<(), FileError> {
        if folder.exists() {
            fs::remove_dir_all(folder).map_err(FileError::on("replace", folder))?;
        }
        fs::create_dir(folder).map_err(FileError::on("create the folder", folder))?;
        let mut sidecar = snapshot.sidecar.clone();
        sidecar.files.push(tensors::write(&folder.join(WEIGHTS), &snapshot.parameters, &snapshot.notes)?);
        if let Some(states) = &snapshot.states {
            sidecar.files.push(tensors::write(&folder.join(OPTIMIZER), states, &Default::default())?);
        }
        let path = folder.join(SIDECAR);
        let write = || {
            let mut file = File::create(&path)?;
            file.write_all(sidecar.to_text().map_err(io::Error::other)?.as_bytes())?;
            file.sync_all()
        };
        write().map_err(FileError::on("write", &path))?;
        sync_folder(folder);
        Ok(())
    }

    /// Gives the weights of a checkpoint a name in the run folder as well: a second name of one file, which takes no
    /// space, or a copy where the file system has no such thing.
    ///
    /// # Errors
    /// What the operating system says.
    pub fn publish(&self, entry: Entry, target: &Path) -> Result<(), FileError> {
        let weights = self.path(entry).join(WEIGHTS);
        let mut hidden = std::ffi::OsString::from(".");
        hidden.push(target.file_name().unwrap_or_default());
        hidden.push(format!(".{}.tmp", std::process::id()));
        let temporary = files::parent(target).join(hidden);
        let _ = fs::remove_file(&temporary);
        let named = fs::hard_link(&weights, &temporary)
            .or_else(|_| fs::copy(&weights, &temporary).and_then(|_| File::open(&temporary)?.sync_all()))
            .and_then(|()| fs::rename(&temporary, target))
            .map_err(FileError::on("write", target));
        // renaming one name of a file over another name of the same file leaves both
        let _ = fs::remove_file(&temporary);
        named
    }

    /// Removes a checkpoint.
    ///
    /// # Errors
    /// What the operating system says.
    pub fn remove(&self, entry: Entry) -> Result<(), FileError> {
        let path = self.path(entry);
        // a half-removed checkpoint must not look like one
        let hidden = self.path.join(format!(".{}.old-{}", entry.name(), std::process::id()));
        fs::rename(&path, &hidden).and_then(|()| fs::remove_dir_all(&hidden)).map_err(FileError::on("remove", &path))
    }

    /// Removes what a run that was killed left half-written, and checkpoints after `step`: that is where the run goes on
    /// from, so they are damaged, and will be written again.
    ///
    /// # Errors
    /// If a checkpoint cannot be removed.
    pub fn sweep(&self, step: u64) -> Result<(), FileError> {
        let hidden = |e: &fs::DirEntry| e.file_name().to_string_lossy().starts_with('.');
        for entry in fs::read_dir(&self.path).into_iter().flatten().flatten().filter(hidden) {
            let _ = fs::remove_dir_all(entry.path());
        }
        self.list()?.into_iter().filter(|e| e.step > step).try_for_each(|e| self.remove(e))
    }
}

/// Makes the names in a folder durable. Systems that cannot (Windows, some network file systems) say so; the files
/// themselves are safe by then.
fn sync_folder(path: &Path) {
    #[cfg(unix)]
    let _ = File::open(path).and_then(|folder| folder.sync_all());
    #[cfg(not(unix))]
    let _ = path;
}
