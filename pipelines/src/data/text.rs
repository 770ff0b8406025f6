//! Texts: the first of a list of sources that is at hand.

use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::archive::{self, ArchiveError};
use super::download::{self, DownloadError};

/// A place a text may come from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub enum TextSource {
    /// `File("data/input.txt")`: a text file.
    File(PathBuf),
    /// `Archive(path: "nanoGPT.tar.gz", member: "*/input.txt")`: one file of a `.tar.gz`, `.tgz`, `.tar`
    /// or `.zip` archive.
    Archive {
        /// The archive.
        path: PathBuf,
        /// The path inside it: `*` stands for any part of a name, `**` also for folders, `?` for one
        /// character.
        member: String,
    },
    /// `Url(url: "https://…", sha256: "…")`: a text file on the web, kept in the cache folder.
    Url {
        /// An `http://` or `https://` address.
        url: String,
        /// The SHA-256 of the file, 64 hexadecimal digits.
        sha256: String,
    },
}

impl fmt::Display for TextSource {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            TextSource::File(path) => write!(f, "{}", path.display()),
            TextSource::Archive { path, member } => write!(f, "{} of {}", member, path.display()),
            TextSource::Url { url, .. } => f.write_str(url),
        }
    }
}

/// A text and where it came from.
#[derive(Clone, Debug)]
pub struct Text {
    /// The characters.
    pub text: String,
    /// The file, archive member or address they came from, for messages.
    pub origin: String,
    /// The SHA-256 of the UTF-8 bytes, in hexadecimal.
    pub sha256: String,
}

/// Why there is no text.
#[derive(Debug, thiserror::Error)]
pub enum TextError {
    /// The list is empty.
    #[error("the list of text sources is empty; give one: {HOW_TO_GIVE_A_FILE}")]
    NoSources,
    /// No source of the list is at hand.
    #[error("no text at hand; tried in this order:\n{}give a file: {HOW_TO_GIVE_A_FILE}", listed(.0))]
    NoneAtHand(Vec<Absent>),
    /// The source is there and cannot be read.
    #[error("cannot read {origin}: {source}")]
    Read {
        /// The source.
        origin: String,
        /// What the operating system said.
        source: io::Error,
    },
    /// The source is there and has no content.
    #[error("{origin} is empty; a text needs at least a few characters")]
    Empty {
        /// The source.
        origin: String,
    },
    /// The source is there and is not text.
    #[error(
        "{origin} is not valid UTF-8: byte 0x{byte:02x} at offset {offset} (line {line}); \
         convert the file to UTF-8, for example with: iconv -f latin1 -t utf-8"
    )]
    InvalidUtf8 {
        /// The source.
        origin: String,
        /// How many bytes come before the first wrong one.
        offset: usize,
        /// Its line, counted from one.
        line: usize,
        /// The wrong byte.
        byte: u8,
    },
    /// The archive is there and the member is not to be had.
    #[error(transparent)]
    Archive(#[from] ArchiveError),
    /// The address answered with something else, or the cache cannot be written.
    #[error(transparent)]
    Download(#[from] DownloadError),
}

const HOW_TO_GIVE_A_FILE: &str = "--set 'text.from=[File(\"path/to/a.txt\")]'";

/// A source that was not at hand.
#[derive(Debug)]
pub struct Absent {
    /// The source.
    pub source: String,
    /// Why it is not at hand.
    pub reason: String,
}

fn listed(absent: &[Absent]) -> String {
    absent.iter().map(|Absent { source, reason }| format!("  {source}: {reason}\n")).collect()
}

/// Reads the first source that is at hand. A missing file, or an address that cannot be reached, moves on
/// to the next source; a source that is there and damaged is an error, since silently training on another
/// text would be worse. Relative paths start at the current folder; downloads are kept in `cache`.
pub fn load(sources: &[TextSource], cache: &Path) -> Result<Text, TextError> {
    if sources.is_empty() {
        return Err(TextError::NoSources);
    }
    let mut absent = Vec::new();
    for source in sources {
        match fetch(source, cache)? {
            Ok(bytes) => return decode(bytes, source.to_string()),
            Err(reason) => absent.push(Absent { source: source.to_string(), reason }),
        }
    }
    Err(TextError::NoneAtHand(absent))
}

/// The bytes of a source, or the reason why it is not at hand.
fn fetch(source: &TextSource, cache: &Path) -> Result<Result<Vec<u8>, String>, TextError> {
    let local = match source {
        TextSource::File(path) | TextSource::Archive { path, .. } => Some(path),
        TextSource::Url { .. } => None,
    };
    if let Some(path) = local {
        match fs::metadata(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Err("no such file".into())),
            Err(error) => return Err(TextError::Read { origin: source.to_string(), source: error }),
            Ok(metadata) if metadata.is_dir() => {
                let error = io::Error::new(io::ErrorKind::IsADirectory, "this is a folder, not a file");
                return Err(TextError::Read { origin: source.to_string(), source: error });
            }
            Ok(_) => {}
        }
    }
    match source {
        TextSource::File(path) => match fs::read(path) {
            Ok(bytes) => Ok(Ok(bytes)),
            Err(error) => Err(TextError::Read { origin: source.to_string(), source: error }),
        },
        TextSource::Archive { path, member } => Ok(Ok(archive::read_member(path, member)?)),
        TextSource::Url { url, sha256 } => match download::fetch(url, sha256, cache) {
            Ok(path) => fs::read(&path)
                .map(Ok)
                .map_err(|error| TextError::Read { origin: path.display().to_string(), source: error }),
            Err(DownloadError::Unreachable { reason, .. }) => Ok(Err(reason)),
            Err(error) => Err(error.into()),
        },
    }
}

fn decode(bytes: Vec<u8>, origin: String) -> Result<Text, TextError> {
    if bytes.is_empty() {
        return Err(TextError::Empty { origin });
    }
    let sha256 = hexadecimal(&Sha256::digest(&bytes));
    match String::from_utf8(bytes) {
        Ok(text) => Ok(Text { text, origin, sha256 }),
        Err(error) => {
            let offset = error.utf8_error().valid_up_to();
            let bytes = error.as_bytes();
            let line = 1 + bytes[..offset].iter().filter(|&&byte| byte == b'\n').count();
            Err(TextError::InvalidUtf8 { origin, offset, line, byte: bytes[offset] })
        }
    }
}

/// Bytes as lower-case hexadecimal digits.
pub(crate) fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ron_forms() {
        let sources: Vec<TextSource> = ron::from_str(
            r#"[File("a.txt"), Archive(path: "x.tar.gz", member: "*/input.txt"), Url(url: "https://a.b/c", sha256: "00")]"#,
        )
        .unwrap();
        assert_eq!(sources[0], TextSource::File("a.txt".into()));
        assert_eq!(sources[1], TextSource::Archive { path: "x.tar.gz".into(), member: "*/input.txt".into() });
        let again: Vec<TextSource> = ron::from_str(&ron::to_string(&sources).unwrap()).unwrap();
        assert_eq!(again, sources);
        let error = ron::from_str::<TextSource>(r#"Archive(path: "x.zip", membre: "a")"#).unwrap_err();
        assert!(error.to_string().contains("membre"), "{error}");
    }

    #[test]
    fn the_first_at_hand_wins() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.txt");
        fs::write(&path, "hé\n").unwrap();
        let sources = [TextSource::File(folder.path().join("none.txt")), TextSource::File(path.clone())];
        let text = load(&sources, folder.path()).unwrap();
        assert_eq!(text.text, "hé\n");
        assert_eq!(text.origin, path.display().to_string());
        assert_eq!(text.sha256, hexadecimal(&Sha256::digest("hé\n")));
    }

    #[test]
    fn none_at_hand_lists_what_was_tried() {
        let folder = tempfile::tempdir().unwrap();
        let sources = [
            TextSource::File("no/such/file.txt".into()),
            TextSource::Archive { path: "no/such/archive.zip".into(), member: "*".into() },
        ];
        let message = load(&sources, folder.path()).unwrap_err().to_string();
        assert!(message.contains("no/such/file.txt: no such file"), "{message}");
        assert!(message.contains("* of no/such/archive.zip: no such file"), "{message}");
        assert!(message.contains(r#"--set 'text.from=[File("path/to/a.txt")]'"#), "{message}");
        assert!(load(&[], folder.path()).unwrap_err().to_string().contains("is empty"));
    }

    #[test]
    fn damaged_files_are_errors_even_before_a_good_one() {
        let folder = tempfile::tempdir().unwrap();
        let good = folder.path().join("good.txt");
        let bad = folder.path().join("bad.txt");
        let empty = folder.path().join("empty.txt");
        fs::write(&good, "good").unwrap();
        fs::write(&bad, b"one\ntwo\nthr\xe9e\n").unwrap();
        fs::write(&empty, "").unwrap();
        let message = |path: &Path| {
            let sources = [TextSource::File(path.into()), TextSource::File(good.clone())];
            load(&sources, folder.path()).unwrap_err().to_string()
        };
        let text = message(&bad);
        assert!(text.contains("bad.txt is not valid UTF-8: byte 0xe9 at offset 11 (line 3)"), "{text}");
        assert!(message(&empty).contains("empty.txt is empty"));
        assert!(message(folder.path()).contains("folder, not a file"));
    }
}
