//! Files from the web, checked against their SHA-256 and kept.

use std::fs::File;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use sha2::{Digest, Sha256};

use super::text::hexadecimal;
use crate::files::{self, FileError, Temporary};

/// Why a file of the web cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum DownloadError {
    /// The given hash cannot be one.
    #[error("the sha256 of {url} must be 64 hexadecimal digits, not {sha256:?}; sha256sum FILE prints it")]
    InvalidHash {
        /// The address.
        url: String,
        /// What was given.
        sha256: String,
    },
    /// No network, no such host, no such file, or the connection broke.
    #[error("cannot download {url}: {reason}")]
    Unreachable {
        /// The address.
        url: String,
        /// What failed.
        reason: String,
    },
    /// The whole file came, and it is another one.
    #[error(
        "{url} is not the expected file: its SHA-256 is {found} ({bytes} bytes), expected {expected}; \
         check the address, or the sha256 if the file was updated"
    )]
    HashMismatch {
        /// The address.
        url: String,
        /// The hash that was asked for.
        expected: String,
        /// The hash of what came.
        found: String,
        /// How many bytes came.
        bytes: u64,
    },
    /// The cache cannot be read or written.
    #[error(transparent)]
    File(#[from] FileError),
}

/// The file at `url` with this SHA-256, from the cache folder if it is there, else downloaded into it. The
/// file appears in the cache only when it is whole, right, and on the disk.
pub fn fetch(url: &str, sha256: &str, cache: &Path) -> Result<PathBuf, DownloadError> {
    let expected = sha256.to_lowercase();
    if expected.len() != 64 || !expected.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return Err(DownloadError::InvalidHash { url: url.into(), sha256: sha256.into() });
    }
    let path = cache.join(cached_name(url, &expected));
    if hash_of(&path)?.is_some_and(|found| found == expected) {
        return Ok(path);
    }
    let mut response = agent().get(url).call().map_err(|error| unreachable(url, &error))?;
    files::create_folder(cache)?;
    let temporary = Temporary::beside(&path)?;
    let mut body = response.body_mut().with_config().limit(u64::MAX).reader();
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 16];
    let mut bytes = 0;
    loop {
        // A broken connection and a full disk are both `io::Error`s; only the first one excuses the source.
        let count = match body.read(&mut buffer) {
            Ok(0) => break,
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(unreachable(url, &format!("{error}, after {bytes} bytes"))),
        };
        hash.update(&buffer[..count]);
        (&temporary.file).write_all(&buffer[..count]).map_err(FileError::on("write", &path))?;
        bytes += count as u64;
    }
    let found = hexadecimal(&hash.finalize());
    if found != expected {
        return Err(DownloadError::HashMismatch { url: url.into(), expected, found, bytes });
    }
    temporary.file.sync_all().map_err(FileError::on("write", &path))?;
    temporary.rename_to(&path)?;
    Ok(path)
}

fn agent() -> ureq::Agent {
    ureq::Agent::config_builder()
        .timeout_connect(Some(Duration::from_secs(15)))
        .timeout_recv_response(Some(Duration::from_secs(30)))
        .timeout_recv_body(Some(Duration::from_secs(30 * 60)))
        .user_agent(concat!("dataflow/", env!("CARGO_PKG_VERSION")))
        .build()
        .into()
}

fn unreachable(url: &str, reason: &dyn std::fmt::Display) -> DownloadError {
    DownloadError::Unreachable { url: url.into(), reason: reason.to_string() }
}

/// A name in the cache that a person recognizes and that no other content can have.
fn cached_name(url: &str, sha256: &str) -> String {
    let path = url.split(['?', '#']).next().unwrap_or_default();
    let last = path.trim_end_matches('/').rsplit('/').next().unwrap_or_default();
    let safe = |c: char| if c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_') { c } else { '_' };
    let last: String = last.chars().map(safe).take(64).collect();
    format!("{sha256}-{last}")
}

/// The hash of a file, or `None` if there is no such file.
fn hash_of(path: &Path) -> Result<Option<String>, FileError> {
    let mut file = match File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        other => other.map_err(FileError::on("read", path))?,
    };
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 16];
    loop {
        match file.read(&mut buffer) {
            Ok(0) => return Ok(Some(hexadecimal(&hash.finalize()))),
            Ok(count) => hash.update(&buffer[..count]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(FileError { action: "read", path: path.into(), source: error }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::text::{self, TextSource};
    use std::fs;
    use std::io::{BufRead, BufReader};
    use std::net::TcpListener;

    /// Answers as many requests as there are responses, one after the other, and then closes its port.
    fn serve(responses: Vec<Vec<u8>>) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        std::thread::spawn(move || {
            for response in responses {
                let (mut stream, _) = listener.accept().unwrap();
                let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
                while lines.next().is_some_and(|line| !line.unwrap().is_empty()) {}
                stream.write_all(&response).unwrap();
            }
        });
        format!("http://{address}/texts/input.txt?raw=1")
    }

    fn response(status: &str, length: usize, body: &[u8]) -> Vec<u8> {
        let head = format!("HTTP/1.1 {status}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n");
        [head.as_bytes(), body].concat()
    }

    fn hash(bytes: &[u8]) -> String {
        hexadecimal(&Sha256::digest(bytes))
    }

    fn cached(cache: &Path) -> usize {
        fs::read_dir(cache).map_or(0, |entries| entries.count())
    }

    #[test]
    fn downloads_once() {
        let folder = tempfile::tempdir().unwrap();
        let cache = folder.path().join("cache");
        let body = b"to be or not to be\n".repeat(10_000);
        let url = serve(vec![response("200 OK", body.len(), &body)]);
        let sources = [TextSource::Url { url: url.clone(), sha256: hash(&body).to_uppercase() }];
        assert_eq!(text::load(&sources, &cache).unwrap().text.as_bytes(), body);
        // The server is gone: the second time comes from the cache.
        assert_eq!(text::load(&sources, &cache).unwrap().text.as_bytes(), body);
        assert_eq!(cached(&cache), 1);
    }

    #[test]
    fn a_damaged_cache_is_downloaded_again() {
        let folder = tempfile::tempdir().unwrap();
        let url = serve(vec![response("200 OK", 4, b"text"), response("200 OK", 4, b"text")]);
        let path = fetch(&url, &hash(b"text"), folder.path()).unwrap();
        fs::write(&path, b"te").unwrap();
        assert_eq!(fetch(&url, &hash(b"text"), folder.path()).unwrap(), path);
        assert_eq!(fs::read(&path).unwrap(), b"text");
    }

    #[test]
    fn another_file_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let url = serve(vec![response("200 OK", 4, b"evil")]);
        let local = folder.path().join("local.txt");
        fs::write(&local, "fine").unwrap();
        let cache = folder.path().join("cache");
        let sources = [TextSource::Url { url: url.clone(), sha256: hash(b"good") }, TextSource::File(local)];
        let message = text::load(&sources, &cache).unwrap_err().to_string();
        assert!(message.contains("is not the expected file") && message.contains(&hash(b"evil")), "{message}");
        assert!(message.contains(&url) && message.contains(&hash(b"good")), "{message}");
        assert_eq!(cached(&cache), 0, "nothing wrong is kept");
    }

    #[test]
    fn what_cannot_be_reached_moves_on() {
        let folder = tempfile::tempdir().unwrap();
        let missing = serve(vec![response("404 Not Found", 0, b"")]);
        let broken = serve(vec![response("200 OK", 100, b"only this")]);
        let closed = {
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            format!("http://{}/x", listener.local_addr().unwrap())
        };
        let url = |url: &String| TextSource::Url { url: url.clone(), sha256: hash(b"") };
        let mut sources = vec![url(&missing), url(&broken), url(&closed), url(&"ftp://a.b/c".into())];
        let message = text::load(&sources, folder.path()).unwrap_err().to_string();
        for part in [&missing, "404", &broken, "after 9 bytes", &closed, "ftp://a.b/c"] {
            assert!(message.contains(part), "{part:?} is not in: {message}");
        }
        let local = folder.path().join("local.txt");
        fs::write(&local, "fine").unwrap();
        sources = vec![url(&closed), TextSource::File(local)];
        assert_eq!(text::load(&sources, folder.path()).unwrap().text, "fine");
    }

    #[test]
    fn an_impossible_hash_is_an_error() {
        let message = fetch("http://a.b/c", "12ab", Path::new("cache")).unwrap_err().to_string();
        assert!(message.contains("64 hexadecimal digits, not \"12ab\""), "{message}");
    }
}
