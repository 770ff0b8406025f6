//! A run that was interrupted goes on to exactly what it would have become.

use std::fs;
use std::time::{Duration, Instant};

use super::runs::{figures, weights};
use super::{Folder, edited, repository};

/// The quick pipeline of the repository, on the text of the folder and small: with dropout, and two batches in an
/// update, so that every kind of state matters.
fn quick(folder: &Folder) {
    let mut text = fs::read_to_string(repository("pipelines/shakespeare_quick.ron")).unwrap();
    let start = text.find("from: [").unwrap();
    let end = start + text[start..].find("]),").unwrap();
    text.replace_range(start..=end, "from: [File(\"text.txt\")]");
    for (from, to) in [
        ("\"models/longhorn.ron\"", &*format!("{:?}", repository("models/llama.ron"))),
        (
            "{\"n_layer\": 4, \"n_head\": 4, \"d_model\": 128}",
            "{\"n_layer\": 1, \"n_head\": 2, \"d_model\": 16, \"dropout\": 0.1}",
        ),
        ("steps: 2000", "steps: 400, micro_batches: 2"),
        ("every: 250, batches: 20", "every: 20, batches: 2"),
        ("keep: Last", "keep: Last(2), every: 10"),
        ("batch: 12, block: 64", "batch: 4, block: 32"),
    ] {
        text = edited(&text, from, to);
    }
    folder.write("quick.ron", text);
}

fn last_state(folder: &Folder, run: &str) -> Vec<u8> {
    let mut names: Vec<_> = fs::read_dir(folder.path(&format!("{run}/checkpoints"))).unwrap().flatten().collect();
    names.retain(|e| e.file_name().to_string_lossy().starts_with("step-"));
    let last = names.iter().map(|e| e.path()).max().unwrap();
    fs::read(last.join("optimizer.safetensors")).unwrap()
}

#[track_caller]
fn same(folder: &Folder, one: &str, two: &str) {
    let (a, b) = (figures(folder, one), figures(folder, two));
    assert_eq!(a.len(), b.len(), "rows");
    a.iter().zip(&b).for_each(|(a, b)| assert_eq!(a, b));
    for which in ["last", "best"] {
        assert!(weights(folder, one, which) == weights(folder, two, which), "{which}.safetensors differ");
    }
    assert!(last_state(folder, one) == last_state(folder, two), "moments or counters differ");
}

/// Numbers that look random, the same in every run of the test.
struct Random(u64);

impl Random {
    fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % n
    }
}

#[test]
fn killed_twenty_times_and_none_the_worse() {
    let folder = Folder::with_pipeline();
    quick(&folder);
    let start = Instant::now();
    folder.succeeds(&["run", "quick.ron", "--out", "alone", "--threads", "1"]);
    let whole = start.elapsed();
    let mut random = Random(1);
    let (mut kills, mut run) = (0, 0);
    while kills < 20 {
        run += 1;
        let out = format!("killed-{run}");
        loop {
            let threads = ["1", "2"][random.below(2) as usize];
            let mut arguments = vec!["run", "quick.ron", "--out", &out, "--threads", threads];
            if folder.path(&out).join("resolved.ron").exists() {
                arguments.push("--resume");
            }
            let mut started = folder.start(&arguments);
            // all twenty together take about as long as the run
            let moment = Instant::now() + whole * random.below(1000) as u32 / 8000;
            while kills < 20 && Instant::now() < moment && started.is_running() {
                std::thread::sleep(Duration::from_millis(1));
            }
            if kills < 20 && started.is_running() {
                started.kill();
                kills += 1;
                continue;
            }
            let ran = started.wait();
            assert_eq!(ran.code, Some(0), "{}", ran.err);
            assert_eq!(ran.err, "");
            break;
        }
        same(&folder, "alone", &out);
    }
}

/// Which windows come next follows from the step, over the ends of epochs (15 steps each).
#[test]
fn sequential_and_packed_batches_go_on() {
    // documents of the length of a line or so: they start at the letter `l`
    for batches in ["Sequential(", "Packed(end_of_text: 20, "] {
        let folder = Folder::with_pipeline();
        quick(&folder);
        folder.write("quick.ron", edited(&folder.read("quick.ron"), "Windows(", batches));
        folder.succeeds(&["run", "quick.ron", "--out", "alone", "--threads", "1"]);
        let mut started = folder.start(&["run", "quick.ron", "--out", "stopped", "--threads", "2"]);
        started.wait_for(|| folder.rows("stopped") > 40);
        started.signal("TERM");
        assert_eq!(started.wait().code, Some(143));
        folder.succeeds(&["run", "stopped", "--threads", "2"]);
        same(&folder, "alone", "stopped");
    }
}

#[test]
fn an_interrupted_run_says_how_to_go_on_and_does() {
    let folder = Folder::with_pipeline();
    quick(&folder);
    folder.succeeds(&["run", "quick.ron", "--out", "alone"]);
    for (signal, code) in [("INT", 130), ("TERM", 143)] {
        let mut started = folder.start(&["run", "quick.ron", "--out", signal]);
        started.wait_for(|| folder.rows(signal) > 30);
        started.signal(signal);
        let ran = started.wait();
        assert_eq!(ran.code, Some(code), "{}{}", ran.out, ran.err);
        let last = ran.out.lines().last().unwrap();
        assert!(last.starts_with("stopped after step "), "{last}");
        assert!(last.ends_with(&format!("; to go on: dataflow run {signal}")), "{last}");
        let step: u64 = last.split(['p', ';']).nth(3).unwrap().trim().parse().unwrap();
        assert!(folder.path(&format!("{signal}/checkpoints/step-{step:08}/checkpoint.ron")).is_file(), "{last}");
        let out = folder.succeeds(&["run", signal, "--threads", "1"]);
        assert!(out.starts_with(&format!("resuming {signal} after step {step}\n")), "{out}");
        same(&folder, "alone", signal);
    }
}

#[test]
fn a_second_signal_ends_the_run_at_once() {
    let folder = Folder::with_pipeline();
    quick(&folder);
    // steps of seconds
    let big = ["batches.batch=64", "batches.block=256", "model.config.d_model=256", "model.config.n_layer=8"];
    let mut arguments = vec!["run", "quick.ron", "--out", "big"];
    big.iter().for_each(|s| arguments.extend(["--set", s]));
    let mut started = folder.start(&arguments);
    // the events are opened right before the training
    started.wait_for(|| folder.path("big/metrics.jsonl").exists());
    std::thread::sleep(Duration::from_millis(300));
    started.signal("INT");
    std::thread::sleep(Duration::from_millis(100));
    started.signal("TERM");
    let ran = started.wait();
    assert_eq!(ran.code, Some(143), "{}{}", ran.out, ran.err);
    assert!(!ran.out.contains("stopped after"), "{}", ran.out);
}

#[test]
fn settings_of_the_first_start_hold_and_new_ones_are_on_purpose() {
    let folder = Folder::with_pipeline();
    folder.succeeds(&["run", "pipe.ron", "--set", "train.steps=9"]);
    // without --set and by name: as it was started
    let out = folder.succeeds(&["run", "pipe.ron", "--resume"]);
    assert!(out.starts_with("resuming runs/pipe-001 after step 9\n"), "{out}");
    let out = folder.succeeds(&["run", "pipe.ron", "--resume", "--set", "train.steps=14"]);
    assert!(out.starts_with("resuming runs/pipe-001 after step 9\n"), "{out}");
    assert_eq!(folder.read("runs/pipe-001/metrics.jsonl").lines().filter(|l| l.contains("\"loss\"")).count(), 14);
    assert!(folder.read("runs/pipe-001/resolved.ron").contains("steps: 14"));
    folder.succeeds(&["run", "pipe.ron", "--set", "train.steps=14", "--out", "straight"]);
    let rows = |run: &str| figures(&folder, run).into_iter().filter(|l| l.contains("\"loss\"")).collect::<Vec<_>>();
    assert_eq!(rows("runs/pipe-001"), rows("straight"));
}

#[test]
fn a_changed_pipeline_or_model_is_refused_with_what_changed() {
    let folder = Folder::with_pipeline();
    folder.succeeds(&["run", "pipe.ron", "--out", "mine"]);
    // comments and spaces are no change
    folder.write("pipe.ron", edited(super::PIPELINE, "seed: 7,", "seed:  7, // the same"));
    folder.succeeds(&["run", "pipe.ron", "--out", "mine", "--resume"]);
    folder.write("pipe.ron", edited(super::PIPELINE, "clip: 1.0", "clip: 2.0"));
    let help = "  help: undo the change to go on, or say on purpose what is to be different with --set \
                row.attribute=value (a changed model: --set model.file=PATH); without --resume a new run starts\n";
    folder.says(
        &["run", "pipe.ron", "--out", "mine", "--resume"],
        &format!(
            "error: pipe.ron is not what it was when mine was started:\n  \
             - (\"optimizer\", AdamW(lr: Constant(1e-2), clip: 1.0), [\"loss\"]),\n  \
             + (\"optimizer\", AdamW(lr: Constant(1e-2), clip: 2.0), [\"loss\"]),\n{help}"
        ),
    );
    folder.succeeds(&["run", "pipe.ron", "--out", "mine", "--resume", "--set", "optimizer.clip=2.0"]);
    folder.write(
        "tiny.ron",
        edited(super::TINY, "(\"out\", Add, [\"x\", \"inner\"])", "(\"out\", Mul, [\"x\", \"inner\"])"),
    );
    for arguments in [&["run", "mine"][..], &["run", "pipe.ron", "--out", "mine", "--resume"]] {
        folder.says(
            arguments,
            &format!(
                "error: tiny.ron is not what it was when mine was started:\n  \
                 - (\"out\", Add, [\"x\", \"inner\"]),\n  + (\"out\", Mul, [\"x\", \"inner\"]),\n{help}"
            ),
        );
    }
    folder.succeeds(&["run", "mine", "--set", "model.file=tiny.ron"]);
    // a model that is gone is in the checkpoint
    fs::remove_file(folder.path("tiny.ron")).unwrap();
    folder.succeeds(&["run", "mine"]);
}

#[test]
fn what_cannot_be_resumed_is_said() {
    let folder = Folder::with_pipeline();
    folder.says(
        &["run", "pipe.ron", "--resume", "--out", "mine"],
        "error: mine holds no run to resume (there is no resolved.ron); check --out, or start anew without --resume\n",
    );
    folder.succeeds(&["run", "pipe.ron", "--out", "mine"]);
    let message = folder.fails(&["run", "mine", "--set", "model.config.d_model=4"]);
    assert!(message.contains("row `train`: the checkpoint's optimizer has a tensor"), "{message}");
    folder.says(&["run", "mine", "--out", "x"], "error: a run goes on in its own folder: leave --out away\n");
}

#[test]
fn checkpoints_that_are_kept() {
    let folder = Folder::with_pipeline();
    let steps = |keep: &str| {
        let text = edited(super::PIPELINE, "keep: Last", keep);
        folder.write("k.ron", edited(&text, "steps: 5", "steps: 23"));
        let _ = fs::remove_dir_all(folder.path("k"));
        folder.succeeds(&["run", "k.ron", "--out", "k"]);
        let entries = fs::read_dir(folder.path("k/checkpoints")).unwrap().flatten();
        let mut names: Vec<String> = entries.map(|e| e.file_name().into_string().unwrap()).collect();
        names.retain(|n| !n.starts_with("best-"));
        names.sort();
        names.iter().map(|n| n.strip_prefix("step-").unwrap().parse().unwrap()).collect::<Vec<u64>>()
    };
    assert_eq!(steps("keep: Last"), [23]);
    assert_eq!(steps("keep: Last(3), every: 5").last(), Some(&23));
    assert!(steps("keep: Last(3), every: 5").len() <= 3);
    assert_eq!(steps("keep: Every(10)"), [10, 20, 23]);
    folder.says(
        &["run", "k.ron", "--set", "last.keep=Every(0)"],
        "error: k.ron:14:18: row `last`: `every` and the number of `keep` must be at least 1\n",
    );
}
