//! Parameters of the model files: names, shapes, counts and initial values, against the published models.

mod common;

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use common::{MODELS, SHAKESPEARE, model, path, training};
use dataflow_graph::plan::PlannedParameter;
use safetensors::SafeTensors;

fn parameters(name: &str, set: &[(&str, i64)]) -> Vec<PlannedParameter> {
    // the length of a sequence has no influence on parameters
    let compiled = training(&model(name), set, 1, 16).unwrap_or_else(|e| panic!("{e}"));
    compiled.plan.parameters
}

/// Total, and what weight decay applies to.
fn counts(parameters: &[PlannedParameter]) -> (usize, usize) {
    let sum = |decays: &[bool]| {
        let counted = parameters.iter().filter(|p| decays.contains(&p.decays));
        counted.map(|p| p.port.tensor.elements()).sum::<usize>()
    };
    (sum(&[true, false]), sum(&[true]))
}

/// Of the published models, tied weights once: total and decayed, for Shakespeare and at the default size.
const PUBLISHED: [(&str, [usize; 2], [usize; 2]); 6] = [
    ("llama", [10_646_784, 10_641_792], [123_587_328, 123_568_128]),
    ("rwkv", [10_763_592, 10_753_992], [124_447_776, 124_410_144]),
    ("retnet", [11_337_984, 11_332_992], [129_116_928, 129_097_728]),
    ("gla", [10_705_536, 10_697_088], [123_822_336, 123_789_312]),
    ("mamba", [11_598_720, 11_566_080], [129_153_792, 129_024_000]),
    ("longhorn", [11_451_264, 11_418_624], [128_563_968, 128_434_176]),
];

/// The same at 24 layers, 16 heads and width 1024, as `models/README.md` lists them.
const LARGE: [(&str, usize); 6] = [
    ("llama", 359_842_816),
    ("rwkv", 354_797_312),
    ("retnet", 373_212_160),
    ("gla", 360_469_504),
    ("mamba", 371_540_992),
    ("longhorn", 369_968_128),
];

/// 1234567 as 1,234,567.
fn grouped(mut n: usize) -> String {
    let mut groups = vec![];
    while n >= 1000 {
        groups.push(format!(",{:03}", n % 1000));
        n /= 1000;
    }
    groups.push(n.to_string());
    groups.iter().rev().map(String::as_str).collect()
}

#[test]
fn the_readme_lists_these_counts() {
    let readme = std::fs::read_to_string(path("models/README.md")).unwrap();
    for ((name, shakespeare, default), (_, large)) in PUBLISHED.into_iter().zip(LARGE) {
        let cells = [shakespeare[0], default[0], large].map(grouped).join(" | ");
        let line = readme.lines().find(|l| l.starts_with(&format!("| [{name}]({name}.ron)"))).expect(name);
        assert!(line.ends_with(&format!(" | {cells} |")), "{name}: {cells}");
    }
}

#[test]
fn counts_are_those_of_the_published_models() {
    for (name, shakespeare, default) in PUBLISHED {
        for (set, [total, decayed]) in [(SHAKESPEARE, shakespeare), (&[][..], default)] {
            assert_eq!(counts(&parameters(name, set)), (total, decayed), "{name} with {set:?}");
        }
    }
    for (name, total) in LARGE {
        let found = counts(&parameters(name, &[("n_layer", 24), ("n_head", 16), ("d_model", 1024)])).0;

        assert_eq!(found, total, "{name} at 350M");
    }
}

fn golden_names_match(name: &str, file: &Path, bias: i64) {
    let bytes = std::fs::read(file).unwrap();
    let (_, metadata) = SafeTensors::read_metadata(&bytes).unwrap();
    let metadata = metadata.metadata().as_ref().unwrap();
    let config: HashMap<String, serde_json::Value> = serde_json::from_str(&metadata["config"]).unwrap();
    let size = |key: &str| config[key].as_i64().unwrap();
    let mut set = vec![
        ("vocab", size("vocab_size")),
        ("d_model", size("n_embd")),
        ("n_layer", size("n_layer")),
        ("n_head", size("n_head")),
        ("block", size("block_size")),
    ];
    if bias == 1 {
        set.push(("bias", 1));
    }
    let decayed: Vec<String> = serde_json::from_str(&metadata["decayed"]).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let golden: BTreeMap<String, (Vec<usize>, bool)> = tensors
        .tensors()
        .into_iter()
        .filter_map(|(key, view)| {
            let name = key.strip_prefix("param/")?.to_string();
            let decays = decayed.contains(&name);
            Some((name, (view.shape().to_vec(), decays)))
        })
        .collect();
    let ours: BTreeMap<String, (Vec<usize>, bool)> =
        parameters(name, &set).into_iter().map(|p| (p.parameter.name, (p.parameter.shape, p.decays))).collect();
    assert!(golden.len() > 10);
    assert_eq!(ours, golden, "{name}");
}

#[test]
fn names_shapes_and_decay_are_those_of_the_published_models() {
    for name in MODELS {
        golden_names_match(name, &path(&format!("tests/golden/models/{name}.safetensors")), 0);
    }
    golden_names_match("rwkv", &path("tests/golden/models/rwkv_bias.safetensors"), 1);
}

/// What a parameter looks like before training.
enum Start {
    Ones,
    Zeros,
    /// Normal with this standard deviation.
    Normal(f64),
    /// Uniform up to this magnitude.
    Uniform(f64),
    /// The softplus of it is log-uniform on [0.001, 0.1].
    Steps,
    /// A function of layer, row and column.
    Exact(fn(f64, f64, f64) -> f64),
}
use Start::{Exact, Normal, Ones, Steps, Uniform, Zeros};

// sizes of this test: small, but with enough numbers for statistics
const C: f64 = 96.0;
const LAYERS: f64 = 3.0;
const HEADS: f64 = 4.0;
const SET: &[(&str, i64)] = &[("vocab", 65), ("d_model", 96), ("n_layer", 3), ("n_head", 4), ("block", 64)];

/// Every parameter, by the end of its name; the first that fits counts.
fn starts(name: &str) -> Vec<(&'static str, Start)> {
    let residual = 0.02 / (2.0 * LAYERS).sqrt();
    let xavier = |a: f64, b: f64| Uniform(2f64.powf(-2.5) * (6.0 / (a + b)).sqrt());
    let (inner, rank, blocks) = (2.0 * C, (C / 16.0).ceil(), 2.0 * LAYERS);
    let state_space = || {
        vec![
            ("embedding.weight", Normal(0.02)),
            ("norm.weight", Ones),
            ("norm_f.weight", Ones),
            ("mixer.in_proj.weight", Uniform(C.powf(-0.5))),
            ("mixer.conv1d.weight", Uniform(0.5)),
            ("mixer.conv1d.bias", Uniform(0.5)),
            ("mixer.x_proj.weight", Uniform(inner.powf(-0.5))),
            ("mixer.D", Ones),
            ("mixer.out_proj.weight", Uniform((inner * blocks).powf(-0.5))),
        ]
    };
    match name {
        "llama" => vec![
            ("ln_1.weight", Ones),
            ("ln_2.weight", Ones),
            ("ln_f.weight", Ones),
            ("c_proj.weight", Normal(residual)),
            (".weight", Normal(0.02)),
        ],
        "rwkv" => vec![
            ("ln_1.weight", Ones),
            ("ln_2.weight", Ones),
            ("ln_f.weight", Ones),
            ("ln_x.weight", Ones),
            ("ln_x.bias", Zeros),
            ("time_maa_k", Exact(|l, _, c| 1.0 - (c / C).powf(1.0 - l / LAYERS))),
            ("cmix.time_maa_r", Exact(|l, _, c| 1.0 - (c / C).powf(1.0 - l / LAYERS))),
            ("time_maa_v", Exact(|l, _, c| 1.0 - ((c / C).powf(1.0 - l / LAYERS) + 0.3 * l / (LAYERS - 1.0)))),
            ("tmix.time_maa_r", Exact(|l, _, c| 1.0 - (c / C).powf(0.5 * (1.0 - l / LAYERS)))),
            ("time_maa_g", Exact(|l, _, c| 1.0 - (c / C).powf(0.5 * (1.0 - l / LAYERS)))),
            ("time_decay", Exact(|l, h, _| -6.0 + 5.0 * (h / (HEADS - 1.0)).powf(0.7 + 1.3 * l / (LAYERS - 1.0)))),
            ("time_faaaa", Exact(|l, h, _| l / (LAYERS - 1.0) * (1.0 - h / (HEADS - 1.0)))),
            ("tmix.output.weight", Normal(residual)),
            (".weight", Normal(0.02)),
        ],
        "retnet" => vec![("layer_norm.weight", Ones), (".weight", Normal(0.02))],
        "gla" => vec![
            ("ln_1.weight", Ones),
            ("ln_2.weight", Ones),
            ("ln_f.weight", Ones),
            ("q_proj.weight", xavier(C, C / 2.0)),
            ("k_proj.weight", xavier(C, C / 2.0)),
            ("k_gate.0.weight", xavier(C, 16.0)),
            ("k_gate.1.weight", xavier(16.0, C / 2.0)),
            (".bias", Zeros),
            (".weight", Normal(0.02)),
        ],
        "mamba" => {
            let own = [
                ("mixer.dt_proj.weight", Uniform(rank.powf(-0.5))),
                ("mixer.dt_proj.bias", Steps),
                ("mixer.A_log", Exact(|_, _, n| (n + 1.0).ln())),
            ];
            own.into_iter().chain(state_space()).collect()
        }
        "longhorn" => {
            let own = [("mixer.dt_head.weight", Uniform(rank.powf(-0.5))), ("mixer.dt_head.bias", Zeros)];
            own.into_iter().chain(state_space()).collect()
        }
        other => panic!("no table for {other}"),
    }
}

/// Mean and standard deviation.
fn moments(x: &[f64]) -> (f64, f64) {
    let mean = x.iter().sum::<f64>() / x.len() as f64;
    (mean, (x.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / x.len() as f64).sqrt())
}

/// Why `x` cannot have these values, if so: moments beyond five standard errors, or numbers outside.
fn contradicts(start: &Start, name: &str, cols: usize, x: &[f64]) -> Option<String> {
    let n = x.len() as f64;
    let all = |wanted: f64| x.iter().any(|v| *v != wanted).then(|| format!("not all {wanted}"));
    // kurtosis: 3 for a normal, 1.8 for a uniform distribution
    let distributed = |x: &[f64], mean: f64, std: f64, kurtosis: f64| {
        let (m, s) = moments(x);
        let fourth = x.iter().map(|v| ((v - m) / s).powi(4)).sum::<f64>() / n;
        let wrong = (m - mean).abs() > 5.0 * std / n.sqrt()
            || (s / std - 1.0).abs() > 5.0 * ((kurtosis - 1.0) / (4.0 * n)).sqrt()
            || (fourth - kurtosis).abs() > 5.0 * (24.0 / n).sqrt();
        wrong.then(|| format!("mean {m}, deviation {s}, kurtosis {fourth}; expected {mean}, {std}, {kurtosis}"))
    };
    match start {
        Ones => all(1.0),
        Zeros => all(0.0),
        Normal(std) => distributed(x, 0.0, *std, 3.0),
        Uniform(bound) => match x.iter().find(|v| v.abs() > bound * (1.0 + 1e-6)) {
            Some(v) => Some(format!("{v} is beyond {bound}")),
            None => distributed(x, 0.0, bound / 3f64.sqrt(), 1.8),
        },
        Steps => {
            let logs: Vec<f64> = x.iter().map(|v| v.exp().ln_1p().ln()).collect();
            let (low, high) = (0.001f64.ln(), 0.1f64.ln());
            match logs.iter().find(|v| **v < low - 1e-4 || **v > high + 1e-4) {
                Some(v) => Some(format!("a step of e^{v}")),
                None => distributed(&logs, (low + high) / 2.0, (high - low) / 12f64.sqrt(), 1.8),
            }
        }
        Exact(value) => {
            let layer = name.split('.').find_map(|part| part.parse::<f64>().ok()).unwrap();
            let wanted = |i: usize| value(layer, (i / cols) as f64, (i % cols) as f64);
            let wrong = x.iter().enumerate().find(|&(i, v)| (v - wanted(i)).abs() > 1e-6);
            wrong.map(|(i, v)| format!("element {i} is {v}, expected {}", wanted(i)))
        }
    }
}

#[test]
fn initial_values_have_the_distributions_of_the_published_models() {
    for model in MODELS {
        let table = starts(model);
        let mut used = vec![false; table.len()];
        let mut drawn: HashMap<u32, String> = HashMap::new();
        for planned in parameters(model, SET) {
            let parameter = planned.parameter;
            let mut values = vec![0.0f32; planned.port.tensor.elements()];
            parameter.init.fill(7, &parameter.name, &parameter.shape, 0, &mut values).unwrap();
            let at = table.iter().position(|(end, _)| parameter.name.ends_with(end));
            let at = at.unwrap_or_else(|| panic!("{model} has the unexpected parameter {}", parameter.name));
            used[at] = true;
            let x: Vec<f64> = values.iter().map(|&v| v as f64).collect();
            let cols = *parameter.shape.last().unwrap();
            if let Some(why) = contradicts(&table[at].1, &parameter.name, cols, &x) {
                panic!("{model}, {}: {why}", parameter.name);
            }
            // no two parameters share their random numbers
            if matches!(table[at].1, Normal(_) | Uniform(_) | Steps) {
                let ratio = (values[0] / values[1]).to_bits();
                let other = drawn.insert(ratio, parameter.name.clone());
                assert!(other.is_none(), "{} repeats {other:?}", parameter.name);
            }
        }
        let unused: Vec<_> = table.iter().zip(used).filter(|(_, used)| !used).map(|(row, _)| row.0).collect();
        assert!(unused.is_empty(), "{model} has no parameter {unused:?}");
    }
}
