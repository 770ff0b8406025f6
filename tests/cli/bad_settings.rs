//! Wrong settings on the command line.

use super::Folder;

const ROWS: &str = "(rows: text, tokens, batches, model, loss, optimizer, train, eval, best, last)";

/// What `dataflow run` says with a setting.
#[track_caller]
fn set(setting: &str, message: &str) {
    Folder::with_pipeline().says(&["run", "pipe.ron", "--set", setting], message);
}

#[test]
fn rows_and_attributes_that_are_not_there() {
    set(
        "tran.steps=1",
        &format!(
            "error: --set tran.steps=1: there is no row `tran`; write row.attribute=value {ROWS}\n  \
             help: did you mean `train`?\n"
        ),
    );
    set(
        "train.stps=1",
        "error: pipe.ron:11:35: row `train`: `Train`: unknown attribute `stps`, expected one of: steps, micro_batches, \
         memory_budget, log_every, on_nonfinite\n  help: did you mean `steps`?\n",
    );
    set("train", "error: --set train: there is no `=`\n  help: write --set row.attribute=value\n");
}

#[test]
fn values_that_do_not_fit() {
    set(
        "train.steps=abc",
        "error: pipe.ron:11:32: row `train`: `Train`: expected a number or an expression in quotes, found `abc`\n  \
         help: `dataflow ops Train` shows the attributes\n",
    );
    set(
        "train.steps=0",
        "error: pipe.ron:11:19: row `train`: `steps`, `micro_batches` and `log_every` must be at least 1\n",
    );
    set("batches.batch=0", "error: pipe.ron:7:21: row `batches`: batch: 0 makes no batch; it must be at least 1\n");
    set(
        "batches.batch=1000000000",
        "error: pipe.ron:7:21: row `batches`: batch: 1000000000 times block: 16 is more than 1073741824 tokens; use a \
         smaller batch\n",
    );
}

#[test]
fn a_batch_that_no_memory_holds() {
    let folder = Folder::with_pipeline();
    // some 40 TB for each activation: more than there is, less than the limit of sizes
    let many = ["run", "pipe.ron", "--set", "batches.batch=1000000000", "--set", "batches.block=1"];
    let message = folder.fails(&[&many[..], &["--set", "model.config.d_model=10000"]].concat());
    assert!(message.starts_with("error: pipe.ron:11:19: row `train`: the device has no room for "), "{message}");
    assert!(message.ends_with(" more bytes: use a smaller batch, block or model\n"), "{message}");
    let message = folder.fails(&[&many[..], &["--set", "model.config.d_model=10000000000"]].concat());
    assert!(message.contains("makes the model too large for any device: use smaller sizes"), "{message}");
    let huge = ["plan", "tiny.ron", "--batch", "4000000000", "--block", "4000000000"];
    folder.says(
        &huge,
        "error: tiny.ron:4:23: row `embedding`: a tensor i32[4000000000, 4000000000] makes the model too large for any \
         device: use smaller sizes\n",
    );
}

#[test]
fn config_names_that_the_model_does_not_declare() {
    set(
        "model.config.d_modl=3",
        "error: pipe.ron:8:19: row `model`: `tiny.ron` has no config name `d_modl`\n  help: did you mean `d_model`?\n",
    );
    // names that all models share may be set whether a model uses them or not
    Folder::with_pipeline().succeeds(&["run", "pipe.ron", "--set", "model.config.n_head=4"]);
    let message = Folder::with_pipeline().fails(&["plan", "tiny.ron", "--batch", "1", "--block", "8", "--set", "zz=1"]);
    assert_eq!(message, "error: `tiny.ron` has no config name `zz`\n  help: there are: d_model, n_layer, vocab\n");
}

#[test]
fn a_model_file_that_is_not_there() {
    set(
        "model.file=nosuch.ron",
        "error: pipe.ron:8:19: row `model`: there is no model file `nosuch.ron`\n  \
         help: name one with --set model.file=models/longhorn.ron\n",
    );
}

#[test]
fn a_formula_that_divides_by_zero_for_a_setting() {
    let folder = Folder::new();
    folder.write(
        "m.ron",
        r#"Model(config: {"vocab": 8, "n_layer": 2}, nodes: [
            ("embedding", Embedding(rows: "vocab", dim: 4),                                ["tokens"]),
            ("scale",     Weight(shape: [4], init: Formula("i / (n_layer - 1)")),          []),
            ("scaled",    Mul,                                                             ["embedding", "scale"]),
            ("logits",    Linear(out: "vocab"),                                            ["scaled"]),
        ])"#,
    );
    let message = folder.fails(&["check", "m.ron", "--set", "n_layer=1"]);
    let first = message.lines().next().unwrap();
    assert!(first.contains("row `scale`: `Weight`: "), "{message}");
    assert!(first.contains("division by zero where ") && first.contains("n_layer = 1"), "{message}");
}

#[test]
fn devices_and_threads() {
    let folder = Folder::with_pipeline();
    let ran = folder.dataflow(&["run", "pipe.ron", "--threads", "0"]);
    assert_eq!(ran.code, Some(2));
    assert!(ran.err.starts_with("error: invalid value '0' for '--threads <N>': 0 is not in 1..=1024"), "{}", ran.err);
    for device in ["cuda", "cuda:1"] {
        folder.says(
            &["run", "pipe.ron", "--device", device],
            "error: there is no CUDA driver on this machine (libcuda.so is not on the library path): \
             leave `--device` out to run on the CPU\n",
        );
    }
    folder.says(
        &["run", "pipe.ron", "--device", "gpu"],
        "error: there is no device `gpu`\n  help: there are: cpu, cuda, cuda:N\n",
    );
}

#[test]
fn unknown_stages_to_stop_behind_and_systems_to_leave_out() {
    let folder = Folder::with_pipeline();
    folder.says(
        &["run", "pipe.ron", "--until", "token"],
        &format!("error: --until token: there is no such row {ROWS}\n  help: did you mean `tokens`?\n"),
    );
    let message = folder.fails(&["plan", "tiny.ron", "--batch", "1", "--block", "8", "--without", "fuze"]);
    assert!(message.starts_with("error: `fuze` is no system that can be switched off\n  help: "), "{message}");
    assert!(message.contains("simplify"), "{message}");
}

#[test]
fn a_folder_that_holds_a_run() {
    let folder = Folder::with_pipeline();
    folder.succeeds(&["run", "pipe.ron", "--out", "mine"]);
    let before = folder.read("mine/metrics.jsonl");
    folder.says(
        &["run", "pipe.ron", "--out", "mine"],
        "error: pipe.ron:11:19: row `train`: mine already holds a run; choose another folder with --out\n",
    );
    assert_eq!(folder.read("mine/metrics.jsonl"), before);
}
