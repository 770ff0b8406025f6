//! Generation: every model file, taken in by pieces and decoded, gives the logits of its parallel form.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use dataflow::App;
use dataflow::generate::pool::{Next, Pool, Setup};
use dataflow::graph::compile::{Request, compile};
use dataflow::graph::components::Options;
use dataflow::graph::format::formula::Number;
use dataflow::graph::format::model::ModelFile;
use dataflow::graph::session::Session;
use dataflow::graph::types::DType;
use dataflow::kernels::device::CpuDevice;

const MODELS: [&str; 6] = ["llama", "rwkv", "retnet", "gla", "mamba", "longhorn"];
const VOCAB: usize = 65;

struct Model {
    setup: Setup,
}

impl Model {
    fn new(file: &str, capacity: usize, weights: DType, set: &[(&str, i64)]) -> Self {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(file);
        let model = Arc::new(ModelFile::read(&path).unwrap());
        let small = [("vocab", VOCAB as i64), ("d_model", 64), ("n_layer", 2), ("n_head", 2), ("block", 200)];
        let set: BTreeMap<String, Number> =
            small.iter().chain(set).map(|(name, value)| (name.to_string(), Number::Int(*value))).collect();
        let scope = model.config(&set).unwrap_or_else(|e| panic!("{e}"));
        let registry = App::new().into_registry();
        let device = Arc::new(CpuDevice::new(Some(2)).unwrap());
        Self { setup: Setup { registry, device, model, scope, slots: 5, capacity, weights } }
    }

    /// The logits of the parallel form, `[tokens, classes]`.
    fn parallel(&self, tokens: &[u32]) -> Vec<f32> {
        let Setup { registry, device, model, scope, .. } = &self.setup;
        let options = Options::new(1, tokens.len());
        let request = Request {
            registry: registry.clone(),
            model: model.clone(),
            scope: scope.clone(),
            options,
            objectives: vec![],
            optimizer: None,
            without: vec![],
            memory_budget: None,
        };
        let mut session = Session::new(device.clone(), &compile(&request).unwrap(), None).unwrap();
        session.initialize(7).unwrap();
        session.write_input("tokens", &tokens.iter().map(|t| *t as i32).collect::<Vec<_>>());
        session.run_step().unwrap();
        session.output("logits").unwrap()
    }

    fn pool(self) -> Pool {
        let mut pool = Pool::new(self.setup).unwrap_or_else(|e| panic!("{e}"));
        pool.parameters().initialize(7).unwrap();
        pool
    }
}

fn tokens(count: usize) -> Vec<u32> {
    (0..count).map(|i| ((i * i * 7 + 3 * i + i / 5) % VOCAB) as u32).collect()
}

/// The largest difference over the largest magnitude.
fn error(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    let largest = b.iter().fold(0.0f32, |m, x| m.max(x.abs()));
    a.iter().zip(b).fold(0.0f32, |m, (a, b)| m.max((a - b).abs())) / largest
}

#[test]
fn prefill_and_steps_equal_the_parallel_form_for_any_split() {
    for name in MODELS {
        for count in [48, 200] {
            let model = Model::new(&format!("models/{name}.ron"), count, DType::F32, &[]);
            let tokens = tokens(count);
            let want = model.parallel(&tokens);
            let mut pool = model.pool();
            let classes = pool.classes();
            // RetNet's state has no row normaliser, which its training form has
            let tolerance = if name == "retnet" { 1e-3 } else { 1e-4 };
            let mut worst = 0.0f32;
            for split in [0, 1, 2, 15, 16, 17, 31, 47, 63, 64, 65, 100, 127, 129, 199] {
                if split >= count {
                    continue;
                }
                // other sequences leave their states in this slot
                pool.prefill(3, 0, &tokens[..split]).unwrap();
                let mut made = Vec::new();
                for (t, token) in tokens.iter().enumerate().skip(split) {
                    made.extend_from_slice(pool.step(&[Next { slot: 3, position: t, token: *token }]).unwrap());
                }
                let error = error(&made, &want[split * classes..]);
                assert!(error <= tolerance, "{name}, {count} tokens, split at {split}: {error:e}");
                worst = worst.max(error);
            }
            for piece in [1, 7, 64, 200] {
                let mut made = Vec::new();
                for part in tokens.chunks(piece) {
                    let at = made.len() / classes;
                    pool.score(1, at, part, |logits| made.extend_from_slice(logits)).unwrap();
                }
                let error = error(&made, &want);
                assert!(error <= tolerance, "{name}, {count} tokens in pieces of {piece}: {error:e}");
                worst = worst.max(error);
            }
            println!("{name:9} T = {count}: {worst:.1e}");
        }
    }
}

/// Sequences of different lengths come and go, and none of them notices the others.
#[test]
fn sequences_in_company_get_the_same_bits() {
    for name in MODELS {
        let mut pool = Model::new(&format!("models/{name}.ron"), 64, DType::F32, &[]).pool();
        let texts: Vec<Vec<u32>> = (0..5).map(|i| tokens(60 + i)[i * 5..].to_vec()).collect();
        let starts = [0, 17, 3, 20, 9];
        let mut alone = Vec::new();
        for (text, start) in texts.iter().zip(starts) {
            pool.prefill(4, 0, &text[..start]).unwrap();
            let mut logits = Vec::new();
            for (position, token) in text.iter().enumerate().skip(start).take(12) {
                logits.push(pool.step(&[Next { slot: 4, position, token: *token }]).unwrap().to_vec());
            }
            alone.push(logits);
        }
        for (slot, (text, start)) in texts.iter().zip(starts).enumerate() {
            pool.prefill(slot, 0, &text[..start]).unwrap();
        }
        let classes = pool.classes();
        let mut done = [0; 5];
        for round in 0.. {
            // some rest in every round
            let active: Vec<usize> = (0..5).filter(|i| done[*i] < 12 && (round + i) % 3 != 0).collect();
            if done.iter().all(|n| *n == 12) {
                break;
            }
            if active.is_empty() {
                continue;
            }
            let next: Vec<Next> = active
                .iter()
                .map(|&slot| {
                    let position = starts[slot] + done[slot];
                    Next { slot, position, token: texts[slot][position] }
                })
                .collect();
            let logits = pool.step(&next).unwrap().to_vec();
            for (slot, logits) in active.into_iter().zip(logits.chunks_exact(classes)) {
                assert!(alone[slot][done[slot]] == logits, "{name}, sequence {slot}, token {}", done[slot]);
                done[slot] += 1;
            }
        }
    }
}

#[test]
fn more_tokens_than_there_is_room_for_are_refused() {
    let mut pool = Model::new("models/llama.ron", 20, DType::F32, &[]).pool();
    assert_eq!(pool.limit(), Some(20));
    pool.prefill(0, 0, &tokens(20)).unwrap();
    let message = pool.step(&[Next { slot: 0, position: 20, token: 1 }]).unwrap_err().to_string();
    assert!(message.contains("20 tokens at most, not 21"), "{message}");
    assert!(pool.prefill(1, 0, &tokens(21)).is_err());
    assert!(pool.prefill(1, 0, &[VOCAB as u32]).is_err(), "a token that there is not");
    assert!(pool.step(&[Next { slot: 2, position: 0, token: 1 }, Next { slot: 2, position: 5, token: 1 }]).is_err());
    // learned positions end where their table does
    let pool = Model::new("models/rwkv.ron", 1000, DType::F32, &[]).pool();
    assert_eq!(pool.limit(), Some(200));
    for name in ["retnet", "gla", "mamba", "longhorn"] {
        assert_eq!(Model::new(&format!("models/{name}.ron"), 20, DType::F32, &[]).pool().limit(), None);
    }
}

#[test]
fn half_of_the_bytes_give_nearly_the_same() {
    for name in MODELS {
        let model = Model::new(&format!("models/{name}.ron"), 48, DType::Bf16, &[]);
        let tokens = tokens(48);
        let want = model.parallel(&tokens);
        let mut pool = model.pool();
        let (_, narrow) = pool.bytes();
        let (_, wide) = Model::new(&format!("models/{name}.ron"), 48, DType::F32, &[]).pool().bytes();
        assert!(narrow * 100 < wide * 62, "{name}: {narrow} of {wide} bytes");
        let (mut made, classes) = (Vec::new(), pool.classes());
        pool.score(0, 0, &tokens[..32], |logits| made.extend_from_slice(logits)).unwrap();
        for (t, token) in tokens.iter().enumerate().skip(32) {
            made.extend_from_slice(pool.step(&[Next { slot: 0, position: t, token: *token }]).unwrap());
        }
        assert_eq!(made.len(), 48 * classes);
        let error = error(&made, &want);
        assert!(error < 0.05 && error > 0.0, "{name}: {error:e}");
    }
}
