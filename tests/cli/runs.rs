//! What a run writes, and that it writes the same whatever the number of threads.

use std::collections::BTreeMap;
use std::fs;

use safetensors::SafeTensors;
use serde_json::Value;

use super::{Folder, edited, repository};

/// The rows of `metrics.jsonl` without the speed, which no two runs share. The numbers stay text: equal text is equal
/// bits.
pub(super) fn figures(folder: &Folder, run: &str) -> Vec<String> {
    let text = folder.read(&format!("{run}/metrics.jsonl"));
    text.lines().map(|l| l.split(",\"tokens_per_s\"").next().unwrap().to_string()).collect()
}

pub(super) fn weights(folder: &Folder, run: &str, which: &str) -> Vec<u8> {
    fs::read(folder.path(&format!("{run}/{which}.safetensors"))).unwrap()
}

/// Trains a small model of a file of the repository with 1 and 2 threads, and with another seed.
fn same_with_any_threads(model: &str, more: &[&str]) {
    let folder = Folder::with_pipeline();
    let again = edited(super::PIPELINE, "seed: 7", "seed: 8");
    folder.write("other.ron", again);
    let file = format!("model.file={}", repository(&format!("models/{model}.ron")));
    let run = |pipeline: &str, threads: &str, out: &str| {
        let mut arguments = vec!["run", pipeline, "--threads", threads, "--out", out, "--set", &file];
        let sizes = ["model.config.d_model=32", "model.config.n_layer=2", "model.config.n_head=2"];
        let times = ["train.steps=20", "eval.every=10"];
        for setting in sizes.iter().chain(&times).chain(more) {
            arguments.extend(["--set", setting]);
        }
        folder.succeeds(&arguments);
        figures(&folder, out)
    };
    let one = run("pipe.ron", "1", "one");
    let two = run("pipe.ron", "2", "two");
    // 20 steps; evaluations after 0, 10 and 20
    assert_eq!(one.len(), 23);
    assert_eq!(one.iter().filter(|l| l.contains("\"grad_norm\":")).count(), 20);
    assert_eq!(one.iter().filter(|l| l.contains("\"eval\":")).count(), 3);
    assert_eq!(one, two);
    for which in ["last", "best"] {
        assert!(weights(&folder, "one", which) == weights(&folder, "two", which), "{which}.safetensors differ");
    }
    let other = run("other.ron", "2", "other");
    for (a, b) in one.iter().zip(&other) {
        assert_ne!(a, b);
    }
    assert!(weights(&folder, "one", "last") != weights(&folder, "other", "last"));
}

#[test]
fn longhorn_trains_alike_with_any_threads() {
    same_with_any_threads("longhorn", &[]);
}

#[test]
fn llama_trains_alike_with_any_threads() {
    same_with_any_threads("llama", &[]);
}

#[test]
fn llama_with_dropout_trains_alike_with_any_threads() {
    same_with_any_threads("llama", &["model.config.dropout=0.1"]);
}

#[test]
fn the_run_folder() {
    let folder = Folder::with_pipeline();
    let settings = ["train.steps=6", "eval.every=2", "model.config.d_model=4", "optimizer.lr=Constant(0.02)"];
    let mut arguments = vec!["run", "pipe.ron", "--out", "mine"];
    settings.iter().for_each(|s| arguments.extend(["--set", s]));
    let out = folder.succeeds(&arguments);
    assert!(out.ends_with("run folder: mine\n"), "{out}");
    assert!(out.contains("validation loss over the whole split: "), "{out}");

    // the pipeline as it ran
    let resolved = folder.read("mine/resolved.ron");
    for part in ["steps: 6", "every: 2", "\"d_model\": 4", "lr: Constant(0.02)", "seed: 7"] {
        assert!(resolved.contains(part), "{part}: {resolved}");
    }
    let checked = folder.succeeds(&["check", "mine/resolved.ron"]);
    assert!(checked.starts_with("mine/resolved.ron: pipeline of 10 stages; "), "{checked}");
    // and it runs again, to the same figures
    folder.succeeds(&["run", "mine/resolved.ron", "--out", "again"]);
    assert_eq!(figures(&folder, "mine"), figures(&folder, "again"));

    metrics(&folder);
    assert!(folder.read("mine/loss.svg").trim_end().ends_with("</svg>"));
    let names: Vec<String> =
        fs::read_dir(folder.path("mine")).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    let events: Vec<_> = names.iter().filter(|n| n.starts_with("events.out.tfevents.")).collect();
    assert_eq!(events.len(), 1, "{names:?}");
    assert!(fs::metadata(folder.path("mine").join(events[0])).unwrap().len() > 200);
    assert_eq!(names.len(), 8, "run, resolved, metrics, events, curve, checkpoints and two weight files: {names:?}");

    let vocabulary = folder.read(&format!("{}/train.json", folder.prepared().display()));
    let vocabulary: Value = serde_json::from_str(&vocabulary).unwrap();
    let vocabulary = vocabulary["vocabulary"].as_u64().unwrap() as usize;
    let expected = BTreeMap::from([
        ("embedding.weight".to_string(), vec![vocabulary, 4]),
        ("layers.0.inner.weight".to_string(), vec![4, 4]),
        ("layers.1.inner.weight".to_string(), vec![4, 4]),
    ]);
    for which in ["best", "last"] {
        let bytes = weights(&folder, "mine", which);
        let tensors = SafeTensors::deserialize(&bytes).unwrap();
        let shapes: BTreeMap<_, _> = tensors.iter().map(|(name, view)| (name.into(), view.shape().to_vec())).collect();
        assert_eq!(shapes, expected, "{which}");
        for (name, view) in tensors.iter() {
            assert_eq!(view.dtype(), safetensors::Dtype::F32);
            let mut numbers = view.data().chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap()));
            assert!(numbers.clone().all(f32::is_finite) && numbers.any(|x| x != 0.0), "{which}: {name}");
        }
    }
}

/// The rows of six steps, with evaluations after 0, 2, 4 and 6.
fn metrics(folder: &Folder) {
    let text = folder.read("mine/metrics.jsonl");
    let rows: Vec<Value> = text.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    let fields = |row: &Value| row.as_object().unwrap().keys().cloned().collect::<Vec<_>>();
    let (evaluations, steps): (Vec<&Value>, Vec<&Value>) = rows.iter().partition(|r| r.get("eval").is_some());
    assert_eq!((evaluations.len(), steps.len()), (4, 6));
    for (n, row) in steps.iter().enumerate() {
        assert_eq!(fields(row), ["grad_norm", "loss", "lr", "step", "tokens", "tokens_per_s"]);
        assert_eq!((row["step"].as_u64(), row["tokens"].as_u64()), (Some(n as u64), Some(64 * (n as u64 + 1))));
        assert_eq!(row["lr"].as_f64().unwrap() as f32, 0.02);
        for field in ["loss", "grad_norm", "tokens_per_s"] {
            assert!(row[field].as_f64().unwrap() > 0.0, "{field}: {row}");
        }
    }
    for (n, row) in evaluations.iter().enumerate() {
        assert_eq!(fields(row), ["eval", "step"]);
        assert_eq!(row["step"].as_u64(), Some(2 * n as u64));
        assert_eq!(fields(&row["eval"]), ["train", "val"]);
    }
    let validation = |n: usize| evaluations[n]["eval"]["val"].as_f64().unwrap();
    assert!(validation(3) < validation(0), "it learns: {text}");
    // a model of 4 numbers that starts at random knows nothing: the loss of a guess among all characters
    assert!((steps[0]["loss"].as_f64().unwrap() - (text_vocabulary() as f64).ln()).abs() < 0.2, "{}", steps[0]);
}

fn text_vocabulary() -> usize {
    super::text().chars().collect::<std::collections::BTreeSet<_>>().len()
}

#[test]
fn runs_are_numbered() {
    let folder = Folder::with_pipeline();
    let first = folder.succeeds(&["run", "pipe.ron"]);
    let second = folder.succeeds(&["run", "pipe.ron"]);
    assert!(first.ends_with("run folder: runs/pipe-001\n"), "{first}");
    assert!(second.ends_with("run folder: runs/pipe-002\n"), "{second}");
    assert_eq!(figures(&folder, "runs/pipe-001"), figures(&folder, "runs/pipe-002"));
}

/// A memory budget changes no number of a run; one that cannot be met is an error that names the smallest.
#[test]
fn a_memory_budget_changes_no_number() {
    let folder = Folder::with_pipeline();
    let file = format!("model.file={}", repository("models/longhorn.ron"));
    let run = |out: &str, budget: &str| {
        let budget = format!("train.memory_budget={budget}");
        let mut arguments = vec!["run", "pipe.ron", "--out", out, "--set", &file, "--set", &budget];
        for setting in ["model.config.d_model=32", "model.config.n_layer=3", "model.config.n_head=2"] {
            arguments.extend(["--set", setting]);
        }
        folder.dataflow(&arguments)
    };
    let message = run("none", "1000").err;
    assert!(message.contains("a memory budget of 1000 bytes cannot be met"), "{message}");
    let smallest = message.split("the smallest that can is ").nth(1).expect("a number").lines().next().unwrap();
    for (out, budget) in [("large", "1000000000"), ("small", smallest)] {
        let ran = run(out, budget);
        assert_eq!(ran.code, Some(0), "{}", ran.err);
    }
    assert_eq!(figures(&folder, "large"), figures(&folder, "small"));
    assert!(weights(&folder, "large", "last") == weights(&folder, "small", "last"));
}

/// The plan of one model, without and with a budget.
#[test]
fn a_plan_fits_its_memory_budget() {
    let folder = Folder::with_pipeline();
    let file = repository("models/llama.ron");
    let plan = |more: &[&str]| {
        let mut arguments = vec!["plan", &file, "--batch", "2", "--block", "64", "--set", "d_model=32"];
        arguments.extend(["--set", "n_layer=4", "--set", "n_head=2", "--set", "vocab=65"]);
        arguments.extend(more);
        folder.succeeds(&arguments)
    };
    let json = |more: &[&str]| serde_json::from_str::<Value>(&plan(&[&["--json"], more].concat())).unwrap();
    let full = json(&[]);
    let bytes = full["arena_bytes"].as_u64().unwrap() * 7 / 10;
    let budget = bytes.to_string();
    let tight = json(&["--memory-budget", &budget]);
    assert!(tight["arena_bytes"].as_u64().unwrap() <= bytes, "{tight}");
    assert!(tight["flops_per_step"].as_f64() > full["flops_per_step"].as_f64());
    assert_eq!(tight["launches_unfused"], full["launches_unfused"]);
    let text = plan(&["--memory-budget", &budget]);
    assert!(text.contains("\nrecomputed  ") && text.contains(".recomputed  "), "{text}");
}
