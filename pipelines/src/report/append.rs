//! A file that grows while a run goes on, and outlives a full disk and a removed folder.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use crate::files::{self, FileError};

/// What is appended waits in memory until the disk takes it.
#[derive(Debug)]
pub struct AppendFile {
    path: PathBuf,
    file: File,
    waiting: Vec<u8>,
}

impl AppendFile {
    /// An empty file in place of what is there.
    ///
    /// # Errors
    /// What the operating system says.
    pub fn create(path: &Path) -> Result<Self, FileError> {
        files::create_folder(files::parent(path))?;
        Self::open(path, OpenOptions::new().read(true).write(true).create(true).truncate(true))
    }

    /// A file that must not be there yet.
    ///
    /// # Errors
    /// What the operating system says.
    pub fn create_new(path: &Path) -> Result<Self, FileError> {
        Self::open(path, OpenOptions::new().read(true).write(true).create_new(true))
    }

    /// A file that is there.
    ///
    /// # Errors
    /// What the operating system says.
    pub fn extend(path: &Path) -> Result<Self, FileError> {
        Self::open(path, OpenOptions::new().read(true).append(true))
    }

    fn open(path: &Path, options: &OpenOptions) -> Result<Self, FileError> {
        let file = options.open(path).map_err(FileError::on("write", path))?;
        Ok(Self { path: path.into(), file, waiting: Vec::new() })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Appends, without touching the disk yet.
    pub fn push(&mut self, bytes: &[u8]) {
        self.waiting.extend_from_slice(bytes);
    }

    /// Writes what waits. What the disk does not take goes on waiting.
    ///
    /// # Errors
    /// What the operating system says.
    pub fn flush(&mut self) -> Result<(), FileError> {
        if self.waiting.is_empty() {
            return Ok(());
        }
        if !is_at(&self.file, &self.path) {
            self.restore().map_err(FileError::on("write", &self.path))?;
        }
        let mut written = 0;
        let result = loop {
            match self.file.write(&self.waiting[written..]) {
                Ok(0) => break Ok(()),
                Ok(bytes) => written += bytes,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => break Err(error),
            }
        };
        self.waiting.drain(..written);
        result.map_err(FileError::on("write", &self.path))
    }

    /// Makes what was written durable.
    ///
    /// # Errors
    /// What the operating system says.
    pub fn sync(&mut self) -> Result<(), FileError> {
        self.flush()?;
        // devices and pipes cannot be synced
        match self.file.sync_all() {
            Err(error) if error.kind() != io::ErrorKind::InvalidInput => {
                Err(error).map_err(FileError::on("write", &self.path))
            }
            _ => Ok(()),
        }
    }

    /// Writes everything anew at the path. A removed file can still be read by who has it open.
    fn restore(&mut self) -> io::Result<()> {
        let mut before = Vec::new();
        self.file.seek(SeekFrom::Start(0))?;
        self.file.read_to_end(&mut before)?;
        fs::create_dir_all(files::parent(&self.path))?;
        let mut file = OpenOptions::new().read(true).write(true).create(true).truncate(true).open(&self.path)?;
        if let Err(error) = file.write_all(&before) {
            // the old file keeps what it has, and the next try starts anew
            let _ = fs::remove_file(&self.path);
            return Err(error);
        }
        self.file = file;
        Ok(())
    }
}

/// Whether the open file is still the one of this name.
#[cfg(unix)]
fn is_at(file: &File, path: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    let (Ok(open), Ok(named)) = (file.metadata(), fs::metadata(path)) else { return false };
    (open.dev(), open.ino()) == (named.dev(), named.ino())
}

/// Whether the open file is still the one of this name: where open files cannot be removed, it is.
#[cfg(not(unix))]
fn is_at(_: &File, _: &Path) -> bool {
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_appended_is_there() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a/rows");
        let mut file = AppendFile::create(&path).unwrap();
        file.push(b"one\n");
        file.sync().unwrap();
        drop(file);
        let mut file = AppendFile::extend(&path).unwrap();
        file.push(b"two\n");
        assert_eq!(fs::read(&path).unwrap(), b"one\n");
        file.flush().unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"one\ntwo\n");
        assert!(AppendFile::create_new(&path).is_err());
    }

    #[test]
    #[cfg(unix)]
    fn a_removed_folder_comes_back_with_all_that_was_in_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a/rows");
        for resumed in [false, true] {
            let mut file = AppendFile::create(&path).unwrap();
            file.push(b"one\n");
            file.flush().unwrap();
            if resumed {
                file = AppendFile::extend(&path).unwrap();
            }
            fs::remove_dir_all(folder.path().join("a")).unwrap();
            file.push(b"two\n");
            file.flush().unwrap();
            file.push(b"three\n");
            file.flush().unwrap();
            assert_eq!(fs::read(&path).unwrap(), b"one\ntwo\nthree\n");
        }
    }
}
