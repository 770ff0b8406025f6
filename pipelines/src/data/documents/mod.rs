//! Documents: a corpus as a stream of texts, read from files of many kinds and never held in memory.
//!
//! [`Corpus::find`] lists the files of a corpus in a fixed order. [`read_file`] reads one of them into a [`Sink`]: the
//! documents of a file come in the order in which they are stored.

mod archive;
#[cfg(feature = "hub")]
pub mod hub;
mod jsonl;
mod parquet;
mod raw;
mod text;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::download::DownloadError;
pub use raw::Progress;

/// How documents are found in files.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Format {
    /// The field of a JSON line, or the column of a Parquet file, that holds the text.
    pub field: String,
    /// Which members of archives are documents (see [`super::archive::matches`]); by default those of a known kind.
    pub members: Option<String>,
    /// What separates the documents of a text file; without it a file is one document.
    pub separator: Option<String>,
}

/// Takes documents, in parts.
pub trait Sink {
    /// More of the current document.
    ///
    /// # Errors
    /// [`ReadError::Stopped`] if no more is wanted.
    fn text(&mut self, bytes: &[u8]) -> Result<(), ReadError>;

    /// The current document is whole.
    ///
    /// # Errors
    /// [`ReadError::Stopped`] if no more is wanted.
    fn end(&mut self) -> Result<(), ReadError>;
}

/// Why the documents of a file do not come to an end.
#[derive(Debug)]
pub enum ReadError {
    /// The file is wrong.
    Source(DocumentError),
    /// The sink wants no more.
    Stopped,
}

impl From<DocumentError> for ReadError {
    fn from(error: DocumentError) -> Self {
        ReadError::Source(error)
    }
}

/// Why documents cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum DocumentError {
    /// The list is empty.
    #[error("the list of sources is empty; give files or folders: --set 'documents.from=[\"corpus.jsonl.gz\"]'")]
    NoSources,
    /// A source cannot be opened.
    #[error("cannot read {}: {source}{}", path.display(), missing(source))]
    Open {
        /// The file or folder.
        path: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
    /// A folder has nothing to read.
    #[error(
        "{} has no files with documents ({}); {KINDS}",
        path.display(),
        if *others == 0 { "it is empty".into() } else { format!("it has {others} files of other kinds") }
    )]
    NoFiles {
        /// The folder.
        path: PathBuf,
        /// How many files were passed over.
        others: usize,
    },
    /// A file's name says nothing.
    #[error("{} is of no known kind; {KINDS}", .0.display())]
    UnknownKind(PathBuf),
    /// An archive has no documents.
    #[error("{name} has no members {wanted}; it has {}", listed(members))]
    NoMembers {
        /// The archive.
        name: String,
        /// What was looked for.
        wanted: String,
        /// Some of its members.
        members: Vec<String>,
    },
    /// The content is not what the name says, or was cut off.
    #[error("{name} is damaged or not what its name says: {reason} ({position})")]
    Damaged {
        /// The file, and the member in it.
        name: String,
        /// What reading failed at.
        reason: String,
        /// Where.
        position: String,
    },
    /// A line or row has no text.
    #[error("{name}: {position}: {reason}")]
    NoText {
        /// The file, and the member in it.
        name: String,
        /// The line or row.
        position: String,
        /// What is wrong with it.
        reason: String,
    },
    /// An address cannot be used.
    #[error("{0}")]
    Address(String),
    /// A file of the web cannot be had.
    #[error(transparent)]
    Download(#[from] DownloadError),
}

const KINDS: &str = "known are .txt, .jsonl, .parquet, .tar and .zip, each but .zip also as .gz, .xz or .zst";

fn missing(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::NotFound => "; give the files of the corpus: --set 'documents.from=[\"corpus.jsonl.gz\"]'",
        _ => "",
    }
}

fn listed(members: &[String]) -> String {
    match members {
        [] => "none".into(),
        members => members.join(", "),
    }
}

/// A file of a corpus.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SourceFile {
    /// Where it is.
    pub path: PathBuf,
    /// Its name in the corpus: what the pipeline calls it, and the path in the folder.
    pub name: String,
    /// Its length.
    pub bytes: u64,
    /// When it was changed, in nanoseconds; 0 if that is not known.
    pub modified: u64,
    /// Its SHA-256, where the source tells one and it was checked.
    pub sha256: Option<String>,
}

/// The files of a corpus, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Corpus {
    /// The files.
    pub files: Vec<SourceFile>,
}

impl Corpus {
    /// Lists the files of `sources`, each a file, a folder, an address (`https://…#sha256=…`) or a dataset of the
    /// Hugging Face hub (`hf://datasets/owner/name`). What comes from the web is kept in `cache`. Files of a folder are
    /// sorted by their paths.
    ///
    /// # Errors
    /// Sources that do not exist or have nothing to read.
    pub fn find(sources: &[String], cache: &Path) -> Result<Corpus, DocumentError> {
        if sources.is_empty() {
            return Err(DocumentError::NoSources);
        }
        let mut files = Vec::new();
        for source in sources {
            if source.starts_with("hf://") {
                files.extend(hub_files(source, cache)?);
            } else if source.starts_with("https://") || source.starts_with("http://") {
                files.push(downloaded(source, cache)?);
            } else {
                local(Path::new(source), source, &mut files)?;
            }
        }
        Ok(Corpus { files })
    }

    /// The bytes of all files.
    pub fn bytes(&self) -> u64 {
        self.files.iter().map(|file| file.bytes).sum()
    }
}

#[cfg(feature = "hub")]
fn hub_files(source: &str, cache: &Path) -> Result<Vec<SourceFile>, DocumentError> {
    hub::files(source, cache)
}

#[cfg(not(feature = "hub"))]
fn hub_files(source: &str, _: &Path) -> Result<Vec<SourceFile>, DocumentError> {
    let message = format!("{source}: this program was built without the feature `hub`; build it with --features hub");
    Err(DocumentError::Address(message))
}

fn downloaded(source: &str, cache: &Path) -> Result<SourceFile, DocumentError> {
    let Some((url, sha256)) = source.split_once("#sha256=") else {
        let message =
            format!("{source}: the hash of the file is missing; write {source}#sha256=…, as sha256sum prints");
        return Err(DocumentError::Address(message));
    };
    if kind(url).is_none() {
        return Err(DocumentError::UnknownKind(url.into()));
    }
    let path = super::download::fetch(url, sha256, cache)?;
    let mut file = described(&path, source)?;
    file.sha256 = Some(sha256.to_lowercase());
    Ok(file)
}

fn local(path: &Path, name: &str, files: &mut Vec<SourceFile>) -> Result<(), DocumentError> {
    let open = |source| DocumentError::Open { path: path.into(), source };
    if !fs::metadata(path).map_err(open)?.is_dir() {
        if kind(name).is_none() {
            return Err(DocumentError::UnknownKind(path.into()));
        }
        files.push(described(path, name)?);
        return Ok(());
    }
    let (mut found, mut others) = (Vec::new(), 0);
    walk(path, "", &mut found, &mut others)?;
    if found.is_empty() {
        return Err(DocumentError::NoFiles { path: path.into(), others });
    }
    found.sort();
    for inner in found {
        files.push(described(&path.join(&inner), &format!("{}/{inner}", name.trim_end_matches('/')))?);
    }
    Ok(())
}

/// Collects the paths of the files below a folder; hidden ones are passed over.
fn walk(folder: &Path, prefix: &str, found: &mut Vec<String>, others: &mut usize) -> Result<(), DocumentError> {
    let open = |source| DocumentError::Open { path: folder.into(), source };
    for entry in fs::read_dir(folder).map_err(open)? {
        let entry = entry.map_err(open)?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.starts_with('.') {
            continue;
        }
        let inner = format!("{prefix}{name}");
        // follows links; one that leads nowhere is reported when it is opened
        if fs::metadata(entry.path()).is_ok_and(|metadata| metadata.is_dir()) {
            walk(&entry.path(), &format!("{inner}/"), found, others)?;
        } else if kind(&name).is_some() {
            found.push(inner);
        } else {
            *others += 1;
        }
    }
    Ok(())
}

fn described(path: &Path, name: &str) -> Result<SourceFile, DocumentError> {
    let open = |source| DocumentError::Open { path: path.into(), source };
    let metadata = fs::metadata(path).map_err(open)?;
    let since = |time: std::time::SystemTime| time.duration_since(std::time::UNIX_EPOCH).ok();
    let modified = metadata.modified().ok().and_then(since).map_or(0, |duration| duration.as_nanos() as u64);
    Ok(SourceFile { path: path.into(), name: name.into(), bytes: metadata.len(), modified, sha256: None })
}

/// What a file holds, by the end of its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Text,
    JsonLines,
    Parquet,
    Tar,
    Zip,
    /// Compressed, of a kind that shows only when it is unpacked: a tar archive or a text.
    Unnamed,
}

/// How a file is compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Packing {
    Gzip,
    Xz,
    Zstd,
}

/// The kind of a file, or `None` if its name does not tell.
fn kind(name: &str) -> Option<(Kind, Option<Packing>)> {
    let name = name.to_lowercase();
    let endings = [
        (".gz", Packing::Gzip, ""),
        (".tgz", Packing::Gzip, ".tar"),
        (".xz", Packing::Xz, ""),
        (".txz", Packing::Xz, ".tar"),
        (".zst", Packing::Zstd, ""),
        (".tzst", Packing::Zstd, ".tar"),
    ];
    for (ending, packing, inner) in endings {
        if let Some(rest) = name.strip_suffix(ending) {
            let kind = plain_kind(&format!("{rest}{inner}")).unwrap_or(Kind::Unnamed);
            return Some((kind, Some(packing)));
        }
    }
    plain_kind(&name).map(|kind| (kind, None))
}

fn plain_kind(name: &str) -> Option<Kind> {
    let (_, extension) = name.rsplit_once('.')?;
    Some(match extension {
        "txt" | "text" => Kind::Text,
        "jsonl" | "ndjson" => Kind::JsonLines,
        "parquet" => Kind::Parquet,
        "tar" => Kind::Tar,
        "zip" => Kind::Zip,
        _ => return None,
    })
}

/// The SHA-256 of a file.
///
/// # Errors
/// If it cannot be read.
pub fn hash_of(file: &SourceFile) -> Result<String, DocumentError> {
    let open = |source| DocumentError::Open { path: file.path.clone(), source };
    fs::File::open(&file.path).and_then(|handle| raw::hash_of(&handle)).map_err(open)
}

/// Reads all documents of a file into `sink`. `progress` counts the bytes of the file that were read.
///
/// Returns the SHA-256 of the file's bytes.
///
/// # Errors
/// What is wrong with the file, and where; or that the sink wants no more.
pub fn read_file(
    file: &SourceFile,
    format: &Format,
    progress: &Progress,
    sink: &mut dyn Sink,
) -> Result<String, ReadError> {
    archive::read_file(file, format, progress, sink)
}

#[cfg(test)]
pub(crate) mod tests;
