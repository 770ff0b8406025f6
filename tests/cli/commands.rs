//! `check`, `ops`, `plan`, `bench`, and `run --until`.

use std::fs;

use serde_json::Value;

use super::{Folder, PIPELINE, TINY, edited, repository};

fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|e| panic!("{e}: {text}"))
}

/// The `.ron` files of a folder of the repository.
fn files(folder: &str) -> Vec<String> {
    let entries = fs::read_dir(repository(folder)).unwrap().map(|e| e.unwrap().path());
    let mut files: Vec<String> =
        entries.filter(|p| p.extension().is_some_and(|e| e == "ron")).map(|p| p.display().to_string()).collect();
    files.sort();
    assert!(files.len() >= 5, "{files:?}");
    files
}

#[test]
fn every_file_of_the_repository_is_fine() {
    let all = [files("models"), files("pipelines")].concat();
    let arguments: Vec<&str> = std::iter::once("check").chain(all.iter().map(String::as_str)).collect();
    let out = std::process::Command::new(env!("CARGO_BIN_EXE_dataflow"))
        .args(arguments)
        .current_dir(repository(""))
        .output()
        .unwrap();
    let (out, err) = (String::from_utf8(out.stdout).unwrap(), String::from_utf8(out.stderr).unwrap());
    assert_eq!(err, "");
    assert_eq!(out.lines().count(), all.len(), "{out}");
    for (file, parameters) in [("llama", "123,587,328"), ("longhorn", "128,563,968")] {
        let line = out.lines().find(|l| l.contains(&format!("models/{file}.ron: "))).unwrap();
        assert!(line.contains(&format!(": {parameters} parameters in ")), "{line}");
    }
}

#[test]
fn check_as_json() {
    let folder = Folder::with_pipeline();
    folder.write("bad.ron", edited(TINY, "Linear(out: \"d_model\")", "Liner"));
    let ran = folder.dataflow(&["check", "tiny.ron", "bad.ron", "pipe.ron", "--json"]);
    assert_eq!((ran.code, ran.err.as_str()), (Some(1), ""));
    let value = json(&ran.out);
    let expected = r#"[{"file": "bad.ron", "line": 10, "column": 23, "row": "layers.0.inner",
        "message": "unknown op `Liner`", "help": "did you mean `Linear`?"}]"#;
    assert_eq!(value["errors"], json(expected));
    assert_eq!(value["files"][0], json(r#"{"file": "tiny.ron", "parameters": 256, "decayed": 256}"#));
    assert_eq!(value["files"][1]["file"], "pipe.ron");
    let value = json(&folder.succeeds(&["check", "--json", "tiny.ron"]));
    assert_eq!(value["errors"], json("[]"));
}

#[test]
fn ops_lists_and_describes() {
    let folder = Folder::new();
    let all = folder.succeeds(&["ops"]);
    assert!(all.starts_with("ops:\n") && all.contains("\nstages:\n"), "{all}");
    let value = json(&folder.succeeds(&["ops", "--json"]));
    let list = value["ops"].as_array().unwrap();
    for name in ["Longhorn", "CausalAttention", "Linear", "RmsNorm", "Train", "Windows"] {
        let entry = list.iter().find(|e| e["name"] == name).unwrap_or_else(|| panic!("{name}"));
        assert!(entry["about"].as_str().is_some_and(|a| !a.is_empty()), "{entry}");
        assert!(all.contains(&format!("  {name} ")), "{all}");
    }
    let linear = folder.succeeds(&["ops", "Linear"]);
    for part in
        ["Linear (op)", "inputs:  ", "formula:     x W^T + b", "attributes:  out, bias, tie", "must be set: out: 8"]
    {
        assert!(linear.contains(part), "{part}: {linear}");
    }
    folder.says(&["ops", "Liner"], "error: there is no op or stage `Liner`\n  help: did you mean `Linear`?\n");
    folder.says(&["ops", "Xyzzy"], "error: there is no op or stage `Xyzzy`\n  help: `dataflow ops` lists them\n");
}

#[test]
fn plan_as_json() {
    let folder = Folder::with_pipeline();
    let value = json(&folder.succeeds(&["plan", "tiny.ron", "--batch", "2", "--block", "8", "--json"]));
    for field in [
        "launches",
        "launches_unfused",
        "arena_bytes",
        "live_peak_bytes",
        "sum_bytes",
        "parameters",
        "flops_per_step",
        "bytes_per_step",
    ] {
        assert!(value[field].as_f64().is_some_and(|n| n > 0.0), "{field}: {value}");
    }
    assert_eq!(value["parameters"], 16 * 8 + 2 * 8 * 8);
    let number = |field: &str| value[field].as_u64().unwrap();
    assert!(number("launches") <= number("launches_unfused"), "{value}");
    assert!(number("live_peak_bytes") <= number("arena_bytes"), "{value}");
    assert!(number("arena_bytes") <= number("sum_bytes"), "{value}");
}

#[test]
fn bench_measures_and_compares() {
    let folder = Folder::with_pipeline();
    let bench = ["bench", "tiny.ron", "--batch", "2", "--block", "8", "--steps", "3", "--threads", "2"];
    let text = folder.succeeds(&[&bench[..], &["--json"]].concat());
    let value = json(&text);
    for field in ["tokens_per_s", "step_ms_median", "flops_per_s", "roofline_fraction", "first_step_s"] {
        assert!(value[field].as_f64().is_some_and(|n| n > 0.0), "{field}: {value}");
    }
    if cfg!(target_os = "linux") {
        assert!(value["peak_rss_mb"].as_f64().is_some_and(|n| n > 1.0), "{value}");
    }
    let launches = value["launches"].as_array().unwrap();
    let plan = json(&folder.succeeds(&["plan", "tiny.ron", "--batch", "2", "--block", "8", "--json"]));
    assert_eq!(launches.len() as u64, plan["launches"].as_u64().unwrap());
    let shares: f64 = launches.iter().map(|l| l["share"].as_f64().unwrap()).sum();
    assert!((shares - 1.0).abs() < 1e-6, "{shares}");
    folder.write("before.json", text);
    let out = folder.succeeds(&[&bench[..], &["--compare", "before.json"]].concat());
    for part in ["by op", "slowest launches", "LinearWeight", "compared", "of the roofline"] {
        assert!(out.contains(part), "{part}: {out}");
    }
    let value = json(&folder.succeeds(&[&bench[..], &["--json", "--precision", "bf16"]].concat()));
    assert_eq!(value["precision"], "bf16");
    let ran = folder.dataflow(&[&bench[..], &["--precision", "f16"]].concat());
    assert!(ran.code == Some(2) && ran.err.contains("[possible values: f32, tf32, bf16]"), "{}", ran.err);
    let ran = folder.dataflow(&[&bench[..], &["--compare", "pipe.ron"]].concat());
    assert!(ran.code == Some(1) && ran.err.contains("pipe.ron is no result of `dataflow bench`"), "{}", ran.err);
}

#[test]
fn until_stops_after_preparing() {
    let folder = Folder::with_pipeline();
    let out = folder.succeeds(&["run", "pipe.ron", "--until", "tokens"]);
    assert!(!out.contains("step"), "{out}");
    let mut made: Vec<_> = fs::read_dir(folder.prepared()).unwrap().map(|e| e.unwrap().file_name()).collect();
    made.sort();
    assert_eq!(made, ["train.bin", "train.json", "val.bin", "val.json"]);
    assert!(!folder.path("runs").exists());
    // rows that `until` does not need are not started
    folder.write("p.ron", edited(PIPELINE, "tiny.ron", "nosuch.ron"));
    folder.succeeds(&["run", "p.ron", "--until", "batches"]);
}
