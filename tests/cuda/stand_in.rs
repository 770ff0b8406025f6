//! Builds the stand-ins and runs the program on them.

use std::collections::hash_map::DefaultHasher;
use std::hash::{Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};
use std::sync::OnceLock;

/// The stand-ins, and a folder for what a test writes.
pub struct StandIn {
    libraries: PathBuf,
    pub folder: tempfile::TempDir,
}

/// What a run of the program left.
pub struct Ran {
    pub status: ExitStatus,
    pub out: String,
    pub err: String,
}

fn sources() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels/cuda/emulation")
}

fn gcc(arguments: &[String]) {
    let output = Command::new("g++").args(["-std=c++17", "-O2", "-fPIC", "-shared"]).args(arguments).output().unwrap();
    assert!(output.status.success(), "g++ {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// Builds the three libraries into a folder named by the hash of all sources, unless it is there.
fn build() -> PathBuf {
    let mut files: Vec<PathBuf> = std::fs::read_dir(sources()).unwrap().map(|e| e.unwrap().path()).collect();
    files.sort();
    let mut hash = DefaultHasher::new();
    files.iter().for_each(|file| std::fs::read(file).unwrap().hash(&mut hash));
    let tmp = PathBuf::from(env!("CARGO_TARGET_TMPDIR"));
    let folder = tmp.join(format!("cuda-{:016x}", hash.finish()));
    if folder.exists() {
        return folder;
    }
    let new = tmp.join(format!("cuda-new-{}", std::process::id()));
    std::fs::create_dir_all(&new).unwrap();
    let library = |name: &str, source: &str, more: &[String]| {
        let out = new.join(format!("lib{name}.so")).display().to_string();
        let source = sources().join(source).display().to_string();
        let mut arguments = vec![format!("-Wl,-soname,lib{name}.so.13"), source, "-o".into(), out];
        arguments.extend_from_slice(more);
        gcc(&arguments);
    };
    library("cuda", "driver.cpp", &["-ldl".into()]);
    library("nvrtc", "nvrtc.cpp", &[format!("-DEMULATION_FOLDER=\"{}\"", sources().display())]);
    library("cublasLt", "cublaslt.cpp", &["-L".into(), new.display().to_string(), "-lcuda".into()]);
    std::fs::rename(&new, &folder).unwrap();
    folder
}

impl StandIn {
    /// The stand-ins; none, with a message, where there is no compiler for them.
    pub fn find() -> Option<Self> {
        static LIBRARIES: OnceLock<Option<PathBuf>> = OnceLock::new();
        let libraries = LIBRARIES.get_or_init(|| {
            let found = Command::new("g++").arg("--version").output().is_ok_and(|o| o.status.success());
            if !found {
                eprintln!("skipped: g++ was not found, so there are no stand-ins for the CUDA libraries");
            }
            found.then(build)
        });
        Some(Self { libraries: libraries.clone()?, folder: tempfile::tempdir().unwrap() })
    }

    /// The program with these arguments, in the repository's folder.
    pub fn command(&self, arguments: &[&str], order: u32) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_dataflow"));
        command.args(arguments).current_dir(env!("CARGO_MANIFEST_DIR"));
        command.env("LD_LIBRARY_PATH", &self.libraries).env("EMULATION_ORDER", order.to_string());
        command.env("DATAFLOW_CACHE", self.libraries.join("cache"));
        command
    }

    /// Runs the program in the repository's folder.
    pub fn dataflow(&self, arguments: &[&str], order: u32) -> Ran {
        self.dataflow_in(Path::new(env!("CARGO_MANIFEST_DIR")), arguments, order)
    }

    /// Runs the program in a folder.
    pub fn dataflow_in(&self, folder: &Path, arguments: &[&str], order: u32) -> Ran {
        let output = self.command(arguments, order).current_dir(folder).output().unwrap();
        let string = |bytes| String::from_utf8(bytes).expect("the program prints UTF-8");
        let ran = Ran { status: output.status, out: string(output.stdout), err: string(output.stderr) };
        assert!(!ran.err.contains("panicked"), "{}", ran.err);
        ran
    }
}
