//! The built program as a user runs it: what it prints, writes and returns. No network; every run has a folder of
//! its own as the current folder.

mod bad_data;
mod bad_files;
mod bad_settings;
mod commands;
mod damage;
mod documents;
mod faults;
mod formats;
mod generate;
#[cfg(feature = "hub")]
mod hub;
mod import;
mod pytorch;
mod resume;
mod runs;

use std::fs;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// A folder that the program runs in.
struct Folder(tempfile::TempDir);

/// What a run of the program left.
struct Ran {
    code: Option<i32>,
    out: String,
    err: String,
}

impl Folder {
    /// An empty folder.
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    /// A folder with a small text, a model and a pipeline that trains it for five steps.
    fn with_pipeline() -> Self {
        let folder = Self::new();
        folder.write("text.txt", text());
        folder.write("tiny.ron", TINY);
        folder.write("pipe.ron", PIPELINE);
        folder
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn write(&self, name: &str, content: impl AsRef<[u8]>) {
        fs::write(self.path(name), content).unwrap();
    }

    fn read(&self, name: &str) -> String {
        fs::read_to_string(self.path(name)).unwrap_or_else(|e| panic!("{name}: {e}"))
    }

    /// The one folder that the stage `Chars` made.
    fn prepared(&self) -> PathBuf {
        let folders: Vec<_> = fs::read_dir(self.path("data")).unwrap().map(|e| e.unwrap().path()).collect();
        let [only] = &folders[..] else { panic!("{folders:?}") };
        only.clone()
    }

    /// Runs the program in this folder.
    #[track_caller]
    fn dataflow(&self, arguments: &[&str]) -> Ran {
        let mut command = Command::new(env!("CARGO_BIN_EXE_dataflow"));
        let output = command.args(arguments).current_dir(self.0.path()).output().unwrap();
        let string = |bytes| String::from_utf8(bytes).expect("the program prints UTF-8");
        let ran = Ran { code: output.status.code(), out: string(output.stdout), err: string(output.stderr) };
        assert!(!ran.err.contains("panicked"), "{}", ran.err);
        ran
    }

    /// Starts the program in this folder.
    #[track_caller]
    fn start(&self, arguments: &[&str]) -> Started {
        let mut command = Command::new(env!("CARGO_BIN_EXE_dataflow"));
        let file = |name: &str| fs::File::create(self.path(name)).unwrap();
        // files, because a pipe that nobody reads would stop the program
        let (out, err) = (self.path("started.out"), self.path("started.err"));
        command.args(arguments).current_dir(self.0.path()).stdin(Stdio::null());
        let child = command.stdout(file("started.out")).stderr(file("started.err")).spawn().unwrap();
        Started { child, out, err }
    }

    /// How many rows of metrics a run has written.
    fn rows(&self, run: &str) -> usize {
        fs::read_to_string(self.path(&format!("{run}/metrics.jsonl"))).map_or(0, |text| text.lines().count())
    }

    /// The same for a run that must succeed; returns what it printed.
    #[track_caller]
    fn succeeds(&self, arguments: &[&str]) -> String {
        let ran = self.dataflow(arguments);
        assert_eq!(ran.code, Some(0), "{arguments:?}: {}", ran.err);
        assert_eq!(ran.err, "", "{arguments:?}");
        ran.out
    }

    /// The same for a run that must end with an error; returns the message.
    #[track_caller]
    fn fails(&self, arguments: &[&str]) -> String {
        let ran = self.dataflow(arguments);
        assert_eq!(ran.code, Some(1), "{arguments:?}: {}{}", ran.out, ran.err);
        ran.err
    }

    /// A run that must end with exactly this message.
    #[track_caller]
    fn says(&self, arguments: &[&str], message: &str) {
        assert_eq!(self.fails(arguments), message, "{arguments:?}");
    }
}

/// A program that runs.
struct Started {
    child: Child,
    out: PathBuf,
    err: PathBuf,
}

impl Started {
    fn is_running(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Sends a signal: `INT`, `TERM`.
    fn signal(&self, name: &str) {
        let done = Command::new("kill").args([&format!("-{name}"), &self.child.id().to_string()]).status().unwrap();
        assert!(done.success());
    }

    /// Waits until something is so, for two minutes at most.
    #[track_caller]
    fn wait_for(&mut self, what: impl Fn() -> bool) {
        let start = Instant::now();
        while !what() {
            let (running, err) = (self.is_running(), fs::read_to_string(&self.err).unwrap());
            assert!(running && start.elapsed() < Duration::from_secs(120), "running: {running}: {err}");
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// What it said as errors and warnings so far.
    fn said(&self) -> String {
        fs::read_to_string(&self.err).unwrap()
    }

    /// Waits for its end.
    fn wait(mut self) -> Ran {
        let code = self.child.wait().unwrap().code();
        Ran { code, out: fs::read_to_string(&self.out).unwrap(), err: fs::read_to_string(&self.err).unwrap() }
    }
}

impl Drop for Started {
    fn drop(&mut self) {
        // a test that failed leaves nothing behind
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The repository's folder.
fn repository(path: &str) -> String {
    format!("{}/{path}", env!("CARGO_MANIFEST_DIR"))
}

/// 4,400 characters or so, of 27 kinds.
fn text() -> String {
    (0..100).map(|i| format!("line {i}: to be, or not to be, that is the question\n")).collect()
}

/// With a change.
#[track_caller]
fn edited(text: &str, from: &str, to: &str) -> String {
    assert!(text.contains(from), "there is no `{from}` to replace");
    text.replace(from, to)
}

const TINY: &str = r#"Model(
    config: {"vocab": 16, "d_model": 8, "n_layer": 2},
    nodes: [
        ("embedding", Embedding(rows: "vocab", dim: "d_model"), ["tokens"]),
        ("layers", Repeat(block: "layer", times: "n_layer"), ["embedding"]),
        ("logits", Linear(out: "vocab", tie: "embedding.weight"), ["layers"]),
    ],
    blocks: {
        "layer": Block(inputs: ["x"], output: "out", nodes: [
            ("inner", Linear(out: "d_model"), ["x"]),
            ("out", Add, ["x", "inner"]),
        ]),
    },
)
"#;

const PIPELINE: &str = r#"Pipeline(
    about: "test",
    seed: 7,
    stages: [
        ("text", Text(from: [File("text.txt")]), []),
        ("tokens", Chars(validation: 0.1), ["text"]),
        ("batches", Windows(batch: 4, block: 16), ["tokens"]),
        ("model", Model(file: "tiny.ron"), ["batches"]),
        ("loss", CrossEntropy, ["model", "batches"]),
        ("optimizer", AdamW(lr: Constant(1e-2), clip: 1.0), ["loss"]),
        ("train", Train(steps: 5), ["optimizer"]),
        ("eval", Evaluate(every: 5, batches: 2), ["train"]),
        ("best", Checkpoint(keep: Best), ["eval"]),
        ("last", Checkpoint(keep: Last), ["train"]),
    ],
)
"#;
