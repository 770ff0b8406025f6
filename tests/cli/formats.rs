//! What other programs read: the plan as JSON, checkpoints under the published names; and the syntax of files.

use std::collections::BTreeMap;
use std::fs;

use safetensors::SafeTensors;
use serde_json::Value;

use super::{Folder, TINY, edited, repository};

#[test]
fn the_plan_has_exactly_the_documented_fields() {
    let folder = Folder::with_pipeline();
    let out = folder.succeeds(&["plan", "tiny.ron", "--batch", "2", "--block", "8", "--json"]);
    let value: Value = serde_json::from_str(&out).unwrap();
    let mut fields: Vec<&str> = value.as_object().unwrap().keys().map(String::as_str).collect();
    fields.sort_unstable();
    let expected = [
        "arena_bytes",
        "bytes_per_step",
        "flops_per_step",
        "launches",
        "launches_unfused",
        "live_peak_bytes",
        "parameters",
        "sum_bytes",
    ];
    assert_eq!(fields, expected);
}

/// Names and shapes of the last checkpoint of a run of two steps with 27 characters, width 32 and one layer.
fn checkpoint(model: &str) -> BTreeMap<String, Vec<usize>> {
    let folder = Folder::with_pipeline();
    let file = format!("model.file={}", repository(&format!("models/{model}.ron")));
    let sizes = ["model.config.d_model=32", "model.config.n_layer=1", "model.config.n_head=2"];
    let mut arguments = vec!["run", "pipe.ron", "--out", "run", "--set", "train.steps=2", "--set", &file];
    sizes.iter().for_each(|s| arguments.extend(["--set", s]));
    folder.succeeds(&arguments);
    let bytes = fs::read(folder.path("run/last.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    tensors.iter().map(|(name, view)| (name.to_string(), view.shape().to_vec())).collect()
}

/// The characters of the text of these tests.
fn vocabulary() -> usize {
    super::text().chars().collect::<std::collections::BTreeSet<_>>().len()
}

fn named(prefix: &str, tensors: &[(&str, &[usize])]) -> BTreeMap<String, Vec<usize>> {
    tensors.iter().map(|(name, shape)| (format!("{prefix}.{name}"), shape.to_vec())).collect()
}

#[test]
fn a_checkpoint_of_llama_has_the_published_names() {
    let expected = named(
        "transformer",
        &[
            ("wte.weight", &[vocabulary(), 32]),
            ("h.0.ln_1.weight", &[32]),
            ("h.0.attn.c_attn.weight", &[96, 32]),
            ("h.0.attn.c_proj.weight", &[32, 32]),
            ("h.0.ln_2.weight", &[32]),
            ("h.0.mlp.fc_1.weight", &[256, 32]),
            ("h.0.mlp.fc_2.weight", &[256, 32]),
            ("h.0.mlp.c_proj.weight", &[32, 256]),
            ("ln_f.weight", &[32]),
        ],
    );
    assert_eq!(checkpoint("llama"), expected);
}

#[test]
fn a_checkpoint_of_longhorn_has_the_published_names() {
    let padded = vocabulary().next_multiple_of(8);
    let mut tensors: Vec<(String, Vec<usize>)> =
        vec![("embedding.weight".into(), vec![padded, 32]), ("norm_f.weight".into(), vec![32])];
    // two blocks for each layer; the inner width is 64, the rank of dt 2
    for layer in 0..2 {
        for (name, shape) in [
            ("norm.weight", &[32][..]),
            ("mixer.in_proj.weight", &[128, 32]),
            ("mixer.conv1d.weight", &[64, 1, 4]),
            ("mixer.conv1d.bias", &[64]),
            ("mixer.x_proj.weight", &[34, 64]),
            ("mixer.dt_head.weight", &[64, 2]),
            ("mixer.dt_head.bias", &[64]),
            ("mixer.D", &[64]),
            ("mixer.out_proj.weight", &[32, 64]),
        ] {
            tensors.push((format!("layers.{layer}.{name}"), shape.to_vec()));
        }
    }
    let tensors: Vec<(&str, &[usize])> = tensors.iter().map(|(n, s)| (&n[..], &s[..])).collect();
    assert_eq!(checkpoint("longhorn"), named("transformer.backbone", &tensors));
}

#[track_caller]
fn model(from: &str, to: &str, message: &str) {
    let folder = Folder::new();
    folder.write("m.ron", edited(TINY, from, to));
    folder.says(&["check", "m.ron"], message);
}

#[test]
fn a_missing_bracket_is_named_where_it_was_opened() {
    model(
        "\"n_layer\": 2}",
        "\"n_layer\": 2",
        "error: m.ron:2:13: `{` is not closed: line 14, column 1 has `)`, not `}`\n",
    );
    model(
        "(out: \"d_model\")",
        "(out: \"d_model\"",
        "error: m.ron:10:13: `(` is not closed: line 12, column 9 has `]`, not `)`\n",
    );
    model("    },\n)", "    },\n", "error: m.ron:1:6: `(` is not closed: a `)` is missing\n");
    model("[\"x\"]),", "[\"x]),", "error: m.ron:10:48: the string is not closed: a `\"` is missing at its end\n");
}

#[test]
fn a_row_of_another_form_says_how_rows_look() {
    model(
        "[\"embedding\"])",
        "\"embedding\")",
        "error: m.ron:5:62: row `layers`: Expected opening `[`\n  \
         help: inputs are a list of names in quotes: [\"a\", \"b\"]\n",
    );
    model(
        ", [\"embedding\"])",
        ")",
        "error: m.ron:5:60: Expected a tuple of size 3 but found 2 elements instead\n  \
         help: a row is (\"name\", Op(attributes), [\"inputs\"])\n",
    );
}

#[test]
fn an_initial_value_that_does_not_exist() {
    let folder = Folder::with_pipeline();
    // the first element is fine, so only filling the parameter finds it
    let init = r#"Linear(out: "d_model", init: Formula("ln(2 - i)"))"#;
    folder.write("tiny.ron", edited(TINY, r#"Linear(out: "d_model")"#, init));
    folder.says(
        &["run", "pipe.ron"],
        "error: tiny.ron:10:23: row `layers.0.inner.weight`: its element 2 has no initial value: `ln(2 - i)`: \
         the result is not a finite number where i = 2\n",
    );
}

#[test]
fn values_of_the_wrong_form() {
    Folder::with_pipeline().says(
        &["run", "pipe.ron", "--set", "optimizer.lr=-1"],
        "error: pipe.ron:10:33: row `optimizer`: `AdamW`: expected a name, found `-1`\n  \
         help: `dataflow ops AdamW` shows the attributes\n",
    );
}

#[test]
fn a_folder_that_cannot_be_made() {
    let folder = Folder::with_pipeline();
    for out in ["text.txt", "text.txt/run"] {
        let message = folder.fails(&["run", "pipe.ron", "--out", out]);
        let start = format!("error: pipe.ron:11:19: row `train`: cannot create the folder {out}: ");
        assert!(message.starts_with(&start), "{message}");
        assert!(message.ends_with("; a file is in the way: choose another path\n"), "{message}");
    }
    assert_eq!(folder.read("text.txt"), super::text());
    if cfg!(target_os = "linux") {
        // nobody can make a folder there, root included
        let message = folder.fails(&["run", "pipe.ron", "--out", "/proc/nowhere/run"]);
        assert!(message.contains("row `train`: cannot create the folder /proc/nowhere/run: "), "{message}");
    }
}

#[test]
fn a_model_is_no_pipeline() {
    let message = Folder::with_pipeline().fails(&["run", "tiny.ron"]);
    assert_eq!(
        message,
        "error: tiny.ron:1:1: Expected struct `Pipeline` but found `Model`\n  \
         help: the file should be Pipeline(stages: [rows])\n"
    );
}

#[test]
fn memory_that_would_be_promised_but_is_not_there() {
    let Ok(meminfo) = fs::read_to_string("/proc/meminfo") else { return };
    let available = meminfo.lines().find_map(|l| l.strip_prefix("MemAvailable:")).unwrap();
    let kilobytes: usize = available.split_whitespace().next().unwrap().parse().unwrap();
    // the activations of a token take at least 8 numbers of 4 bytes, in each of two layers
    let batch = kilobytes * 1024 / 16 / 32 * 2;
    let setting = format!("batches.batch={batch}");
    let message = Folder::with_pipeline().fails(&["run", "pipe.ron", "--set", &setting]);
    let expected = ["the device has no room for", "more than 1073741824 tokens"];
    assert!(expected.iter().any(|e| message.contains(e)), "{message}");
    assert!(message.contains("use a smaller batch"), "{message}");
}
