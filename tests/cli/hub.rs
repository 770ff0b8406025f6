//! Datasets of the Hugging Face hub, with a server of our own in its place.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::process::Command;
use std::sync::{Arc, Mutex};

use sha2::{Digest, Sha256};

use super::{Folder, Ran};

const PIPELINE: &str = r#"
Pipeline(
    about: "hub",
    seed: 7,
    stages: [
        ("documents", Documents(from: ["hf://datasets/some/corpus/data"]), []),
        ("tokens", Tokenize(folder: "out", tokenizer: Bytes, validation: 0.2), ["documents"]),
    ],
)
"#;

/// A server with the files of one dataset.
#[derive(Default)]
struct Hub {
    files: Vec<(&'static str, Vec<u8>)>,
    /// How many downloads of a file break off after some bytes.
    breaks: usize,
    /// The hash that the server tells of every file, if it is not the right one.
    wrong: Option<String>,
    /// The file and the range of each request.
    asked: Vec<(String, String)>,
}

type Shared = Arc<Mutex<Hub>>;

impl Hub {
    /// Starts it; returns its address.
    fn start(self) -> (String, Shared) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let hub = Arc::new(Mutex::new(self));
        let shared = hub.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                // a client that is gone has its reasons
                let _ = hub.lock().unwrap().answer(stream.unwrap());
            }
        });
        (address, shared)
    }

    fn answer(&mut self, mut stream: TcpStream) -> std::io::Result<()> {
        let lines = BufReader::new(stream.try_clone()?).lines().map_while(Result::ok);
        let head: Vec<String> = lines.take_while(|line| !line.is_empty()).collect();
        let path = head[0].split(' ').nth(1).unwrap().to_string();
        let range = head
            .iter()
            .map(|line| line.to_lowercase())
            .find_map(|line| Some(line.strip_prefix("range: bytes=")?.to_string()));
        let range = range.unwrap_or_default();
        if path == "/api/datasets/some/corpus/revision/main" {
            let names: Vec<String> =
                self.files.iter().map(|(name, _)| format!("{{\"rfilename\":\"{name}\"}}")).collect();
            let body = format!("{{\"sha\":\"c0ffee\",\"siblings\":[{}]}}", names.join(","));
            let length = body.len();
            return write!(stream, "HTTP/1.1 200 OK\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{body}");
        }
        let name = path.strip_prefix("/datasets/some/corpus/resolve/main/").unwrap_or_default();
        let Some((_, content)) = self.files.iter().find(|file| file.0 == name) else {
            return write!(stream, "HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
        };
        self.asked.push((name.to_string(), range.clone()));
        let hash = self.wrong.clone().unwrap_or_else(|| hash(content));
        let (from, to) = range.split_once('-').unwrap_or(("0", ""));
        let from: usize = from.parse().unwrap();
        let to = to.parse().map_or(content.len(), |last: usize| last + 1);
        write!(
            stream,
            "HTTP/1.1 206 Partial Content\r\nContent-Length: {}\r\nContent-Range: bytes {from}-{}/{}\r\n\
             ETag: \"{hash}\"\r\nX-Repo-Commit: c0ffee\r\nConnection: close\r\n\r\n",
            to - from,
            to - 1,
            content.len(),
        )?;
        // the question for the length is always answered
        if range != "0-0" && self.breaks > 0 {
            self.breaks -= 1;
            return stream.write_all(&content[from..from + 100]);
        }
        stream.write_all(&content[from..to])
    }
}

fn hash(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

fn documents(first: usize) -> Vec<u8> {
    (first..first + 50).map(|i| format!("{{\"text\": \"document {i}\"}}\n")).collect::<String>().into_bytes()
}

fn files() -> Vec<(&'static str, Vec<u8>)> {
    let (a, b) = (documents(0), documents(50));
    vec![(".gitattributes", vec![]), ("data/b.jsonl", b), ("README.md", b"about".to_vec()), ("data/a.jsonl", a)]
}

fn run(folder: &Folder, endpoint: &str) -> Ran {
    let mut command = Command::new(env!("CARGO_BIN_EXE_dataflow"));
    command.args(["run", "pipe.ron", "--until", "tokens"]).current_dir(folder.path(""));
    // nobody's cache, and nobody's token
    command.env("HF_ENDPOINT", endpoint).env("HF_HOME", folder.path("home")).env_remove("HF_TOKEN");
    let output = command.output().unwrap();
    let string = |bytes| String::from_utf8(bytes).unwrap();
    Ran { code: output.status.code(), out: string(output.stdout), err: string(output.stderr) }
}

fn prepared(folder: &Folder) -> [Vec<u8>; 2] {
    ["out/train.bin", "out/val.bin"].map(|name| fs::read(folder.path(name)).unwrap())
}

/// What the same documents come to as files of one's own.
fn expected() -> [Vec<u8>; 2] {
    let folder = Folder::new();
    fs::create_dir(folder.path("data")).unwrap();
    folder.write("data/a.jsonl", documents(0));
    folder.write("data/b.jsonl", documents(50));
    folder.write("pipe.ron", PIPELINE.replace("hf://datasets/some/corpus/data", "data"));
    folder.succeeds(&["run", "pipe.ron", "--until", "tokens"]);
    prepared(&folder)
}

#[test]
fn a_dataset_is_downloaded_checked_and_kept() {
    let folder = Folder::new();
    folder.write("pipe.ron", PIPELINE);
    let (endpoint, hub) = Hub { files: files(), breaks: 1, ..Hub::default() }.start();
    let ran = run(&folder, &endpoint);
    assert_eq!(ran.code, Some(0), "{}", ran.err);
    assert!(prepared(&folder) == expected());
    // in the order of their names, the first one in two parts
    let asked: Vec<(String, String)> = hub.lock().unwrap().asked.clone();
    let wanted = [("a", "0-0"), ("a", "0-"), ("a", "100-"), ("b", "0-0"), ("b", "0-")];
    assert_eq!(asked, wanted.map(|(name, range)| (format!("data/{name}.jsonl"), range.to_string())));
    let sidecar = folder.read("out/train.json");
    for (name, content) in files().iter().filter(|(name, _)| name.ends_with(".jsonl")) {
        assert!(sidecar.contains(&format!("hf://datasets/some/corpus/{name}")), "{sidecar}");
        assert!(sidecar.contains(&hash(content)), "{sidecar}");
    }
    // once more, without the tokens: nothing is downloaded again
    fs::remove_dir_all(folder.path("out")).unwrap();
    assert_eq!(run(&folder, &endpoint).code, Some(0));
    assert!(prepared(&folder) == expected());
    assert_eq!(hub.lock().unwrap().asked.len(), wanted.len());
    // and with the tokens there is no need for a server
    assert_eq!(run(&folder, "http://127.0.0.1:1").code, Some(0));
}

#[test]
fn a_broken_download_goes_on_in_the_next_run() {
    let folder = Folder::new();
    folder.write("pipe.ron", PIPELINE);
    // a run tries five times, and then asks how long the file is
    let (endpoint, hub) = Hub { files: files(), breaks: 5, ..Hub::default() }.start();
    let ran = run(&folder, &endpoint);
    assert_eq!(ran.code, Some(1), "{}", ran.out);
    assert!(ran.err.contains("row `tokens`: cannot download"), "{}", ran.err);
    assert!(!folder.path("out").exists());
    let ran = run(&folder, &endpoint);
    assert_eq!(ran.code, Some(0), "{}", ran.err);
    assert!(prepared(&folder) == expected());
    let ranges: Vec<String> = hub.lock().unwrap().asked.iter().take(9).map(|(_, range)| range.clone()).collect();
    assert_eq!(ranges, ["0-0", "0-", "100-", "200-", "300-", "400-", "0-0", "0-0", "500-"]);
}

#[test]
fn another_file_than_the_server_tells_is_refused() {
    let folder = Folder::new();
    folder.write("pipe.ron", PIPELINE);
    let wrong = hash(b"something else");
    let (endpoint, hub) = Hub { files: files(), wrong: Some(wrong.clone()), ..Hub::default() }.start();
    let ran = run(&folder, &endpoint);
    assert_eq!(ran.code, Some(1), "{}", ran.out);
    let found = hash(&documents(0));
    let parts = ["data/a.jsonl is not the expected file", &format!("SHA-256 is {found}"), &format!("expected {wrong}")];
    parts.iter().for_each(|part| assert!(ran.err.contains(part), "{part:?} is not in: {}", ran.err));
    assert!(!folder.path("out").exists());
    // nothing wrong is kept: once the server is right, so is the file
    hub.lock().unwrap().wrong = None;
    let ran = run(&folder, &endpoint);
    assert_eq!(ran.code, Some(0), "{}", ran.err);
    assert!(prepared(&folder) == expected());
}

#[test]
fn parquet_files_are_preferred() {
    let folder = Folder::new();
    folder.write("pipe.ron", PIPELINE);
    let mut files = files();
    files.push(("data/c.parquet", b"PAR1 and then nothing".to_vec()));
    let (endpoint, _) = Hub { files, ..Hub::default() }.start();
    let ran = run(&folder, &endpoint);
    assert_eq!(ran.code, Some(1), "{}", ran.out);
    assert!(ran.err.contains("datasets--some--corpus/snapshots/c0ffee/data/c.parquet is damaged"), "{}", ran.err);
}

#[test]
fn without_a_network_the_message_says_what_to_do() {
    let folder = Folder::new();
    folder.write("pipe.ron", PIPELINE);
    let ran = run(&folder, "http://127.0.0.1:1");
    assert_eq!(ran.code, Some(1), "{}", ran.out);
    let parts = ["cannot download hf://datasets/some/corpus/data: ", "without a network give local files"];
    parts.iter().for_each(|part| assert!(ran.err.contains(part), "{part:?} is not in: {}", ran.err));
}
