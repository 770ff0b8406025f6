//! Files from the web, checked against their SHA-256 and kept.

mod progress;

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use sha2::{Digest, Sha256};

use self::progress::Meter;
use super::text::hexadecimal;
use crate::files::{self, FileError};

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
/// file appears in the cache only when it is whole, right, and on the disk. A download that breaks goes on where it
/// stopped, at once or in the next run, if the server can send parts of a file.
pub fn fetch(url: &str, sha256: &str, cache: &Path) -> Result<PathBuf, DownloadError> {
    let expected = sha256.to_lowercase();
    if expected.len() != 64 || !expected.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return Err(DownloadError::InvalidHash { url: url.into(), sha256: sha256.into() });
    }
    let path = cache.join(cached_name(url, &expected));
    if hash_of(&path)?.is_some_and(|found| found == expected) {
        return Ok(path);
    }
    files::create_folder(cache)?;
    let mut part = Part::open(&path)?;
    // somebody else may have downloaded it while this one waited
    if hash_of(&path)?.is_some_and(|found| found == expected) {
        part.discard();
        return Ok(path);
    }
    let resumed = part.bytes > 0;
    let mut found = part.complete(url)?;
    if found != expected && resumed {
        // what was there may have been of another file
        part.restart()?;
        found = part.complete(url)?;
    }
    if found != expected {
        let bytes = part.bytes;
        part.discard();
        return Err(DownloadError::HashMismatch { url: url.into(), expected, found, bytes });
    }
    part.file.sync_all().map_err(FileError::on("write", &path))?;
    files::rename(&part.path, &path)?;
    Ok(path)
}

/// Tries of one download, beyond which a server that breaks each of them is given up.
const MOST_TRIES: usize = 20;

/// The part of a file that has come so far. It stays when a download breaks.
struct Part {
    path: PathBuf,
    /// Locked, so that two runs do not write the same part.
    file: File,
    hash: Sha256,
    bytes: u64,
}

impl Part {
    /// The part of the file that is to be at `path`, as an earlier run left it.
    fn open(path: &Path) -> Result<Part, FileError> {
        let mut name = path.as_os_str().to_owned();
        name.push(".part");
        let path = PathBuf::from(name);
        let open = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path);
        let mut file = open.map_err(FileError::on("write", &path))?;
        // a file system without locks has nobody to wait for
        let _ = file.lock();
        let mut hash = Sha256::new();
        let bytes = hash_rest(&mut file, &mut hash).map_err(FileError::on("read", &path))?;
        Ok(Part { path, file, hash, bytes })
    }

    /// Forgets what has come.
    fn restart(&mut self) -> Result<(), FileError> {
        (self.hash, self.bytes) = (Sha256::new(), 0);
        let emptied = self.file.set_len(0).and_then(|()| self.file.seek(SeekFrom::Start(0)));
        emptied.map(drop).map_err(FileError::on("write", &self.path))
    }

    /// Removes it.
    fn discard(mut self) {
        self.bytes = 0;
    }

    /// Downloads what is missing; returns the hash of all.
    fn complete(&mut self, url: &str) -> Result<String, DownloadError> {
        let mut meter = Meter::new(url);
        for tries in 1.. {
            let before = self.bytes;
            match self.more(url, &mut meter) {
                Ok(()) => break,
                Err(Broken::Disk(error)) => return Err(error.into()),
                // a connection that brought something is worth another
                Err(Broken::Connection(_)) if self.bytes > before && tries < MOST_TRIES => {
                    std::thread::sleep(Duration::from_millis(200));
                }
                Err(Broken::Connection(reason)) if self.bytes == 0 => return Err(unreachable(url, &reason)),
                Err(Broken::Connection(reason)) => {
                    let bytes = self.bytes;
                    let reason = format!("{reason}, after {bytes} bytes, from where the next run goes on");
                    return Err(unreachable(url, &reason));
                }
            }
        }
        Ok(hexadecimal(&self.hash.clone().finalize()))
    }

    /// One request for the rest.
    fn more(&mut self, url: &str, meter: &mut Meter<'_>) -> Result<(), Broken> {
        let connection = |error: &dyn std::fmt::Display| Broken::Connection(error.to_string());
        let agent = agent();
        let request = match self.bytes {
            0 => agent.get(url),
            bytes => agent.get(url).header("Range", format!("bytes={bytes}-")),
        };
        let mut response = match request.call() {
            // there is no rest: the part is whole, or longer than the file
            Err(ureq::Error::StatusCode(416)) if self.bytes > 0 => return Ok(()),
            other => other.map_err(|error| connection(&error))?,
        };
        let range = response.headers().get("Content-Range").and_then(|range| range.to_str().ok());
        let here = range.is_some_and(|range| range.starts_with(&format!("bytes {}-", self.bytes)));
        if self.bytes > 0 && !(response.status() == 206 && here) {
            // all of the file comes
            self.restart().map_err(Broken::Disk)?;
        }
        let total = response.body().content_length().map(|rest| self.bytes + rest);
        let mut body = response.body_mut().with_config().limit(u64::MAX).reader();
        let mut buffer = vec![0; 1 << 16];
        loop {
            // A broken connection and a full disk are both `io::Error`s; only the first one excuses the source.
            let count = match body.read(&mut buffer) {
                Ok(0) => return Ok(()),
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(connection(&error)),
            };
            let written = self.file.write_all(&buffer[..count]);
            written.map_err(FileError::on("write", &self.path)).map_err(Broken::Disk)?;
            self.hash.update(&buffer[..count]);
            self.bytes += count as u64;
            meter.bytes(self.bytes, total);
        }
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        if self.bytes == 0 {
            // in nobody's way if it stays
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Why a request did not bring the rest of a file.
enum Broken {
    Connection(String),
    Disk(FileError),
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
    hash_rest(&mut file, &mut hash).map_err(FileError::on("read", path))?;
    Ok(Some(hexadecimal(&hash.finalize())))
}

/// Reads a file to its end; returns how many bytes that were.
fn hash_rest(file: &mut File, hash: &mut Sha256) -> io::Result<u64> {
    let mut buffer = vec![0; 1 << 16];
    let mut bytes = 0;
    loop {
        match file.read(&mut buffer) {
            Ok(0) => return Ok(bytes),
            Ok(count) => {
                hash.update(&buffer[..count]);
                bytes += count as u64;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::text::{self, TextSource};
    use std::io::{BufRead, BufReader};
    use std::net::TcpListener;
    use std::sync::mpsc::{Receiver, channel};

    /// Answers as many requests as there are responses, one after the other, and then closes its port.
    fn serve(responses: Vec<Vec<u8>>) -> String {
        serve_ranges(responses).0
    }

    /// The same; also what each request had to say about the range that it wants.
    fn serve_ranges(responses: Vec<Vec<u8>>) -> (String, Receiver<String>) {
        let (ranges, asked) = channel();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        std::thread::spawn(move || {
            for response in responses {
                let (mut stream, _) = listener.accept().unwrap();
                let lines = BufReader::new(stream.try_clone().unwrap()).lines().map(Result::unwrap);
                let head: Vec<String> = lines.take_while(|line| !line.is_empty()).collect();
                let range = head.iter().map(|line| line.to_lowercase()).find(|line| line.starts_with("range: "));
                // a test that does not ask has dropped its end
                let _ = ranges.send(range.unwrap_or_default());
                stream.write_all(&response).unwrap();
            }
        });
        (format!("http://{address}/texts/input.txt?raw=1"), asked)
    }

    /// The bytes from `start` on of a file of `length`.
    fn partial(start: usize, length: usize, body: &[u8]) -> Vec<u8> {
        let range = format!("Content-Range: bytes {start}-{}/{length}", length - 1);
        response(&format!("206 Partial Content\r\n{range}"), length - start, body)
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
    fn a_broken_download_goes_on() {
        let folder = tempfile::tempdir().unwrap();
        let body: Vec<u8> = (0..100_000u32).flat_map(u32::to_le_bytes).collect();
        let length = body.len();
        // broken twice, in this run and at its end
        let responses = vec![
            response("200 OK", length, &body[..100_000]),
            partial(100_000, length, &body[100_000..250_000]),
            partial(250_000, length, b""),
            partial(250_000, length, &body[250_000..]),
        ];
        let (url, asked) = serve_ranges(responses);
        let message = fetch(&url, &hash(&body), folder.path()).unwrap_err().to_string();
        assert!(message.contains("after 250000 bytes, from where the next run goes on"), "{message}");
        let path = fetch(&url, &hash(&body), folder.path()).unwrap();
        assert!(fs::read(&path).unwrap() == body);
        let ranges = ["", "range: bytes=100000-", "range: bytes=250000-", "range: bytes=250000-"];
        assert_eq!(asked.iter().collect::<Vec<_>>(), ranges);
        assert_eq!(cached(folder.path()), 1, "the part is gone");
    }

    #[test]
    fn a_server_without_parts_sends_all_again() {
        let folder = tempfile::tempdir().unwrap();
        let body = b"all or nothing".repeat(1000);
        let responses = vec![response("200 OK", body.len(), &body[..5000]), response("200 OK", body.len(), &body)];
        let path = fetch(&serve(responses), &hash(&body), folder.path()).unwrap();
        assert!(fs::read(&path).unwrap() == body);
    }

    #[test]
    fn a_part_of_another_file_is_given_up() {
        let folder = tempfile::tempdir().unwrap();
        for (old, rest) in [
            (&b"wrong"[..], partial(5, 10, b"world")),
            // longer than the file, so that there is no rest
            (&b"far too long"[..], response("416 Range Not Satisfiable", 0, b"")),
        ] {
            let (url, asked) = serve_ranges(vec![rest, response("200 OK", 10, b"helloworld")]);
            let cached = cached_name(&url, &hash(b"helloworld"));
            fs::write(folder.path().join(format!("{cached}.part")), old).unwrap();
            let path = fetch(&url, &hash(b"helloworld"), folder.path()).unwrap();
            assert_eq!(fs::read(path).unwrap(), b"helloworld");
            assert_eq!(asked.iter().collect::<Vec<_>>(), [format!("range: bytes={}-", old.len()), String::new()]);
            fs::remove_dir_all(folder.path()).unwrap();
            fs::create_dir(folder.path()).unwrap();
        }
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
