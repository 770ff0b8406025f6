//! From documents to token files with the built program: killed, on a full disk, with wrong sources.

use std::fs;
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::Instant;

use serde_json::Value;

use super::runs::figures;
use super::{Folder, TINY, edited, repository};

const PIPELINE: &str = r#"
Pipeline(
    about: "documents",
    seed: 7,
    stages: [
        ("documents", Documents(from: ["corpus"]), []),
        ("tokens", Tokenize(folder: "out", validation: 0.05), ["documents"]),
        ("batches", Windows(batch: 2, block: 16), ["tokens"]),
        ("model", Model(file: "tiny.ron", config: {"vocab": 50304}), ["batches"]),
        ("loss", CrossEntropy, ["model", "batches"]),
        ("optimizer", AdamW(lr: Constant(1e-3)), ["loss"]),
        ("train", Train(steps: 3), ["optimizer"]),
    ],
)
"#;

/// A line of JSON with some words; no two are the same.
fn line(number: usize) -> String {
    let words =
        ["time", " the", " stream", " of", " 1984", " don't", "\\n\\n", " naïve", " model", "ing", ", and", " 日本"];
    let mut state = number as u64 + 1;
    let mut text = String::new();
    for _ in 0..number % 250 {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        text.push_str(words[(state >> 40) as usize % words.len()]);
    }
    format!("{{\"text\": \"{number}{text}\"}}\n")
}

fn with_corpus(documents: usize) -> Folder {
    let folder = Folder::new();
    folder.write("tiny.ron", TINY);
    folder.write("pipe.ron", PIPELINE);
    fs::create_dir(folder.path("corpus")).unwrap();
    let lines: Vec<String> = (0..documents).map(line).collect();
    for (number, lines) in lines.chunks(documents.div_ceil(3)).enumerate() {
        folder.write(&format!("corpus/{number}.jsonl"), lines.concat());
    }
    folder
}

fn names(folder: &Folder, inner: &str) -> Vec<String> {
    let entries = fs::read_dir(folder.path(inner)).map(|entries| entries.map(|e| e.unwrap().file_name()).collect());
    let mut names: Vec<_> = entries.unwrap_or_else(|_| Vec::new());
    names.sort();
    names.into_iter().map(|name| name.into_string().unwrap()).collect()
}

fn files(folder: &Folder, inner: &str) -> Vec<Vec<u8>> {
    assert_eq!(names(folder, inner), ["train.bin", "train.json", "val.bin", "val.json"]);
    names(folder, inner).iter().map(|name| fs::read(folder.path(inner).join(name)).unwrap()).collect()
}

#[test]
fn killed_at_any_moment_it_ends_with_the_same_bytes() {
    let folder = with_corpus(12_000);
    let start = Instant::now();
    folder.succeeds(&["run", "pipe.ron", "--until", "tokens", "--set", "tokens.folder=\"undisturbed\""]);
    let whole = start.elapsed();
    let mut killed = 0;
    for number in 0..10 {
        let mut command = Command::new(env!("CARGO_BIN_EXE_dataflow"));
        command.args(["run", "pipe.ron", "--until", "tokens"]).current_dir(folder.path(""));
        let mut child = command.stdout(Stdio::null()).spawn().unwrap();
        // moments all over the run, in no order
        sleep(whole.mul_f64(f64::from(number * 7 % 10) / 10.0 + 0.03));
        child.kill().unwrap();
        killed += u32::from(child.wait().unwrap().code().is_none());
        assert!(!names(&folder, "out").contains(&"val.json".into()) || folder.path("out/train.bin").exists());
    }
    assert!(killed > 0, "every run had ended before it was killed");
    folder.succeeds(&["run", "pipe.ron", "--until", "tokens"]);
    assert!(files(&folder, "out") == files(&folder, "undisturbed"));
}

#[test]
fn prepares_once_and_trains() {
    let folder = with_corpus(300);
    let out = folder.succeeds(&["run", "pipe.ron", "--until", "tokens", "--threads", "2"]);
    assert!(out.contains("tokens: 300 documents | "), "{out}");
    assert_eq!(names(&folder, "").len(), 4, "nothing but the data: {:?}", names(&folder, ""));
    let before = files(&folder, "out");
    let out = folder.succeeds(&["run", "pipe.ron", "--out", "run"]);
    assert!(!out.contains("documents | ") && out.contains("tokens/s"), "{out}");
    let metrics = folder.read("run/metrics.jsonl");
    let loss: f64 = metrics.split("\"loss\":").nth(1).unwrap().split(',').next().unwrap().parse().unwrap();
    assert!((loss - 50304f64.ln()).abs() < 0.2, "{loss}");
    assert!(files(&folder, "out") == before);
    // a model with fewer tokens is refused
    let message = folder.fails(&["run", "pipe.ron", "--set", "model.config.vocab=50000"]);
    let expected = "row `model`: the model has a vocabulary of 50000, but the tokens go up to 50256";
    assert!(message.contains(expected), "{message}");
    // the same files by their names
    let row = r#"("tokens", TokenFiles(train: "out/train.bin", validation: "out/val.bin", vocabulary: 50304), []),"#;
    let start = PIPELINE.find("(\"documents\"").unwrap();
    let end = PIPELINE.find("(\"batches\"").unwrap();
    folder.write("files.ron", format!("{}{row}\n{}", &PIPELINE[..start], &PIPELINE[end..]));
    folder.succeeds(&["run", "files.ron", "--out", "other"]);
    let message = folder.fails(&["run", "files.ron", "--set", "tokens.vocabulary=50000"]);
    assert!(
        message.contains("tokens of a vocabulary of 50257, but the pipeline says `vocabulary: 50000`"),
        "{message}"
    );
}

#[test]
fn packed_documents_train() {
    let folder = with_corpus(300);
    let model =
        format!("Model(file: {:?}, config: {{\"d_model\": 16, \"n_layer\": 1}})", repository("models/longhorn.ron"));
    let text = edited(PIPELINE, "Model(file: \"tiny.ron\", config: {\"vocab\": 50304})", &model);
    let text = edited(&text, "validation: 0.05", "tokenizer: Bytes, validation: 0.05");
    let text = edited(
        &text,
        "(\"train\", Train(steps: 3), [\"optimizer\"]),",
        "(\"train\", Train(steps: 3), [\"optimizer\"]),\n\
        (\"eval\", Evaluate(every: 3, batches: 2), [\"train\"]),\n(\"last\", Checkpoint(keep: Last), [\"train\"]),",
    );
    let losses = |batches: &str, threads: &str, out: &str| {
        folder.write("pipe.ron", edited(&text, "Windows(batch: 2, block: 16)", batches));
        let shown = folder.succeeds(&["run", "pipe.ron", "--out", out, "--threads", threads]);
        assert!(shown.contains("validation loss over the whole split"), "{shown}");
        figures(&folder, out)
    };
    let packed = losses("Packed(batch: 2, block: 200)", "1", "packed");
    assert_eq!(packed, losses("Packed(batch: 2, block: 200)", "2", "packed2"));
    // what evaluates a run afterwards keeps documents apart too
    let evaluated: Value = serde_json::from_str(&folder.succeeds(&["eval", "packed", "--json"])).unwrap();
    let last: Value = serde_json::from_str(packed.last().unwrap()).unwrap();
    let (loss, expected) = (evaluated["loss"].as_f64().unwrap(), last["eval"]["val"].as_f64().unwrap());
    assert!((loss - expected).abs() < 1e-5, "{loss} {expected}");
    // the same windows, but with a look at the documents before
    let sequential = losses("Sequential(batch: 2, block: 200)", "2", "sequential");
    assert_eq!(packed.len(), sequential.len());
    assert!(packed.iter().zip(&sequential).all(|(a, b)| a != b), "{packed:?}");
    // token files that say nothing of documents
    fs::remove_file(folder.path("out/train.json")).unwrap();
    fs::remove_file(folder.path("out/val.json")).unwrap();
    let row = r#"("tokens", TokenFiles(train: "out/train.bin", validation: "out/val.bin", vocabulary: 257), []),"#;
    let (start, end) = (text.find("(\"documents\"").unwrap(), text.find("(\"batches\"").unwrap());
    let files = format!("{}{row}\n{}", &text[..start], &text[end..]);
    folder.write("files.ron", edited(&files, "Windows(batch: 2, block: 16)", "Packed(batch: 2, block: 200)"));
    let message = folder.fails(&["run", "files.ron"]);
    let expected = "row `batches`: out/train.bin does not say which token is between its documents; give it as";
    assert!(message.contains(expected), "{message}");
    folder.succeeds(&["run", "files.ron", "--set", "batches.end_of_text=256", "--out", "bare"]);
    assert_eq!(figures(&folder, "bare"), packed);
}

/// What the program says about a wrong source, which must leave no token file.
#[track_caller]
fn no_files(folder: &Folder, parts: &[&str]) {
    let message = folder.fails(&["run", "pipe.ron"]);
    assert!(message.starts_with("error: pipe.ron:7:20: row `tokens`: "), "{message}");
    parts.iter().for_each(|part| assert!(message.contains(part), "{part:?} is not in: {message}"));
    let left = names(folder, "out");
    assert!(left.iter().all(|name| name.starts_with('.')), "{left:?}");
}

#[test]
fn wrong_sources() {
    let folder = with_corpus(30);
    folder.write("corpus/3.jsonl", "{\"text\": \"fine\"}\n{\"content\": \"x\"}\n");
    no_files(&folder, &["corpus/3.jsonl: line 2: there is no field \"text\", but \"content\""]);
    fs::remove_file(folder.path("corpus/3.jsonl")).unwrap();
    folder.write("corpus/4.jsonl.gz", b"\x1f\x8b\x08\0\0\0\0\0\0\xff\x55\x66\x77");
    no_files(&folder, &["corpus/4.jsonl.gz is damaged or not what its name says", "near byte 13 of 13"]);
    fs::remove_file(folder.path("corpus/4.jsonl.gz")).unwrap();
    folder.write("corpus/5.parquet", b"PAR1 and then nothing");
    no_files(&folder, &["corpus/5.parquet is damaged", "in the footer, at the end of its 21 bytes"]);
    fs::remove_dir_all(folder.path("corpus")).unwrap();
    fs::create_dir(folder.path("corpus")).unwrap();
    no_files(&folder, &["corpus has no files with documents (it is empty)"]);
    fs::remove_dir(folder.path("corpus")).unwrap();
    no_files(&folder, &["cannot read corpus: ", "documents.from"]);
}

#[cfg(unix)]
#[test]
fn a_disk_that_is_full() {
    let folder = with_corpus(6000);
    // a file may not grow beyond 64 KB, which the program is told instead of being ended; where a small file system of
    // our own can be mounted, that is what is full
    let limited = "trap '' XFSZ; ulimit -f 128; \"$0\" run pipe.ron --until tokens; code=$?; ls -A out; exit $code";
    let mounted = "mkdir -p out && mount -t tmpfs -o size=256k tmpfs out || exit 99; \
                   \"$0\" run pipe.ron --until tokens; code=$?; ls -A out; exit $code";
    let shell = |program: &str, arguments: &[&str], script: &str| {
        let mut command = Command::new(program);
        command.args(arguments).args(["-c", script, env!("CARGO_BIN_EXE_dataflow")]);
        command.current_dir(folder.path("")).output()
    };
    let full = shell("unshare", &["-rm", "sh"], mounted).ok().filter(|output| output.status.code() == Some(1));
    let limit = shell("sh", &[], limited).unwrap();
    for output in full.into_iter().chain([limit]) {
        let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert_eq!(output.status.code(), Some(1), "{out}{err}");
        assert!(err.contains("row `tokens`: cannot write out/.train.bin.part: "), "{err}");
        assert!(!out.contains("\ntrain.bin") && !out.contains("\nval.bin"), "{out}");
    }
    fs::remove_dir_all(folder.path("out")).unwrap();
    folder.succeeds(&["run", "pipe.ron", "--until", "tokens"]);
    assert_eq!(files(&folder, "out").len(), 4);
}
