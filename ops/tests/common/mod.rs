//! What the tests of model files share.
#![allow(dead_code)]

pub mod compare;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use dataflow_graph::compile::{Compiled, Request, compile_in};
use dataflow_graph::components::{Options, Precision, Target};
use dataflow_graph::diagnostic::Errors;
use dataflow_graph::format::formula::Number;
use dataflow_graph::format::model::ModelFile;
use dataflow_graph::op::Op;
use dataflow_graph::registry::Registry;
use dataflow_graph::session::Session;
use dataflow_kernels::device::CpuDevice;
use dataflow_ops::BuiltinOps;
use dataflow_ops::optimizer::{AdamW, Schedule};

/// The six architectures.
pub const MODELS: [&str; 6] = ["llama", "rwkv", "retnet", "gla", "mamba", "longhorn"];

/// Character-level Shakespeare.
pub const SHAKESPEARE: &[(&str, i64)] =
    &[("vocab", 65), ("d_model", 384), ("n_layer", 6), ("n_head", 6), ("block", 256)];

/// A file of the repository.
pub fn path(relative: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(relative)
}

/// `models/<name>.ron`.
pub fn model(name: &str) -> PathBuf {
    path(&format!("models/{name}.ron"))
}

/// Compiles one step of training: forward, backward, clipping, AdamW.
pub fn training(file: &Path, set: &[(&str, i64)], batch: usize, block: usize) -> Result<Compiled, Errors> {
    training_in(Precision::F32, file, set, batch, block, vec![])
}

/// As [`training`], in any precision and without some systems.
pub fn training_in(
    precision: Precision,
    file: &Path,
    set: &[(&str, i64)],
    batch: usize,
    block: usize,
    without: Vec<String>,
) -> Result<Compiled, Errors> {
    training_for((Target::Cpu, precision), file, set, batch, block, without)
}

/// As [`training_in`], for any device.
pub fn training_for(
    (target, precision): (Target, Precision),
    file: &Path,
    set: &[(&str, i64)],
    batch: usize,
    block: usize,
    without: Vec<String>,
) -> Result<Compiled, Errors> {
    let mut registry = Registry::new();
    registry.add_plugin(&BuiltinOps);
    let model = Arc::new(ModelFile::read(file)?);
    let set = set.iter().map(|&(name, value)| (name.to_string(), Number::Int(value))).collect();
    let scope = model.config(&set)?;
    let loss: Arc<dyn Op> = registry.ops().unwrap().get("CrossEntropy").unwrap().parse("()").unwrap();
    let request = Request {
        registry: Arc::new(registry),
        model,
        scope,
        options: Options { seed: 1, training: true, target, ..Options::new(batch, block) },
        objectives: vec![("loss".into(), loss)],
        optimizer: Some(Arc::new(AdamW {
            schedule: Schedule::Constant(1e-2),
            betas: (0.9, 0.99),
            eps: 1e-8,
            decay: 0.1,
            clip: Some(1.0),
        })),
        memory_budget: None,
        without,
    };
    compile_in(&request, precision)
}

/// Trains on one batch of random tokens that has no structure, and returns the loss before each update.
pub fn learn(compiled: &Compiled, vocab: u64, updates: usize) -> Vec<f32> {
    learn_on(2, compiled, vocab, updates)
}

/// As [`learn`], on a number of threads.
pub fn learn_on(threads: usize, compiled: &Compiled, vocab: u64, updates: usize) -> Vec<f32> {
    let device = Arc::new(CpuDevice::new(Some(threads)).unwrap());
    let mut session = Session::new(device, compiled, None).unwrap_or_else(|e| panic!("{e}"));
    session.initialize(1).unwrap();
    let count = compiled.plan.inputs["tokens"].tensor.elements();
    // a linear congruential generator, of which the high bits are good enough
    let mut state = 1u64;
    let mut draw = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((state >> 33) % vocab) as i32
    };
    let tokens: Vec<i32> = (0..count).map(|_| draw()).collect();
    let targets: Vec<i32> = (0..count).map(|_| draw()).collect();
    session.write_input("tokens", &tokens);
    session.write_input("targets", &targets);
    let step = |_| {
        session.run_step().unwrap();
        session.run_update().unwrap();
        session.scalar("loss").unwrap()
    };
    (0..updates).map(step).collect()
}
