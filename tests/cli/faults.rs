//! What can go wrong while a run goes on: numbers that are not finite, disks that are full or read-only, folders that are
//! removed, threads that panic.

use std::fs;
use std::path::Path;
use std::process::{Command, ExitCode};

use dataflow::data::{Batch, BatchError, BatchSource, Draw};
use dataflow::stages::{Kind, Product, Run, Stage, StageError, StageRegistry};
use dataflow::{App, Info, Plugin, Registry};
use serde::{Deserialize, Serialize};

use super::{Folder, edited};

/// A model that overflows where it reads the first character of the vocabulary.
const FRAGILE: &str = r#"Model(
    config: {"vocab": 16, "d_model": 8},
    nodes: [
        ("embedding", Embedding(rows: "vocab", dim: "d_model", init: Formula("0.01 * i + 3e38 * max(0, 1 - row)")), ["tokens"]),
        ("sum", Add, ["embedding", "embedding"]),
        ("logits", Linear(out: "vocab"), ["sum"]),
    ],
)
"#;

/// A text whose first character of the vocabulary stands in one place only, and a pipeline that meets it now and then.
fn fragile() -> Folder {
    let folder = Folder::with_pipeline();
    let mut text = super::text();
    text.insert(1000, '\t');
    folder.write("text.txt", text);
    folder.write("tiny.ron", FRAGILE);
    let pipeline = edited(super::PIPELINE, "        (\"best\", Checkpoint(keep: Best), [\"eval\"]),\n", "");
    let pipeline = edited(&pipeline, "keep: Last", "keep: Last, every: 5");
    folder.write("pipe.ron", edited(&pipeline, "steps: 5", "steps: 200"));
    folder
}

#[test]
fn a_loss_that_is_not_finite_ends_the_run_and_names_node_and_batch() {
    let folder = fragile();
    let message = folder.fails(&["run", "pipe.ron", "--out", "mine"]);
    assert!(message.starts_with("error: step "), "{message}");
    assert!(message.contains(": the loss is NaN, which is not finite: the first node whose output is not finite is "));
    let step: u64 = message.split([' ', ':']).nth(3).unwrap().parse().unwrap();
    assert!(step > 5, "{message}");
    assert!(message.contains(&format!("is `sum` (Add), with training batch {step};")), "{message}");
    assert!(message.contains("on_nonfinite: Skip"), "{message}");
    // the last good checkpoint is there
    let saved = dataflow::saved::Saved::open(&folder.path("mine")).unwrap();
    assert_eq!(saved.step, Some(step / 5 * 5));
    assert!(saved.parameters.values().all(|t| t.as_f32().unwrap().iter().all(|x| x.is_finite())));
    // and the batches are the same after it
    assert_eq!(folder.fails(&["run", "mine"]), message);
}

#[test]
fn a_batch_that_is_not_finite_can_be_dropped() {
    let folder = fragile();
    for micro in ["1", "3"] {
        let out = format!("skip-{micro}");
        let settings = ["train.on_nonfinite=Skip", "train.steps=150", &format!("train.micro_batches={micro}")];
        let mut arguments = vec!["run", "pipe.ron", "--out", &out];
        settings.iter().for_each(|s| arguments.extend(["--set", s]));
        let ran = folder.dataflow(&arguments);
        assert_eq!(ran.code, Some(0), "{}", ran.err);
        let dropped = ran.err.lines().count();
        assert!(dropped > 0 && ran.err.lines().all(|l| l.ends_with("; the batch is dropped")), "{}", ran.err);
        let told = format!("batches dropped because they were not finite: {dropped}\n");
        assert!(ran.out.contains(&told), "{}", ran.out);
        let text = folder.read(&format!("{out}/metrics.jsonl"));
        let losses = text.lines().filter(|l| l.contains("\"loss\":")).count();
        assert_eq!(losses, 150, "every step took place");
        assert!(!text.lines().any(|l| l.contains("\"loss\":null") || l.contains("\"grad_norm\":null")), "{text}");
        // what was dropped is counted across a resume
        let sidecar = folder.read(&format!("{out}/checkpoints/step-00000150/checkpoint.ron"));
        assert!(sidecar.contains(&format!("skipped: {dropped},")), "{sidecar}");
    }
}

#[test]
fn parameters_that_are_not_finite_end_the_run_even_so() {
    let folder = Folder::with_pipeline();
    let settings =
        ["optimizer.lr=Constant(1e38)", "optimizer.decay=1e10", "train.on_nonfinite=Skip", "train.steps=100"];
    let mut arguments = vec!["run", "pipe.ron", "--out", "mine"];
    settings.iter().for_each(|s| arguments.extend(["--set", s]));
    let ran = folder.dataflow(&arguments);
    assert_eq!(ran.code, Some(1), "{}", ran.err);
    let last = ran.err.lines().last().unwrap();
    assert!(last.contains("21 updates in a row were dropped; use a lower learning rate"), "{last}");
}

/// Something mounted over a folder while a test needs it.
struct Mount<'a>(&'a Path);

impl<'a> Mount<'a> {
    /// `None` where that takes rights which this process does not have.
    fn new(path: &'a Path, arguments: &[&str]) -> Option<Self> {
        let done = Command::new("mount").args(arguments).arg(path).output().ok()?;
        done.status.success().then_some(Self(path))
    }
}

impl Drop for Mount<'_> {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("--lazy").arg(self.0).output();
    }
}

/// A pipeline of many steps with many checkpoints.
fn long() -> Folder {
    let folder = Folder::with_pipeline();
    let pipeline = edited(super::PIPELINE, "keep: Last", "keep: Last, every: 20");
    let pipeline = edited(&pipeline, "every: 5, batches: 2", "every: 50, batches: 2");
    // so that a second has some hundred steps, and no million rows wait for the disk
    let pipeline = edited(&pipeline, "batch: 4, block: 16", "batch: 32, block: 128");
    folder.write("tiny.ron", edited(super::TINY, "\"d_model\": 8", "\"d_model\": 64"));
    folder.write("pipe.ron", edited(&pipeline, "steps: 5", "steps: 100000000, log_every: 1000000"));
    folder
}

/// Stops a run, and sees that nothing was lost.
fn stops_well(folder: &Folder, started: super::Started, out: &str) {
    started.signal("INT");
    let ran = started.wait();
    assert_eq!(ran.code, Some(130), "{}{}", ran.out, ran.err);
    let text = folder.read(&format!("{out}/metrics.jsonl"));
    let steps: Vec<u64> = text
        .lines()
        .map(|l| serde_json::from_str::<serde_json::Value>(l).unwrap())
        .filter(|row| row.get("loss").is_some())
        .map(|row| row["step"].as_u64().unwrap())
        .collect();
    assert!(steps.iter().enumerate().all(|(n, step)| n as u64 == *step), "every step has its row");
    let saved = dataflow::saved::Saved::open(&folder.path(out)).unwrap();
    assert!(saved.warnings.is_empty());
    let step = format!("step-{:08}", steps.len());
    assert!(folder.path(&format!("{out}/checkpoints/{step}/checkpoint.ron")).is_file(), "{step}");
}

#[test]
fn a_full_disk_harms_nothing() {
    let folder = long();
    let disk = folder.path("disk");
    fs::create_dir(&disk).unwrap();
    let Some(_mount) = Mount::new(&disk, &["-t", "tmpfs", "-o", "size=8m", "tmpfs"]) else {
        eprintln!("skipped: mounting a small disk takes root");
        return;
    };
    let mut started = folder.start(&["run", "pipe.ron", "--out", "disk/mine"]);
    started.wait_for(|| folder.path("disk/mine/last.safetensors").exists());
    // whatever room is left goes
    let filler = disk.join("filler");
    let mut file = fs::File::create(&filler).unwrap();
    while std::io::Write::write_all(&mut file, &[1; 4096]).is_ok() {}
    // an open file keeps its space
    drop(file);
    let err = folder.path("started.err");
    started.wait_for(|| fs::read_to_string(&err).unwrap().contains("is not written: "));
    let text = started.said();
    let line = text.lines().find(|l| l.contains("is not written")).unwrap();
    assert!(line.starts_with("warning: the checkpoint of step "), "{line}");
    assert!(line.contains("free some space") && line.ends_with(" is whole; the run goes on and tries again"), "{line}");
    let saved = dataflow::saved::Saved::open(&folder.path("disk/mine")).unwrap();
    assert!(saved.warnings.is_empty(), "the checkpoint before is whole: {:?}", saved.warnings);
    fs::remove_file(&filler).unwrap();
    started.wait_for(|| fs::read_to_string(&err).unwrap().contains("checkpoints are written again"));
    stops_well(&folder, started, "disk/mine");
}

#[test]
fn a_read_only_disk_harms_nothing() {
    let folder = long();
    let disk = folder.path("disk");
    fs::create_dir(&disk).unwrap();
    let mut started = folder.start(&["run", "pipe.ron", "--out", "disk/mine"]);
    started.wait_for(|| folder.path("disk/mine/last.safetensors").exists());
    let path = disk.to_str().unwrap();
    let Some(mount) = Mount::new(&disk, &["--bind", "-o", "ro", path]) else {
        eprintln!("skipped: mounting a folder read-only takes root");
        return;
    };
    let err = folder.path("started.err");
    started.wait_for(|| fs::read_to_string(&err).unwrap().contains("is not written: "));
    let text = started.said();
    let line = text.lines().find(|l| l.contains("is not written")).unwrap();
    assert!(line.contains("Read-only file system") && line.contains("; the run goes on and tries again"), "{line}");
    // a new run is refused before it trains
    let message = folder.fails(&["run", "pipe.ron", "--out", "disk/other"]);
    assert!(message.contains("cannot create the folder disk/other: Read-only file system"), "{message}");
    assert!(message.contains("choose another folder"), "{message}");
    drop(mount);
    started.wait_for(|| fs::read_to_string(&err).unwrap().contains("checkpoints are written again"));
    stops_well(&folder, started, "disk/mine");
}

#[test]
#[cfg(unix)]
fn a_removed_folder_comes_back() {
    let folder = long();
    let mut started = folder.start(&["run", "pipe.ron", "--out", "mine"]);
    started.wait_for(|| folder.path("mine/last.safetensors").exists() && folder.rows("mine") > 20);
    // the run may be writing into it
    while fs::remove_dir_all(folder.path("mine")).is_err() {}
    let err = folder.path("started.err");
    started.wait_for(|| fs::read_to_string(&err).unwrap().contains("the folder mine was gone; it is made anew"));
    started.wait_for(|| folder.path("mine/last.safetensors").exists());
    stops_well(&folder, started, "mine");
    let out = folder.succeeds(&["run", "mine", "--until", "train"]);
    assert!(out.starts_with("resuming mine after step "), "{out}");
}

/// Batches of a thread that panics at step 3.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Broken {}

impl BatchSource for Broken {
    fn shape(&self) -> (usize, usize) {
        (2, 4)
    }
    fn vocabulary(&self) -> usize {
        16
    }
    fn fill(&mut self, draw: Draw, batch: &mut Batch) -> Result<(), BatchError> {
        assert!(draw.step < 3, "no batch {}", draw.step);
        batch.resize(2, 4);
        batch.targets.fill(1);
        Ok(())
    }
    fn duplicate(&self) -> Box<dyn BatchSource> {
        Box::new(self.clone())
    }
}

impl Stage for Broken {
    fn inputs(&self) -> &'static [Kind] {
        &[]
    }
    fn output(&self) -> Kind {
        Kind::Batches
    }
    fn start(&self, _: &mut Run, _: &[&Product]) -> Result<Product, StageError> {
        Ok(Product::Batches(Box::new(self.clone())))
    }
}

impl Plugin for Broken {
    fn build(&self, registry: &mut Registry) {
        let info = Info { name: "Broken", about: "", inputs: &[], formula: "", source: "", example: "" };
        registry.stage::<Broken>(info);
    }
}

#[test]
fn a_panic_in_a_thread_of_a_stage_ends_the_run() {
    let folder = Folder::with_pipeline();
    let rows = super::PIPELINE.split_once("        (\"model\"").unwrap().1;
    let text = format!("Pipeline(stages: [\n        (\"batches\", Broken, []),\n        (\"model\"{rows}");
    let text = edited(&text, "        (\"eval\", Evaluate(every: 5, batches: 2), [\"train\"]),\n", "");
    folder.write("broken.ron", edited(&text, "        (\"best\", Checkpoint(keep: Best), [\"eval\"]),\n", ""));
    let registry = App::new().add_plugin(Broken {}).into_registry();
    let path = |name: &str| folder.path(name).display().to_string();
    let arguments = ["dataflow", "run", &path("broken.ron"), "--out", &path("mine")].map(std::ffi::OsString::from);
    assert_eq!(dataflow::cli::run(&registry, arguments), ExitCode::from(1));
    // the steps before it are recorded
    assert_eq!(folder.rows("mine"), 3);
}
