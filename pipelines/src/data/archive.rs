//! One file out of an archive.

use std::fs::File;
use std::io::{self, BufReader, Read, Seek};
use std::path::{Path, PathBuf};

/// Why a member of an archive cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum ArchiveError {
    /// The archive cannot be opened.
    #[error("cannot open {}: {source}", path.display())]
    Open {
        /// The archive.
        path: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
    /// The name's ending says nothing that can be unpacked.
    #[error("{} is no archive this program unpacks; its name must end in .tar.gz, .tgz, .tar or .zip", .0.display())]
    UnknownKind(PathBuf),
    /// The archive cannot be unpacked.
    #[error("{} is damaged or not what its name says: {reason}", path.display())]
    Damaged {
        /// The archive.
        path: PathBuf,
        /// What unpacking failed at, with the member where it is known.
        reason: String,
    },
    /// The pattern matches nothing.
    #[error("no file in {} matches {pattern:?}; it holds {}", path.display(), listed(members))]
    NoMember {
        /// The archive.
        path: PathBuf,
        /// The pattern.
        pattern: String,
        /// All files of the archive.
        members: Vec<String>,
    },
    /// The pattern matches more than one file, and which one was meant is not for us to guess.
    #[error("{} files in {} match {pattern:?}: {}; name one", members.len(), path.display(), listed(members))]
    SeveralMembers {
        /// The archive.
        path: PathBuf,
        /// The pattern.
        pattern: String,
        /// The files that match.
        members: Vec<String>,
    },
}

fn listed(members: &[String]) -> String {
    const SHOWN: usize = 20;
    if members.is_empty() {
        return "no files".into();
    }
    let shown = members[..members.len().min(SHOWN)].join(", ");
    match members.len().saturating_sub(SHOWN) {
        0 => shown,
        more => format!("{shown} and {more} more"),
    }
}

/// The content of the only file of the archive whose path matches `pattern` (see [`matches`]). The kind of
/// archive follows from the ending of its name.
pub fn read_member(path: &Path, pattern: &str) -> Result<Vec<u8>, ArchiveError> {
    let file = File::open(path).map_err(|source| ArchiveError::Open { path: path.into(), source })?;
    let reader = BufReader::new(file);
    let name = path.file_name().unwrap_or_default().to_string_lossy().to_lowercase();
    let mut search = Search { pattern, members: Vec::new(), found: Vec::new(), content: Vec::new() };
    let result = if name.ends_with(".tar.gz") || name.ends_with(".tgz") {
        search.tar(flate2::bufread::MultiGzDecoder::new(reader))
    } else if name.ends_with(".tar") {
        search.tar(reader)
    } else if name.ends_with(".zip") {
        search.zip(reader)
    } else {
        return Err(ArchiveError::UnknownKind(path.into()));
    };
    result.map_err(|reason| ArchiveError::Damaged { path: path.into(), reason })?;
    let pattern = pattern.to_string();
    match search.found.len() {
        0 => Err(ArchiveError::NoMember { path: path.into(), pattern, members: search.members }),
        1 => Ok(search.content),
        _ => Err(ArchiveError::SeveralMembers { path: path.into(), pattern, members: search.found }),
    }
}

/// One pass over an archive. Errors are reasons in words.
struct Search<'a> {
    pattern: &'a str,
    members: Vec<String>,
    found: Vec<String>,
    content: Vec<u8>,
}

impl Search<'_> {
    fn tar(&mut self, reader: impl Read) -> Result<(), String> {
        let mut archive = tar::Archive::new(reader);
        let entries = archive.entries().map_err(|error| error.to_string())?;
        for entry in entries {
            let mut entry = entry.map_err(|error| self.after(&error))?;
            if !entry.header().entry_type().is_file() {
                continue;
            }
            let name = String::from_utf8_lossy(&entry.path_bytes()).into_owned();
            self.member(name, &mut entry)?;
        }
        Ok(())
    }

    fn zip(&mut self, reader: impl Read + Seek) -> Result<(), String> {
        let mut archive = zip::ZipArchive::new(reader).map_err(|error| error.to_string())?;
        for index in 0..archive.len() {
            // The raw form also opens members that are encrypted or packed in a way we cannot undo: they
            // belong into the list of names.
            let raw = archive.by_index_raw(index).map_err(|error| self.after(&error))?;
            let (name, is_file) = (String::from_utf8_lossy(raw.name_raw()).into_owned(), raw.is_file());
            drop(raw);
            if !is_file {
                continue;
            }
            if matches(self.pattern, plain(&name)) {
                let mut entry = archive.by_index(index).map_err(|error| format!("{name}: {error}"))?;
                self.member(name, &mut entry)?;
            } else {
                self.members.push(plain(&name).to_string());
            }
        }
        Ok(())
    }

    fn member(&mut self, name: String, content: &mut impl Read) -> Result<(), String> {
        let name = plain(&name).to_string();
        if matches(self.pattern, &name) {
            if self.found.is_empty() {
                content.read_to_end(&mut self.content).map_err(|error| format!("{name}: {error}"))?;
            }
            self.found.push(name.clone());
        }
        self.members.push(name);
        Ok(())
    }

    fn after(&self, error: &dyn std::fmt::Display) -> String {
        match self.members.last() {
            Some(last) => format!("{error} (after {last})"),
            None => error.to_string(),
        }
    }
}

/// A member's path without the `./` that `tar .` writes.
fn plain(name: &str) -> &str {
    name.strip_prefix("./").unwrap_or(name)
}

/// Whether a path matches a pattern: `*` stands for any characters but `/`, `**` for any characters, `?` for
/// one character but `/`; everything else stands for itself.
pub fn matches(pattern: &str, path: &str) -> bool {
    let pattern: Vec<char> = pattern.chars().collect();
    let path: Vec<char> = path.chars().collect();
    // `reachable[j]`: the pattern so far matches the first j characters of the path.
    let mut reachable = vec![false; path.len() + 1];
    reachable[0] = true;
    let mut rest = &pattern[..];
    while let Some((&first, after)) = rest.split_first() {
        let mut next = vec![false; path.len() + 1];
        rest = after;
        if first == '*' {
            let any = rest.first() == Some(&'*');
            rest = if any { &rest[1..] } else { rest };
            for j in 0..=path.len() {
                next[j] = reachable[j] || (j > 0 && next[j - 1] && (any || path[j - 1] != '/'));
            }
        } else {
            for j in 1..=path.len() {
                next[j] = reachable[j - 1] && if first == '?' { path[j - 1] != '/' } else { path[j - 1] == first };
            }
        }
        reachable = next;
    }
    reachable[path.len()]
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    const FILES: [(&str, &str); 3] =
        [("top/readme.md", "read me"), ("top/data/input.txt", "to be\n"), ("top/data/other.txt", "or not")];

    fn tar_bytes() -> Vec<u8> {
        let mut builder = tar::Builder::new(Vec::new());
        for (name, content) in FILES {
            let mut header = tar::Header::new_gnu();
            header.set_size(content.len() as u64);
            header.set_mode(0o644);
            builder.append_data(&mut header, name, content.as_bytes()).unwrap();
        }
        builder.into_inner().unwrap()
    }

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    fn zip_bytes() -> Vec<u8> {
        let mut writer = zip::ZipWriter::new(io::Cursor::new(Vec::new()));
        writer.add_directory("top", zip::write::SimpleFileOptions::default()).unwrap();
        for (name, content) in FILES {
            let options = zip::write::SimpleFileOptions::default().compression_method(zip::CompressionMethod::Stored);
            writer.start_file(name, options).unwrap();
            writer.write_all(content.as_bytes()).unwrap();
        }
        writer.finish().unwrap().into_inner()
    }

    fn archives(folder: &Path) -> Vec<PathBuf> {
        let all = [
            ("a.tar", tar_bytes()),
            ("a.tar.gz", gzip(&tar_bytes())),
            ("A.TGZ", gzip(&tar_bytes())),
            ("a.zip", zip_bytes()),
        ];
        all.map(|(name, bytes)| {
            let path = folder.join(name);
            std::fs::write(&path, bytes).unwrap();
            path
        })
        .into()
    }

    #[test]
    fn finds_the_member_in_every_kind() {
        let folder = tempfile::tempdir().unwrap();
        for path in archives(folder.path()) {
            assert_eq!(read_member(&path, "*/data/input.txt").unwrap(), b"to be\n", "{}", path.display());
            assert_eq!(read_member(&path, "**input.txt").unwrap(), b"to be\n");
            assert_eq!(read_member(&path, "top/readme.md").unwrap(), b"read me");
        }
    }

    #[test]
    fn unpacks_a_deflated_zip_member() {
        // A zip of one deflated member, as another program writes it: local header, data, directory, end.
        let content = b"abcabcabcabcabcabcabcabcabcabc";
        let mut deflate = flate2::write::DeflateEncoder::new(Vec::new(), flate2::Compression::best());
        deflate.write_all(content).unwrap();
        let packed = deflate.finish().unwrap();
        let mut crc = flate2::Crc::new();
        crc.update(content);
        let mut common = vec![20, 0, 0, 0, 8, 0, 0, 0, 0x21, 0];
        common.extend(crc.sum().to_le_bytes());
        common.extend((packed.len() as u32).to_le_bytes());
        common.extend((content.len() as u32).to_le_bytes());
        common.extend([5, 0, 0, 0]);
        let mut file = [&b"PK\x03\x04"[..], &common, b"a.txt", &packed].concat();
        let directory = file.len() as u32;
        file.extend([&b"PK\x01\x02\x14\x00"[..], &common, &[0; 14], b"a.txt"].concat());
        let size = file.len() as u32 - directory;
        file.extend(
            [&b"PK\x05\x06\0\0\0\0\x01\0\x01\0"[..], &size.to_le_bytes(), &directory.to_le_bytes(), &[0, 0]].concat(),
        );
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.zip");
        std::fs::write(&path, file).unwrap();
        assert_eq!(read_member(&path, "a.txt").unwrap(), content);
    }

    #[test]
    fn says_what_members_there_are() {
        let folder = tempfile::tempdir().unwrap();
        for path in archives(folder.path()) {
            let message = read_member(&path, "input.txt").unwrap_err().to_string();
            assert!(message.contains("no file in") && message.contains("matches \"input.txt\""), "{message}");
            assert!(message.contains("top/readme.md, top/data/input.txt, top/data/other.txt"), "{message}");
            let message = read_member(&path, "top/data/*").unwrap_err().to_string();
            assert!(message.contains("2 files in") && message.contains("top/data/other.txt"), "{message}");
        }
    }

    #[test]
    fn damaged_archives_are_errors() {
        let folder = tempfile::tempdir().unwrap();
        for path in archives(folder.path()) {
            let whole = std::fs::read(&path).unwrap();
            for cut in [0, 1, 10, whole.len() / 4, whole.len() / 2] {
                std::fs::write(&path, &whole[..cut]).unwrap();
                assert!(read_member(&path, "top/data/other.txt").is_err(), "{} cut at {cut}", path.display());
            }
            std::fs::write(&path, vec![0xa5; 4096]).unwrap();
            let message = read_member(&path, "*").unwrap_err().to_string();
            assert!(message.contains("is damaged or not what its name says"), "{message}");
        }
        let other = folder.path().join("a.rar");
        std::fs::write(&other, b"x").unwrap();
        assert!(read_member(&other, "*").unwrap_err().to_string().contains("must end in .tar.gz"));
    }

    #[test]
    fn patterns() {
        assert!(matches("*/input.txt", "x-main/input.txt"));
        assert!(!matches("*/input.txt", "x/y/input.txt"));
        assert!(matches("**/input.txt", "x/y/input.txt"));
        assert!(matches("in?ut.*", "input.txt"));
        assert!(!matches("in?ut", "in/ut"));
        assert!(matches("", "") && !matches("", "a") && matches("*", ""));
    }
}
