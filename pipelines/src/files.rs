//! Files that are either whole or not there.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

/// What the operating system refused to do with a file or folder.
#[derive(Debug, thiserror::Error)]
#[error("cannot {action} {}: {source}{}", path.display(), advice(source))]
pub struct FileError {
    /// What was tried, as a verb: `"write"`, `"create the folder"`.
    pub action: &'static str,
    /// The file or folder it was tried on.
    pub path: PathBuf,
    /// What the operating system said.
    pub source: io::Error,
}

impl FileError {
    /// For `Result::map_err`: `.map_err(FileError::on("read", path))`.
    pub fn on(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> FileError {
        let path = path.to_path_buf();
        move |source| FileError { action, path, source }
    }
}

fn advice(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => "; free some space or choose another folder",
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
            "; check the permissions or choose another folder"
        }
        io::ErrorKind::AlreadyExists | io::ErrorKind::NotADirectory => "; a file is in the way: choose another path",
        _ => "",
    }
}

/// Writes `path` so that a reader, or a crash at any moment, finds the old content or the new one and
/// never a part: the content goes to a temporary name in the same folder, is synced to the disk, and is
/// then renamed over `path`. Missing parent folders are created.
pub fn write_atomically(
    path: &Path,
    write: impl FnOnce(&mut BufWriter<File>) -> io::Result<()>,
) -> Result<(), FileError> {
    let folder = parent(path);
    create_folder(folder)?;
    let temporary = Temporary::beside(path)?;
    let result = (|| {
        let mut writer = BufWriter::with_capacity(1 << 20, temporary.file.try_clone()?);
        write(&mut writer)?;
        writer.flush()?;
        temporary.file.sync_all()
    })();
    result.map_err(FileError::on("write", path))?;
    temporary.rename_to(path)
}

/// Creates a folder and its parents; one that is already there is fine.
pub fn create_folder(folder: &Path) -> Result<(), FileError> {
    fs::create_dir_all(folder).map_err(FileError::on("create the folder", folder))
}

/// The folder a path lies in; the current one for a bare file name.
pub fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// Gives a file, which must be synced, another name in its folder, and makes the name itself durable.
pub(crate) fn rename(from: &Path, to: &Path) -> Result<(), FileError> {
    fs::rename(from, to).map_err(FileError::on("write", to))?;
    // A rename lives in the folder, which has to reach the disk too. Systems that cannot sync a folder
    // (Windows, some network file systems) say so; the file itself is safe by now.
    #[cfg(unix)]
    let _ = File::open(parent(to)).and_then(|folder| folder.sync_all());
    Ok(())
}

/// A file under a temporary name, removed again unless it is renamed to its final one.
pub(crate) struct Temporary {
    path: PathBuf,
    pub(crate) file: File,
    renamed: bool,
}

impl Temporary {
    /// An empty file in the folder of `path`, where a rename cannot cross file systems.
    pub(crate) fn beside(path: &Path) -> Result<Temporary, FileError> {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let Some(name) = path.file_name() else {
            let error = io::Error::new(io::ErrorKind::InvalidInput, "the path does not end in a file name");
            return Err(FileError { action: "write", path: path.to_path_buf(), source: error });
        };
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let mut hidden = OsString::from(".");
        hidden.push(name);
        hidden.push(format!(".{}-{count}.tmp", std::process::id()));
        let temporary = parent(path).join(hidden);
        // Not `create_new`: a file of this name can only be left over from a dead process with our id.
        let file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .open(&temporary)
            .map_err(FileError::on("write", path))?;
        Ok(Temporary { path: temporary, file, renamed: false })
    }

    /// Gives the file, which must be synced, its final name, and makes the name itself durable.
    pub(crate) fn rename_to(mut self, path: &Path) -> Result<(), FileError> {
        rename(&self.path, path)?;
        self.renamed = true;
        Ok(())
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        if !self.renamed {
            // Nothing can be done about a failure here, and the error that led here matters more.
            let _ = fs::remove_file(&self.path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(folder: &Path) -> Vec<OsString> {
        fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name()).collect()
    }

    #[test]
    fn writes_and_replaces() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("new/folder/file.txt");
        write_atomically(&path, |file| file.write_all(b"first")).unwrap();
        write_atomically(&path, |file| file.write_all(b"second")).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"second");
        assert_eq!(names(path.parent().unwrap()).len(), 1, "no temporary file is left");
    }

    #[test]
    fn a_failed_write_leaves_the_old_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file.txt");
        write_atomically(&path, |file| file.write_all(b"old")).unwrap();
        let error = write_atomically(&path, |file| {
            file.write_all(b"half of the n")?;
            Err(io::Error::from(io::ErrorKind::StorageFull))
        })
        .unwrap_err();
        let message = error.to_string();
        assert!(message.contains("file.txt") && message.contains("free some space"), "{message}");
        assert_eq!(fs::read(&path).unwrap(), b"old");
        assert_eq!(names(folder.path()).len(), 1, "no temporary file is left");
    }

    #[test]
    fn odd_paths_are_errors() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("file"), b"").unwrap();
        assert!(write_atomically(&folder.path().join("file/below"), |_| Ok(())).is_err());
        assert!(write_atomically(Path::new("/"), |_| Ok(())).is_err());
        assert!(write_atomically(folder.path(), |_| Ok(())).is_err());
    }
}
