//! Rows of several documents: each document gets the logits and gradients that it gets alone.

mod common;

use std::collections::BTreeMap;
use std::sync::Arc;

use common::compare::{close, compiled, request};
use common::{MODELS, model, path};
use dataflow_graph::compile::{Request, compile};
use dataflow_graph::components::Recurrence;
use dataflow_graph::diagnostic::Source;
use dataflow_graph::format::model::ModelFile;
use dataflow_graph::op::{Op, OpError, Recurrent};
use dataflow_graph::plan::lower;
use dataflow_graph::registry::{Info, Registry};
use dataflow_graph::session::Session;
use dataflow_graph::types::TensorType;
use dataflow_kernels::device::{CpuDevice, Target};
use dataflow_ops::BuiltinOps;
use serde::{Deserialize, Serialize};

const BATCH: usize = 2;
const BLOCK: usize = 134;
/// Lengths of the documents in each row: one token, around the chunks of the kernels, several chunks.
const LENGTHS: [&[usize]; BATCH] = [&[1, 5, 64, 63, 1], &[131, 1, 2]];

/// What the inputs of a program hold.
#[derive(Clone)]
struct Batch {
    sizes: (usize, usize),
    tokens: Vec<i32>,
    targets: Vec<i32>,
    positions: Option<Vec<i32>>,
}

fn token(i: usize) -> i32 {
    ((i * i + 7 * i + 3) % 65) as i32
}

/// The documents as rows, and one by one.
fn batches() -> (Batch, Vec<Batch>) {
    let count = BATCH * BLOCK;
    let of =
        |range: std::ops::Range<usize>| (range.clone().map(token).collect(), range.map(|i| token(3 * i + 1)).collect());
    let (tokens, targets) = of(0..count);
    let positions = LENGTHS.iter().flat_map(|row| row.iter().flat_map(|&len| 0..len as i32)).collect();
    let packed = Batch { sizes: (BATCH, BLOCK), tokens, targets, positions: Some(positions) };
    let mut first = 0;
    let alone = LENGTHS.iter().flat_map(|row| row.iter()).map(|&len| {
        let (tokens, targets) = of(first..first + len);
        first += len;
        Batch { sizes: (1, len), tokens, targets, positions: None }
    });
    let alone = alone.collect();
    assert_eq!(first, count);
    (packed, alone)
}

fn session(request: &Request, batch: &Batch, threads: usize) -> Session {
    let mut request = request.clone();
    (request.options.batch, request.options.block) = batch.sizes;
    request.options.packed = batch.positions.is_some();
    let device = Arc::new(CpuDevice::new(Some(threads)).unwrap());
    let mut session = Session::new(device, &compiled(&request), None).unwrap_or_else(|e| panic!("{e}"));
    session.initialize(1).unwrap();
    session.write_input("tokens", &batch.tokens);
    if let Some(positions) = &batch.positions {
        session.write_input("positions", positions);
    }
    session
}

fn logits(request: &Request, batch: &Batch) -> Vec<f32> {
    let mut request = request.clone();
    request.objectives.clear();
    request.optimizer = None;
    request.options.training = false;
    let mut session = session(&request, batch, 2);
    session.run_step().unwrap();
    session.output("logits").unwrap()
}

/// The loss and the gradients of all parameters.
fn gradients(request: &Request, batch: &Batch, threads: usize) -> (f32, BTreeMap<String, Vec<f32>>) {
    let mut request = request.clone();
    // so that there are sums of gradients to read
    request.options.micro_batches = 2;
    let mut session = session(&request, batch, threads);
    session.write_input("targets", &batch.targets);
    session.run_step().unwrap();
    let ports = session.plan().states.iter().filter(|state| state.0.ends_with(".gradient"));
    let gradients: BTreeMap<String, Vec<f32>> = ports.map(|(name, port)| (name.clone(), session.read(port))).collect();
    assert_eq!(gradients.len(), session.plan().parameters.len());
    (session.scalar("loss").unwrap(), gradients)
}

/// The programs to compare.
fn programs() -> Vec<(String, Request)> {
    let of = |name: &str, file: std::path::PathBuf, more: &[(&str, i64)]| {
        let mut set = vec![("vocab", 65), ("d_model", 32), ("n_layer", 2), ("n_head", 2)];
        set.extend(more);
        let model = ModelFile::read(&file).unwrap_or_else(|e| panic!("{e}"));
        (name.to_string(), request(model, &set, (1, 1), true))
    };
    let block = ("block", BLOCK as i64);
    let mut programs: Vec<_> = MODELS.iter().map(|name| of(name, model(name), &[block])).collect();
    programs.push(of("retnet, linear", model("retnet"), &[("exact", 0)]));
    programs.push(of("hybrid", path("tests/models/hybrid.ron"), &[]));
    programs
}

#[test]
fn each_document_has_the_logits_that_it_has_alone() {
    let (packed, alone) = batches();
    for (name, request) in programs() {
        let together = logits(&request, &packed);
        let one_by_one: Vec<f32> = alone.iter().flat_map(|batch| logits(&request, batch)).collect();
        close(&name, &together, &one_by_one, 1e-5);
        // and that is no matter of course
        let mut joined =
            Batch { positions: Some((0..BLOCK as i32).cycle().take(BATCH * BLOCK).collect()), ..packed.clone() };
        let whole = logits(&request, &joined);
        joined.positions = None;
        close(&name, &whole, &logits(&request, &joined), 1e-5);
        let differ = whole.iter().zip(&together).filter(|(a, b)| (*a - *b).abs() > 1e-3).count();
        assert!(differ > whole.len() / 20, "{name}: {differ} of {} logits", whole.len());
    }
}

#[test]
fn gradients_are_those_of_the_documents_alone() {
    let (packed, alone) = batches();
    let count = (BATCH * BLOCK) as f32;
    for (name, request) in programs() {
        let (loss, together) = gradients(&request, &packed, 2);
        let mut sum = BTreeMap::new();
        let mut mean = 0.0;
        for batch in &alone {
            let (loss, gradients) = gradients(&request, batch, 2);
            let weight = batch.tokens.len() as f32 / count;
            mean += weight * loss;
            for (parameter, gradient) in gradients {
                let sum = sum.entry(parameter).or_insert_with(|| vec![0.0; gradient.len()]);
                sum.iter_mut().zip(&gradient).for_each(|(sum, x)| *sum += weight * x);
            }
        }
        assert!((loss - mean).abs() < 1e-5 * mean, "{name}: {loss} {mean}");
        for (parameter, gradient) in &together {
            close(&format!("{name}: {parameter}"), gradient, &sum[parameter], 1e-4);
        }
        // the same bits on any number of threads
        assert!(gradients(&request, &packed, 1) == (loss, together), "{name}");
    }
}

/// Masks differ from document to document, and are the same in the backward pass.
#[test]
fn attention_drops_in_each_document() {
    let text = std::fs::read_to_string(model("llama")).unwrap();
    let (from, to) = ("dropout: \"dropout\"),        [\"q_rotated\"", "dropout: 0.5), [\"q_rotated\"");
    assert!(text.contains(from));
    let source = Source { name: "llama.ron".into(), text: text.replace(from, to) };
    let model = ModelFile::parse(Arc::new(source)).unwrap_or_else(|e| panic!("{e}"));
    let mut request = request(model, &[("vocab", 65), ("d_model", 32), ("n_layer", 1), ("n_head", 2)], (1, 1), true);
    request.options.micro_batches = 2;
    // two documents of the same tokens
    let tokens: Vec<i32> = (0..8).chain(0..8).map(token).collect();
    let positions = Some((0..8).chain(0..8).collect());
    let packed = Batch { sizes: (1, 16), targets: tokens.clone(), tokens, positions };
    let first = Batch {
        sizes: (1, 8),
        targets: packed.targets[..8].to_vec(),
        tokens: packed.tokens[..8].to_vec(),
        positions: None,
    };
    let (both, gradients) = gradients(&request, &packed, 2);
    let (alone, _) = self::gradients(&request, &first, 2);
    assert!((both - alone).abs() > 1e-4, "{both} {alone}");
    // along the gradient the loss grows by its square, which the optimizer halves for two micro-batches
    let square: f32 = gradients.values().flatten().map(|x| 4.0 * x * x).sum();
    let step = 0.02 / square.sqrt();
    let [below, above] = [-step, step].map(|step| {
        let mut session = session(&request, &packed, 2);
        session.write_input("targets", &packed.targets);
        for planned in &session.plan().parameters {
            let mut values = session.read::<f32>(&planned.port);
            let gradient = &gradients[&format!("{}.gradient", planned.parameter.name)];
            values.iter_mut().zip(gradient).for_each(|(x, g)| *x += step * 2.0 * g);
            session.write_real(&planned.port, &values);
        }
        session.run_step().unwrap();
        session.scalar("loss").unwrap()
    });
    let slope = (above - below) / (2.0 * step * square);
    assert!((slope - 1.0).abs() < 0.02, "{slope}");
}

#[test]
fn positions_that_no_documents_have_are_an_error() {
    let (packed, _) = batches();
    let (_, request) = programs().remove(0);
    let mut session = session(&request, &packed, 1);
    session.write_input("targets", &packed.targets);
    session.write_input("positions", &vec![1; BATCH * BLOCK]);
    let message = session.run_step().unwrap_err().to_string();
    assert!(message.contains("token 0 of row 0 cannot have the position 1 in its document"), "{message}");
}

/// An op of somebody else's that looks back: it has a form to decode with, and none for packed rows.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct LooksBack {}

impl Op for LooksBack {
    fn recurrent(&self, _: &[TensorType], _: &Recurrence) -> Result<Option<Recurrent>, OpError> {
        Ok(Some(Recurrent { op: Arc::new(self.clone()), states: vec![], limit: None }))
    }
}

#[test]
fn what_looks_back_and_cannot_start_anew_is_refused() {
    let (_, mut request) = programs().remove(0);
    let mut registry = Registry::new();
    registry.add_plugin(&BuiltinOps);
    let info = Info { name: "LooksBack", about: "", inputs: &["x"], formula: "", source: "", example: "" };
    registry.op::<LooksBack>(info);
    request.registry = Arc::new(registry);
    let text = r#"Model(
        config: {"vocab": 65},
        nodes: [
            ("embedding", Embedding(rows: "vocab", dim: 8), ["tokens"]),
            ("back", LooksBack, ["embedding"]),
            ("logits", Linear(out: "vocab"), ["back"]),
        ],
    )"#;
    let source = Source { name: "back.ron".into(), text: text.into() };
    request.model = Arc::new(ModelFile::parse(Arc::new(source)).unwrap_or_else(|e| panic!("{e}")));
    request.options.packed = true;
    let message = compile(&request).err().expect("an error").to_string();
    for part in ["back.ron:5:", "`back`", "the op looks back, and has no form that starts anew at each document"] {
        assert!(message.contains(part), "{part:?} is not in: {message}");
    }
}

/// A device of another kind has no such kernels, and says so when a program is loaded.
#[test]
fn the_message_for_cuda() {
    let (packed, _) = batches();
    for (name, mut request) in programs() {
        (request.options.batch, request.options.block) = packed.sizes;
        request.options.packed = true;
        let compiled = compiled(&request);
        let message = lower(&compiled.world, &compiled.plan, Target::Cuda).unwrap_err().to_string();
        assert!(message.contains("packed batches are for the processor so far"), "{name}: {message}");
    }
}
