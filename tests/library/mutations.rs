//! Files that went wrong in thousands of ways: each is either fine or an error with words, and none panics.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use dataflow::App;
use dataflow::graph::check::check;
use dataflow::graph::compile::{Request, compile};
use dataflow::graph::components::Options;
use dataflow::graph::diagnostic::{Diagnostic, Errors, Source};
use dataflow::graph::format::formula::Number;
use dataflow::graph::format::model::ModelFile;
use dataflow::graph::registry::Registry;
use dataflow::graph::session::Session;
use dataflow::kernels::device::{CpuDevice, Device};
use dataflow::kernels::random::Stream;
use dataflow::ops::loss::CrossEntropy;
use dataflow::ops::optimizer::{AdamW, Schedule};
use dataflow::pipeline::{Pipeline, PipelineFile};

/// Ops of every kind at sizes that compile at once.
const MODEL: &str = r#"Model(
    about: "x", prefix: "p", config: {"vocab": 16, "d_model": 8, "n_layer": 2, "w": "2 * d_model", "p": 0.1},
    nodes: [
        ("embedding", Embedding(rows: "vocab", dim: "d_model", init: Normal(std: 0.02)), ["tokens"]),
        ("drop", Dropout(p: "p"), ["embedding"]),
        ("layers", Repeat(block: "layer", times: "n_layer"), ["drop"]),
        ("logits", Linear(out: "vocab", tie: "embedding.weight"), ["layers"]),
    ],
    blocks: {
        "layer": Block(inputs: ["x"], output: "out", nodes: [
            ("norm", RmsNorm(eps: 1e-5), ["x"]),
            ("up", Linear(out: "2 * w", bias: true), ["norm"]),
            (["u", "z"], Split(into: 2), ["up"]),
            ("conv", CausalConv1d(width: 4, activation: Silu), ["u"]),
            (["q", "k", "v"], Split(sizes: [4, 4, "d_model"]), ["conv"]),
            ("attention", CausalAttention(heads: 2), ["q", "k", "q"]),
            ("gated", Gate(activation: Gelu), ["conv", "z"]),
            ("down", Linear(out: "d_model"), ["gated"]),
            ("out", Add, ["x", "down", "v"]),
        ]),
    },
)
"#;

const PIPELINE: &str = r#"Pipeline(
    about: "x", seed: 7,
    stages: [
        ("text", Text(from: [File("a.txt"), Archive(path: "a.zip", member: "*"), Url(url: "u", sha256: "0")]), []),
        ("tokens", Chars(validation: 0.1), ["text"]),
        ("batches", Windows(batch: 4, block: 16), ["tokens"]),
        ("model", Model(file: "m.ron", config: {"d_model": 8}), ["batches"]),
        ("loss", CrossEntropy, ["model", "batches"]),
        ("optimizer", AdamW(lr: Cosine(peak: 1e-3, floor: 1e-4, warmup: 10), betas: (0.9, 0.99), clip: 1.0), ["loss"]),
        ("train", Train(steps: 5), ["optimizer"]),
        ("eval", Evaluate(every: 5, batches: 2), ["train"]),
        ("best", Checkpoint(keep: Best), ["eval"]),
    ],
)
"#;

/// A text as words, numbers, strings and single characters, each with the white space behind it.
fn tokens(text: &str) -> Vec<&str> {
    let mut tokens = Vec::new();
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        let end = if first == '"' {
            rest[1..].find('"').map_or(rest.len(), |i| i + 2)
        } else if first.is_alphanumeric() {
            rest.find(|c: char| !(c.is_alphanumeric() || "._-".contains(c))).unwrap_or(rest.len())
        } else {
            first.len_utf8()
        };
        let end = end + rest[end..].len() - rest[end..].trim_start().len();
        tokens.push(&rest[..end]);
        rest = &rest[end..];
    }
    tokens
}

/// What a token may become. No number is so large that compiling takes long.
const OTHERS: [&str; 24] = [
    "0",
    "1",
    "-1",
    "3",
    "0.5",
    "1e-300",
    "nan",
    "true",
    "\"\"",
    "\"x\"",
    "\"out\"",
    "\"1 / 0\"",
    "\"layer - 1\"",
    "()",
    "[]",
    "{}",
    "(",
    "]",
    "\"",
    "é",
    "Add",
    "Repeat(block: \"layer\", times: 2)",
    "Silu",
    "None",
];

/// One or two changes of whole tokens, or of one character.
fn mutated(text: &str, random: &mut Stream) -> String {
    let mut tokens: Vec<String> = tokens(text).into_iter().map(String::from).collect();
    for _ in 0..=random.below(2) {
        let (at, other) = (random.below(tokens.len()), random.below(tokens.len()));
        match random.below(6) {
            0 => drop(tokens.remove(at)),
            1 => tokens.insert(at, format!("{} ", tokens[at])),
            2 => tokens.swap(at, other),
            3 => tokens[at] = tokens[other].clone(),
            4 => tokens[at] = format!("{} ", OTHERS[random.below(OTHERS.len())]),
            _ => {
                // within a token; digits stay as many as they are
                let mut chars: Vec<char> = tokens[at].chars().collect();
                let c = random.below(chars.len());
                chars[c] = ['x', '1', '.', '(', '"', ' ', 'é'][random.below(7)];
                tokens[at] = chars.into_iter().collect();
            }
        }
    }
    tokens.concat()
}

/// Whether it went through; an error must have words and a place within the text.
fn judge(text: &str, outcome: std::thread::Result<Result<(), Errors>>) -> bool {
    let Err(errors) = outcome.unwrap_or_else(|_| panic!("panicked on:\n{text}")) else { return true };
    assert!(!errors.0.is_empty(), "an error without words:\n{text}");
    for error in &errors.0 {
        assert!(!error.message.is_empty(), "an error without words:\n{text}");
        if let Some(span) = &error.span {
            // a place that lies outside, or cuts a character in two, could not be shown
            assert!(text.get(span.bytes.clone()).is_some(), "{error}:\n{text}");
        }
    }
    false
}

fn train(registry: &Arc<Registry>, device: &Arc<dyn Device>, text: &str, set: &[(&str, i64)]) -> Result<(), Errors> {
    let model = Arc::new(ModelFile::parse(Arc::new(Source { name: "m.ron".into(), text: text.into() }))?);
    let set = set.iter().map(|(name, value)| (name.to_string(), Number::Int(*value))).collect();
    let scope = model.config(&set)?;
    let adamw =
        AdamW { schedule: Schedule::Constant(1e-3), betas: (0.9, 0.99), eps: 1e-8, decay: 0.1, clip: Some(1.0) };
    let options = Options { training: true, ..Options::new(2, 8) };
    let compiled = compile(&Request {
        registry: registry.clone(),
        model,
        scope,
        options,
        objectives: vec![("loss".into(), Arc::new(CrossEntropy {}))],
        optimizer: Some(Arc::new(adamw)),
        memory_budget: None,
        without: vec![],
    })?;
    check(&compiled.plan)?;
    // what compiles also runs; tokens beyond a changed vocabulary are an error of the kernel
    let mut session = Session::new(device.clone(), &compiled, None)?;
    session.initialize(1)?;
    for input in ["tokens", "targets"] {
        let numbers: Vec<i32> = (0..16).map(|i| i % 5).collect();
        session.write_input(input, &numbers);
    }
    let ran = session.run_step().and_then(|()| session.run_update());
    ran.map_err(|e| Diagnostic::new(e.to_string()).into())
}

fn device() -> Arc<dyn Device> {
    Arc::new(CpuDevice::new(Some(1)).unwrap())
}

fn run(count: usize, original: &str, attempt: impl Fn(&str) -> Result<(), Errors>) {
    attempt(original).unwrap_or_else(|e| panic!("{e}"));
    let mut random = Stream::new(1, 1);
    let mut fine = 0;
    for _ in 0..count {
        let text = mutated(original, &mut random);
        fine += usize::from(judge(&text, catch_unwind(AssertUnwindSafe(|| attempt(&text)))));
    }
    // some changes do no harm, most do
    assert!(fine > count / 100 && fine < count / 2, "{fine} of {count} were fine");
}

#[test]
fn models() {
    let (registry, device) = (App::new().into_registry(), device());
    run(4000, MODEL, |text| train(&registry, &device, text, &[]));
}

#[test]
fn the_models_of_the_repository() {
    let (registry, device) = (App::new().into_registry(), device());
    let small = [("vocab", 16), ("d_model", 16), ("n_layer", 2), ("n_head", 2), ("block", 8)];
    let mut count = 0;
    for entry in std::fs::read_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/models")).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|e| e == "ron") {
            let text = std::fs::read_to_string(&path).unwrap();
            run(600, &text, |text| train(&registry, &device, text, &small));
            count += 1;
        }
    }
    assert!(count >= 6, "{count}");
}

#[test]
fn pipelines() {
    let registry = App::new().into_registry();
    run(4000, PIPELINE, |text| {
        let file = PipelineFile::parse(Arc::new(Source { name: "p.ron".into(), text: text.into() }))?;
        Pipeline::new(&file, &registry).map(drop)
    });
}
