//! Wrong model and pipeline files: every error with its place, its row, and what to do.

use super::{Folder, PIPELINE, TINY, edited};

/// What `dataflow check` says about the model with a change.
#[track_caller]
fn model(from: &str, to: &str, message: &str) {
    let folder = Folder::new();
    folder.write("m.ron", edited(TINY, from, to));
    folder.says(&["check", "m.ron"], message);
}

/// What `dataflow check` says about the pipeline with a change.
#[track_caller]
fn pipeline(from: &str, to: &str, message: &str) {
    let folder = Folder::with_pipeline();
    folder.write("p.ron", edited(PIPELINE, from, to));
    folder.says(&["check", "p.ron"], message);
}

/// A whole file.
#[track_caller]
fn file(content: &[u8], message: &str) {
    let folder = Folder::new();
    folder.write("f.ron", content);
    folder.says(&["check", "f.ron"], message);
}

#[test]
fn an_unknown_op() {
    model(
        r#"Linear(out: "d_model")"#,
        r#"Liner(out: "d_model")"#,
        "error: m.ron:10:23: row `layers.0.inner`: unknown op `Liner`\n  help: did you mean `Linear`?\n",
    );
    model(
        r#"Linear(out: "d_model")"#,
        "Xyzzy",
        "error: m.ron:10:23: row `layers.0.inner`: unknown op `Xyzzy`\n  help: `dataflow ops` lists the ops\n",
    );
}

#[test]
fn a_misspelt_attribute() {
    model(
        r#"dim: "d_model""#,
        r#"dm: "d_model""#,
        "error: m.ron:4:48: row `embedding`: `Embedding`: unknown attribute `dm`, expected one of: rows, dim, init\n  \
         help: did you mean `dim`?\n",
    );
    model(
        r#"rows: "vocab", "#,
        "",
        "error: m.ron:4:47: row `embedding`: `Embedding`: the attribute `rows` is missing\n  \
         help: `dataflow ops Embedding` shows the attributes\n",
    );
}

#[test]
fn a_missing_input() {
    model(
        r#"["embedding"])"#,
        r#"["embeding"])"#,
        "error: m.ron:5:63: row `layers`: there is no row or input named `embeding`\n  help: did you mean `embedding`?\n",
    );
    model(
        r#"["x", "inner"]"#,
        r#"["x"]"#,
        "error: m.ron:11:21: row `layers.0.out`: `Add` takes 2 to 16 inputs, but the row gives 1\n  \
         help: `dataflow ops Add` shows the inputs\n",
    );
}

#[test]
fn a_cycle() {
    model(
        r#"("inner", Linear(out: "d_model"), ["x"])"#,
        r#"("inner", Linear(out: "d_model"), ["out"])"#,
        "error: m.ron:11:14: row `layers.0.out`: these rows form a cycle: `out` -> `inner` -> `out`\n  \
         help: a row cannot read what depends on it; a recurrence over time is one op, such as Longhorn\n",
    );
}

#[test]
fn a_shape_mismatch_in_a_repeated_block_is_reported_once() {
    model(
        r#"Linear(out: "d_model")"#,
        r#"Linear(out: "2 * d_model")"#,
        "error: m.ron:11:21: row `layers.0.out`: `Add`: the shapes of the inputs do not broadcast to one shape \
         (inputs: f32[1, 64, 8], f32[1, 64, 16])\n",
    );
}

#[test]
fn an_expression_that_divides_by_zero() {
    model(
        r#"Linear(out: "d_model")"#,
        r#"Linear(out: "d_model / (n_layer - 2)")"#,
        "error: m.ron:10:36: row `layers.0.inner`: `Linear`: `d_model / (n_layer - 2)`: division by zero where \
         d_model = 8, n_layer = 2\n  help: `dataflow ops Linear` shows the attributes\n",
    );
    model(
        r#""n_layer": 2"#,
        r#""n_layer": "d_model / (d_model - 8)""#,
        "error: m.ron:2:41: config `n_layer`: `d_model / (d_model - 8)`: division by zero where d_model = 8\n",
    );
}

#[test]
fn all_errors_of_a_file_at_once_and_in_its_order() {
    let folder = Folder::new();
    let mut text = edited(TINY, r#"dim: "d_model""#, r#"dm: "d_model""#);
    text = edited(&text, r#"["layers"])"#, r#"["layer"])"#);
    text = edited(&text, r#""n_layer"),"#, r#""n_layers"),"#);
    text = edited(&text, "blocks", r#"output: "logits", blocks"#);
    folder.write("m.ron", text);
    let message = folder.fails(&["check", "m.ron"]);
    let lines: Vec<&str> = message.lines().filter(|l| l.starts_with("error: ")).collect();
    assert_eq!(lines.len(), 3, "{message}");
    for (line, start) in lines.iter().zip(["error: m.ron:4:48: ", "error: m.ron:5:", "error: m.ron:6:"]) {
        assert!(line.starts_with(start), "{message}");
    }
    // errors of a block, of shapes and of another file too
    let text = edited(TINY, r#"Linear(out: "d_model")"#, "Liner");
    folder.write("a.ron", edited(&text, r#"("layers""#, r#"("bad", Linear(out: 0), ["embedding"]), ("layers""#));
    folder.write("b.ron", "Model(");
    let message = folder.fails(&["check", "a.ron", "b.ron"]);
    let lines: Vec<&str> = message.lines().filter(|l| l.starts_with("error: ")).collect();
    assert_eq!(lines.len(), 3, "{message}");
    for (line, start) in lines.iter().zip(["error: a.ron:5:17: row `bad`", "error: a.ron:10:23: ", "error: b.ron:1:"]) {
        assert!(line.starts_with(start), "{message}");
    }
}

#[test]
fn errors_of_config_and_of_rows_at_once() {
    let folder = Folder::new();
    let config = r#""n_layer": 2, "zero": 0, "wide": "d_model / zero", "wider": "2 * wide", "odd": "d_modl + 1""#;
    let mut text = edited(TINY, r#""n_layer": 2"#, config);
    text = edited(&text, r#"Linear(out: "d_model")"#, r#"Linear(out: "wider")"#);
    text = edited(&text, r#"Embedding(rows"#, "Embedding(row");
    folder.write("m.ron", text);
    // what follows from a wrong name is not said again
    folder.says(
        &["check", "m.ron"],
        "error: m.ron:2:66: config `wide`: `d_model / zero`: division by zero where d_model = 8, zero = 0\n\
         error: m.ron:2:113: config `odd`: `d_modl + 1`: unknown name `d_modl`, did you mean `d_model`?\n\
         error: m.ron:4:33: row `embedding`: `Embedding`: unknown attribute `row`, expected one of: rows, dim, init\n  \
         help: did you mean `rows`?\n",
    );
}

#[test]
fn unknown_blocks_and_parameters() {
    model(
        r#"block: "layer""#,
        r#"block: "layr""#,
        "error: m.ron:5:20: row `layers`: there is no block `layr`\n  help: did you mean `layer`?\n",
    );
    model(
        r#"tie: "embedding.weight""#,
        r#"tie: "embeding.weight""#,
        "error: m.ron:6:20: row `logits`: `Linear`: there is no parameter to tie to: `embeding.weight`, did you mean \
         `embedding.weight`?\n",
    );
    model(
        r#"("logits""#,
        r#"("logit""#,
        "error: m.ron:6:10: no row is named `logits`, the model's output\n  \
         help: name the last row \"logits\", or say `output: \"name\"`\n",
    );
    model(
        r#"("inner", Linear"#,
        r#"("x", Linear"#,
        "error: m.ron:10:14: row `layers.0.x`: the name `x` is used twice\n  help: give the row another name\n\
         error: m.ron:11:32: row `layers.0.out`: there is no row or input named `inner`\n  \
         help: an input is the name of another row, or an input of the block or model\n",
    );
}

#[test]
fn values_that_no_tensor_can_have() {
    model(
        r#"Linear(out: "d_model")"#,
        "Linear(out: 9000000000000000000)",
        "error: m.ron:10:23: row `layers.0.inner`: a tensor f32[1, 64, 9000000000000000000] makes the model too large \
         for any device: use smaller sizes\n",
    );
    model(
        r#"Linear(out: "d_model")"#,
        "Linear(out: 0)",
        "error: m.ron:10:23: row `layers.0.inner`: `Linear`: `out` must be at least 1 (inputs: f32[1, 64, 8])\n",
    );
    model(
        r#"times: "n_layer""#,
        "times: -1",
        "error: m.ron:5:51: row `layers`: `Repeat`: expected a non-negative integer, found -1\n",
    );
    model(
        r#"times: "n_layer""#,
        "times: 9000000000000000000",
        "error: m.ron:11:21: row `layers.66666.out`: the model has more than 200000 nodes\n  help: repeat fewer times\n",
    );
    let dropout = |p: &str| format!(r#"("layers", Dropout(p: {p}), ["embedding"])"#);
    model(
        r#"("layers", Repeat(block: "layer", times: "n_layer"), ["embedding"])"#,
        &dropout("1.5"),
        "error: m.ron:5:20: row `layers`: `Dropout`: the dropout probability 1.5 is not in [0, 1) \
         (inputs: f32[1, 64, 8])\n",
    );
}

#[test]
fn files_that_are_neither() {
    const FORM: &str = r#"Model(config: {"name": number}, nodes: [rows], blocks: {"name": Block(…)})"#;
    file(b"", &format!("error: f.ron:1:1: the file is empty\n  help: it should be {FORM}\n"));
    file(
        b"hello",
        &format!("error: f.ron:1:1: Expected struct `Model` but found `hello`\n  help: the file should be {FORM}\n"),
    );
    file(
        b"Model(\nab\xff)",
        "error: `f.ron` is not valid UTF-8: byte 0xff at offset 9 (line 2)\n  help: save the file as UTF-8\n",
    );
    let folder = Folder::new();
    let message = folder.fails(&["check", "nosuch.ron"]);
    assert!(message.starts_with("error: cannot read `nosuch.ron`: "), "{message}");
    assert!(message.ends_with("  help: give the path of a .ron file\n"), "{message}");
}

#[test]
fn an_unknown_stage() {
    pipeline(
        "Train(",
        "Trian(",
        "error: p.ron:11:19: row `train`: unknown stage `Trian`\n  help: did you mean `Train`?\n",
    );
    pipeline(
        "CrossEntropy",
        "Xyzzy",
        "error: p.ron:9:18: row `loss`: unknown stage `Xyzzy`\n  help: `dataflow ops` lists the stages\n",
    );
}

#[test]
fn stage_inputs_of_the_wrong_kind() {
    pipeline(
        r#"Evaluate(every: 5, batches: 2), ["train"]"#,
        r#"Evaluate(every: 5, batches: 2), ["loss"]"#,
        "error: p.ron:12:18: row `eval`: `Evaluate` takes a training run (Train), but the row gives a loss \
         (CrossEntropy)\n",
    );
    pipeline(
        r#"Windows(batch: 4, block: 16), ["tokens"]"#,
        "Windows(batch: 4, block: 16), []",
        "error: p.ron:7:21: row `batches`: `Windows` takes tokens (Chars, Tokenize, TokenFiles), but the row gives nothing\n",
    );
}

#[test]
fn all_errors_of_a_pipeline_at_once() {
    let folder = Folder::with_pipeline();
    let mut text = edited(PIPELINE, "validation: 0.1", "part: 0.1");
    text = edited(&text, r#"["loss"]"#, r#"["los"]"#);
    text = edited(&text, "keep: Best", "keep: Bst");
    folder.write("p.ron", text);
    folder.says(
        &["check", "p.ron"],
        "error: p.ron:6:26: row `tokens`: `Chars`: unknown attribute `part`, expected one of: validation\n  \
         help: `dataflow ops Chars` shows the attributes\n\
         error: p.ron:10:62: row `optimizer`: there is no row or input named `los`\n  help: did you mean `loss`?\n\
         error: p.ron:13:35: row `best`: `Checkpoint`: unknown value `Bst`, expected one of: Best, Last, Every\n  \
         help: did you mean `Best`?\n",
    );
}

#[test]
fn a_cycle_of_stages() {
    pipeline(
        r#"Chars(validation: 0.1), ["text"]"#,
        r#"Chars(validation: 0.1), ["model"]"#,
        "error: p.ron:6:20: row `tokens`: `Chars` takes a text (Text), but the row gives a model (Model)\n\
         error: p.ron:7:10: row `batches`: these rows form a cycle: `batches` -> `model` -> `tokens` -> `batches`\n  \
         help: a row cannot read what depends on it; a recurrence over time is one op, such as Longhorn\n",
    );
}
