//! Random graphs train alike with every system on and off: elementwise ops with broadcasts and dropout, linear layers,
//! norms, splits and joins, with values that are read never, once or often.

mod common;

use std::fmt::Write;
use std::sync::Arc;

use common::compare::{BATCH, BLOCK, budget, close, optional, request, smallest_budget, train, without};
use dataflow_graph::diagnostic::Source;
use dataflow_graph::format::model::ModelFile;
use proptest::prelude::*;
use proptest::test_runner::RngSeed;

/// A row to come: which op, which of the values so far, and an attribute.
type Choice = (u8, u16, u16, u16);

/// Activations that do not grow.
const ACTIVATIONS: [&str; 6] = ["Silu", "Tanh", "Sigmoid", "Softplus", "Relu", "LogSigmoid"];
/// Widths of linear layers. Norms get a large epsilon, as they multiply rounding errors of equal columns by its root.
const WIDTHS: [usize; 4] = [4, 6, 8, 12];

struct Builder {
    rows: String,
    /// Names and widths.
    values: Vec<(String, usize)>,
    read: Vec<bool>,
}

impl Builder {
    fn row(&mut self, outputs: &[usize], op: &str, inputs: &[usize]) -> usize {
        let first = self.values.len();
        for (i, &width) in outputs.iter().enumerate() {
            self.values.push((format!("v{}", first + i), width));
            self.read.push(false);
        }
        let list = |names: Vec<String>| names.iter().map(|n| format!("\"{n}\"")).collect::<Vec<_>>().join(", ");
        let made = self.values[first..].iter().map(|v| v.0.clone()).collect();
        inputs.iter().for_each(|&i| self.read[i] = true);
        let inputs = inputs.iter().map(|&i| self.values[i].0.clone()).collect();
        writeln!(self.rows, "        ([{}], {op}, [{}]),", list(made), list(inputs)).unwrap();
        first
    }

    /// A value of the same width, counted from the one that `choice` would be.
    fn partner(&self, a: usize, choice: u16) -> usize {
        let alike: Vec<usize> = (0..self.values.len()).filter(|&i| self.values[i].1 == self.values[a].1).collect();
        alike[choice as usize % alike.len()]
    }

    fn add(&mut self, (op, a, b, attribute): Choice) {
        let activations: Vec<usize> = (0..self.values.len()).filter(|&i| self.values[i].1 > 0).collect();
        let a = activations[a as usize % activations.len()];
        let (w, b) = (self.values[a].1, self.partner(a, b));
        let pick = attribute as usize;
        let activation = ACTIVATIONS[pick % ACTIVATIONS.len()];
        let width = WIDTHS[pick % WIDTHS.len()];
        match op % 15 {
            0 => self.row(&[w], "Add", &[a, b]),
            1 => self.row(&[w], "Add", &[a, b, a]),
            2 | 3 => self.row(&[w], &format!("Gate(activation: {})", ["Tanh", "Sigmoid"][pick % 2]), &[a, b]),
            4 => self.row(&[w], activation, &[a]),
            5 => self.row(&[w], &format!("Scale(factor: {})", [0.5, -1.0, 1.0][pick % 3]), &[a]),
            6 => self.row(&[w], &format!("Dropout(p: {})", [0.0, 0.25][pick % 2]), &[a]),
            7 => self.row(
                &[w],
                &format!("RmsNorm(eps: 0.1, groups: {})", if w.is_multiple_of(2) { 1 + pick % 2 } else { 1 }),
                &[a],
            ),
            8 => self.row(&[w], &format!("LayerNorm(eps: 0.1, bias: {})", pick.is_multiple_of(2)), &[a]),
            9 => self.row(&[width], &format!("Linear(out: {width}, bias: {})", pick.is_multiple_of(2)), &[a]),
            10 if w > 1 => self.row(&[w / 2, w - w / 2], &format!("Split(sizes: [{}, {}])", w / 2, w - w / 2), &[a]),
            11 if w < 64 => self.row(&[w + self.values[b].1], "Concat", &[a, b]),
            12 => {
                let weight = self.row(&[w], &format!("Weight(shape: [{w}], init: Uniform(bound: 1.0))"), &[]);
                // a vector is no activation that other rows could take
                let made = self.row(&[w], ["Mul", "Add"][pick % 2], &[a, weight]);
                self.values[weight].1 = 0;
                made
            }
            13 => {
                let column = self.row(&[1], "Linear(out: 1)", &[a]);
                self.row(&[w], "Mul", &[a, column])
            }
            _ => self.row(&[w], "CausalConv1d(width: 3, activation: Silu)", &[a]),
        };
    }
}

/// The text of a model; every value that nobody reads is added to the last one.
fn model(choices: &[Choice]) -> String {
    let mut b = Builder { rows: String::new(), values: vec![("x".into(), 8)], read: vec![false] };
    choices.iter().for_each(|c| b.add(*c));
    let open: Vec<usize> = (0..b.values.len()).filter(|&i| !b.read[i]).collect();
    let mut parts = Vec::new();
    for value in open {
        let normed = b.row(&[b.values[value].1], "RmsNorm(eps: 0.1)", &[value]);
        parts.push(b.row(&[8], "Linear(out: 8)", &[normed]));
    }
    let mut total = parts[0];
    for &part in &parts[1..] {
        total = b.row(&[8], "Add", &[total, part]);
    }
    let name = &b.values[total].0;
    format!(
        "Model(\n    about: \"random\",\n    config: {{}},\n    nodes: [\n        (\"x\", Embedding(rows: 65, dim: 8, \
         init: Normal(std: 1.0)), [\"tokens\"]),\n{}        (\"logits\", Linear(out: 65), [\"{name}\"]),\n    ],\n    blocks: {{}},\n)\n",
        b.rows
    )
}

fn compare(choices: &[Choice], micro_batches: usize) -> Result<(), TestCaseError> {
    let text = model(choices);
    let source = Arc::new(Source { name: "random.ron".into(), text: text.clone() });
    let file = ModelFile::parse(source).unwrap_or_else(|e| panic!("{e}\n{text}"));
    let mut request = request(file, &[], (BATCH, BLOCK), true);
    request.options.micro_batches = micro_batches;
    let plain = train(&without(request.clone(), &optional()));
    let exact = train(&without(request.clone(), &["compound", "merge", "merge_gradients"]));
    let full = train(&request);
    let small = train(&budget(&request, smallest_budget(&request)));
    prop_assert!(full == small, "with everything recomputed:\n{}", text);
    prop_assert_eq!(&plain.0, &exact.0, "losses of\n{}", text);
    // a gradient may be all cancellation (of a factor before a norm), so the largest of all is the measure
    let gradients = plain.1.iter().filter(|t| t.0.ends_with(".gradient")).flat_map(|t| t.1);
    let largest = gradients.fold(0.0f32, |m, x| m.max(x.abs()));
    for (name, value) in &plain.1 {
        prop_assert!(value == &exact.1[name], "{} of\n{}", name, text);
        let error = value.iter().zip(&full.1[name]).fold(0.0f32, |m, (x, y)| m.max((x - y).abs()));
        let tolerance = if name.ends_with(".gradient") { 1e-5 * largest } else { 1e-4 };
        prop_assert!(error <= tolerance, "{} differs by {:e} of {:e}:\n{}", name, error, largest, text);
    }
    close(&format!("losses of\n{text}"), &plain.0, &full.0, 1e-5);
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 100, rng_seed: RngSeed::Fixed(2), failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn random_graphs_train_alike(choices in prop::collection::vec(any::<Choice>(), 1..24), micro_batches in 1usize..3) {
        compare(&choices, micro_batches)?;
    }
}
