//! From a file to its documents: decompression, and archives within archives.

use std::fs::{self, File};
use std::io::{self, Chain, Cursor, Read, Seek, SeekFrom};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};

use super::super::archive::matches;
use super::raw::{Progress, Raw, buffered, hash_of};
use super::text::TextError;
use super::{DocumentError, Format, Kind, Packing, ReadError, Sink, SourceFile, jsonl, kind, parquet, text};

/// Archives inside of archives that are opened.
const DEEPEST: usize = 8;

/// Members that an error message lists.
const LISTED: usize = 8;

pub(super) fn read_file(
    file: &SourceFile,
    format: &Format,
    progress: &Progress,
    sink: &mut dyn Sink,
) -> Result<String, ReadError> {
    let open = |source| DocumentError::Open { path: file.path.clone(), source };
    let handle = File::open(&file.path).map_err(open)?;
    let (kind, packing) =
        kind(&file.path.to_string_lossy()).ok_or_else(|| DocumentError::UnknownKind(file.path.clone()))?;
    let mut walk = Walk {
        format,
        progress,
        bytes: file.bytes,
        sink,
        depth: 0,
        found: 0,
        seen: Vec::new(),
        in_archive: matches!(kind, Kind::Tar | Kind::Zip),
    };
    let name = file.path.to_string_lossy();
    let hash = if packing.is_none() && matches!(kind, Kind::Parquet | Kind::Zip) {
        let hash = match &file.sha256 {
            Some(known) => known.clone(),
            None => hash_of(&handle).map_err(open)?,
        };
        progress.set(0);
        walk.seekable(&name, handle, kind)?;
        hash
    } else {
        let mut raw = Raw::new(handle, progress);
        walk.packed(&name, &mut raw, kind, packing, true)?;
        raw.finish().map_err(open)?
    };
    if walk.in_archive && walk.found == 0 {
        let wanted = match &format.members {
            Some(pattern) => format!("that match {pattern:?}"),
            None => "of a known kind (.txt, .jsonl, .parquet); name them: --set documents.members=\"**\"".into(),
        };
        return Err(DocumentError::NoMembers { name: name.into_owned(), wanted, members: walk.seen }.into());
    }
    Ok(hash)
}

/// One pass over a file.
struct Walk<'a> {
    format: &'a Format,
    progress: &'a Progress,
    /// The length of the file.
    bytes: u64,
    sink: &'a mut dyn Sink,
    depth: usize,
    /// Members with documents.
    found: usize,
    /// The first names of members.
    seen: Vec<String>,
    in_archive: bool,
}

impl Walk<'_> {
    fn damaged(&self, name: &str, reason: &dyn std::fmt::Display, position: &str) -> ReadError {
        let file = format!("near byte {} of {}", self.progress.bytes().min(self.bytes), self.bytes);
        let position = if position.is_empty() { file } else { format!("{position}, {file}") };
        ReadError::Source(DocumentError::Damaged { name: name.into(), reason: reason.to_string(), position })
    }

    /// A stream that may be compressed. `wanted`: its text counts, should it be one.
    fn packed(
        &mut self,
        name: &str,
        reader: &mut dyn Read,
        kind: Kind,
        packing: Option<Packing>,
        wanted: bool,
    ) -> Result<(), ReadError> {
        match packing {
            None => self.unpacked(name, reader, kind, wanted),
            Some(Packing::Gzip) => {
                self.unpacked(name, &mut flate2::bufread::MultiGzDecoder::new(buffered(reader)), kind, wanted)
            }
            Some(Packing::Xz) => {
                self.unpacked(name, &mut lzma_rust2::XzReader::new(buffered(reader), true), kind, wanted)
            }
            Some(Packing::Zstd) => {
                let mut decoder = zstd::stream::read::Decoder::new(reader).map_err(|e| self.damaged(name, &e, ""))?;
                self.unpacked(name, &mut decoder, kind, wanted)
            }
        }
    }

    fn unpacked(&mut self, name: &str, reader: &mut dyn Read, kind: Kind, wanted: bool) -> Result<(), ReadError> {
        match kind {
            Kind::Text => {
                let mut read = 0;
                let separator = self.format.separator.as_deref();
                text::read(reader, separator, &mut read, self.sink)
                    .map_err(|error| self.failed(name, error, format!("after {read} bytes of text")))
            }
            Kind::JsonLines => {
                let mut lines = 0;
                jsonl::read(buffered(reader), name, &self.format.field, &mut lines, self.sink)
                    .map_err(|error| self.failed(name, error, format!("after line {lines}")))
            }
            Kind::Tar => self.nested(name, |walk| walk.tar(name, reader)),
            Kind::Zip | Kind::Parquet => {
                let spool = Spool::of(reader).map_err(|error| self.damaged(name, &error, ""))?;
                let file = spool.file.try_clone().map_err(|error| self.damaged(name, &error, ""))?;
                self.seekable(name, file, kind)
            }
            Kind::Unnamed => {
                let (is_tar, mut reader) = sniff(reader).map_err(|error| self.damaged(name, &error, ""))?;
                if is_tar {
                    self.in_archive = true;
                    return self.unpacked(name, &mut reader, Kind::Tar, wanted);
                }
                if !wanted {
                    return Ok(());
                }
                self.found += 1;
                self.unpacked(name, &mut reader, Kind::Text, wanted)
            }
        }
    }

    fn failed(&self, name: &str, error: TextError, position: String) -> ReadError {
        match error {
            TextError::Sink(error) => error,
            TextError::Io(error) => self.damaged(name, &error, &position),
        }
    }

    /// A file that is read out of order.
    fn seekable(&mut self, name: &str, file: File, kind: Kind) -> Result<(), ReadError> {
        match kind {
            Kind::Zip => self.nested(name, |walk| walk.zip(name, file)),
            // progress inside of an archive is that of the archive
            _ if self.depth > 0 => parquet::read(file, name, &self.format.field, &Progress::default(), self.sink),
            _ => parquet::read(file, name, &self.format.field, self.progress, self.sink),
        }
    }

    fn nested(&mut self, name: &str, inner: impl FnOnce(&mut Self) -> Result<(), ReadError>) -> Result<(), ReadError> {
        if self.depth == DEEPEST {
            return Err(self.damaged(name, &format!("more than {DEEPEST} archives lie in each other"), ""));
        }
        self.depth += 1;
        let result = inner(self);
        self.depth -= 1;
        result
    }

    fn tar(&mut self, name: &str, reader: &mut dyn Read) -> Result<(), ReadError> {
        let mut zeros = Zeros { reader, trailing: 0 };
        let mut archive = ::tar::Archive::new(&mut zeros);
        let entries = archive.entries().map_err(|error| self.damaged(name, &error, ""))?;
        for entry in entries {
            let mut entry = entry.map_err(|error| self.damaged(name, &error, ""))?;
            if !entry.header().entry_type().is_file() {
                continue;
            }
            let member = String::from_utf8_lossy(&entry.path_bytes()).into_owned();
            let size = entry.size();
            self.member(name, &member, &mut Exact { reader: &mut entry, left: size })?;
        }
        // an archive ends with empty blocks; one without them was cut off between two members
        match zeros.trailing >= 512 {
            true => Ok(()),
            false => Err(self.damaged(name, &"the end of the archive is missing", "")),
        }
    }

    fn zip(&mut self, name: &str, file: File) -> Result<(), ReadError> {
        let mut archive =
            zip::ZipArchive::new(buffered(file)).map_err(|error| self.damaged(name, &error, "in its directory"))?;
        let count = archive.len();
        for index in 0..count {
            let result = archive.by_index(index);
            let mut entry = result.map_err(|error| self.damaged(name, &error, &format!("member {index}")))?;
            if entry.is_file() {
                let member = String::from_utf8_lossy(entry.name_raw()).into_owned();
                self.member(name, &member, &mut entry)?;
            }
            if self.depth == 1 {
                self.progress.set(self.bytes * (index as u64 + 1) / count as u64);
            }
        }
        Ok(())
    }

    /// A member of an archive.
    fn member(&mut self, archive: &str, member: &str, reader: &mut dyn Read) -> Result<(), ReadError> {
        let member = member.strip_prefix("./").unwrap_or(member);
        if self.seen.len() < LISTED {
            self.seen.push(member.to_string());
        } else if self.seen.len() == LISTED {
            self.seen.push("…".into());
        }
        let hidden = member.rsplit('/').next().is_some_and(|last| last.starts_with('.'));
        let known = kind(member);
        let wanted = match &self.format.members {
            Some(pattern) => matches(pattern, member),
            None => known.is_some() && !hidden,
        };
        let name = format!("{archive}: {member}");
        match known {
            // archives are opened whatever their names are, for the documents in them
            Some((kind @ (Kind::Tar | Kind::Zip | Kind::Unnamed), packing)) if !hidden => {
                self.packed(&name, reader, kind, packing, wanted)
            }
            _ if !wanted => Ok(()),
            known => {
                self.found += 1;
                let (kind, packing) = known.unwrap_or((Kind::Text, None));
                self.packed(&name, reader, kind, packing, true)
            }
        }
    }
}

/// A stream with what was read of it put back.
type Again<'a> = Chain<Cursor<Vec<u8>>, &'a mut dyn Read>;

/// Looks at the start of a stream: whether it is a tar archive, and the whole of it again.
fn sniff(reader: &mut dyn Read) -> io::Result<(bool, Again<'_>)> {
    let mut head = Vec::new();
    (&mut *reader).take(512).read_to_end(&mut head)?;
    let is_tar = head.get(257..262) == Some(b"ustar");
    Ok((is_tar, Cursor::new(head).chain(reader)))
}

/// Counts the zeros at the end of what was read.
struct Zeros<'a> {
    reader: &'a mut dyn Read,
    trailing: u64,
}

impl Read for Zeros<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.reader.read(buffer)?;
        let zeros = buffer[..count].iter().rev().take_while(|&&byte| byte == 0).count();
        self.trailing = if zeros == count { self.trailing + zeros as u64 } else { zeros as u64 };
        Ok(count)
    }
}

/// A reader that must give so many bytes.
struct Exact<'a> {
    reader: &'a mut dyn Read,
    left: u64,
}

impl Read for Exact<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.reader.read(buffer)?;
        if count == 0 && self.left > 0 && !buffer.is_empty() {
            let message = format!("the file ends {} bytes too early", self.left);
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, message));
        }
        self.left = self.left.saturating_sub(count as u64);
        Ok(count)
    }
}

/// A member of an archive that must be read out of order, unpacked into a file of the system's temporary folder.
struct Spool {
    path: PathBuf,
    file: File,
}

impl Spool {
    fn of(reader: &mut dyn Read) -> io::Result<Spool> {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("dataflow-{}-{count}.tmp", std::process::id()));
        let file = File::options().read(true).write(true).create(true).truncate(true).open(&path)?;
        let mut spool = Spool { path, file };
        io::copy(reader, &mut spool.file)?;
        spool.file.seek(SeekFrom::Start(0))?;
        Ok(spool)
    }
}

impl Drop for Spool {
    fn drop(&mut self) {
        // it is of no use to anybody, and the system clears the folder
        let _ = fs::remove_file(&self.path);
    }
}
