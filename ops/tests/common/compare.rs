//! One training program against another: what the tests of the compiler's systems share.

use std::collections::BTreeMap;
use std::sync::Arc;

use dataflow_graph::check::check;
use dataflow_graph::compile::{Compiled, Request, compile};
use dataflow_graph::components::Options;
use dataflow_graph::format::formula::Number;
use dataflow_graph::format::model::ModelFile;
use dataflow_graph::op::Op;
use dataflow_graph::registry::Registry;
use dataflow_graph::session::Session;
use dataflow_kernels::device::CpuDevice;
use dataflow_ops::BuiltinOps;
use dataflow_ops::optimizer::{AdamW, Schedule};

/// Sequences.
pub const BATCH: usize = 2;
/// Tokens of a sequence.
pub const BLOCK: usize = 19;

fn registry() -> Arc<Registry> {
    let mut registry = Registry::new();
    registry.add_plugin(&BuiltinOps);
    Arc::new(registry)
}

/// A training or evaluation program of a model.
pub fn request(model: ModelFile, set: &[(&str, i64)], sizes: (usize, usize), training: bool) -> Request {
    let registry = registry();
    let model = Arc::new(model);
    let set = set.iter().map(|(k, v)| (k.to_string(), Number::Int(*v))).collect();
    let scope = model.config(&set).unwrap_or_else(|e| panic!("{e}"));
    let loss: Arc<dyn Op> = registry.ops().unwrap().get("CrossEntropy").unwrap().parse("()").unwrap();
    // with a small epsilon, AdamW moves a weight whose gradient is nearly 0 by the sign of a rounding error
    let optimizer =
        AdamW { schedule: Schedule::Constant(1e-3), betas: (0.9, 0.99), eps: 1e-2, decay: 0.1, clip: Some(1.0) };
    Request {
        registry,
        model,
        scope,
        options: Options { seed: 1, training, ..Options::new(sizes.0, sizes.1) },
        objectives: vec![("loss".into(), loss)],
        optimizer: training.then(|| Arc::new(optimizer) as _),
        memory_budget: None,
        without: vec![],
    }
}

/// Compiles and checks.
pub fn compiled(request: &Request) -> Compiled {
    let compiled = compile(request).unwrap_or_else(|e| panic!("{e}"));
    check(&compiled.plan).unwrap_or_else(|e| panic!("{e}"));
    compiled
}

/// Losses of three updates of `micro_batches`, the gradients before the first one, and the parameters at last.
pub fn train(request: &Request) -> (Vec<f32>, BTreeMap<String, Vec<f32>>) {
    let compiled = compiled(request);
    let device = Arc::new(CpuDevice::new(Some(2)).unwrap());
    let mut session = Session::new(device, &compiled, None).unwrap_or_else(|e| panic!("{e}"));
    session.initialize(1).unwrap();
    let tokens = request.options.batch * request.options.block;
    let (mut losses, mut tensors) = (vec![], BTreeMap::new());
    for update in 0..3 {
        for part in 0..request.options.micro_batches {
            let at = |i: usize| ((i * i + 7 * i + 5 * (update + 3 * part)) % 65) as i32;
            session.write_input("tokens", &(0..tokens).map(at).collect::<Vec<_>>());
            // a target of -1 does not count
            let target = |i: usize| if i % 11 == 4 { -1 } else { at(i + 1) };
            session.write_input("targets", &(0..tokens).map(target).collect::<Vec<_>>());
            session.run_step().unwrap();
            losses.push(session.scalar("loss").unwrap());
        }
        if update == 0 {
            for (name, port) in session.plan().states.iter().filter(|s| s.0.ends_with(".gradient")) {
                tensors.insert(name.clone(), session.read::<f32>(port));
            }
        }
        session.run_update().unwrap();
    }
    for planned in &session.plan().parameters {
        tensors.insert(planned.parameter.name.clone(), session.read::<f32>(&planned.port));
    }
    (losses, tensors)
}

/// Fails where two tensors differ by more than `tolerance` of the largest element.
#[track_caller]
pub fn close(what: &str, a: &[f32], b: &[f32], tolerance: f32) {
    assert_eq!(a.len(), b.len());
    let largest = a.iter().fold(1e-30f32, |m, x| m.max(x.abs()));
    let error = a.iter().zip(b).fold(0.0f32, |m, (x, y)| m.max((x - y).abs())) / largest;
    assert!(error <= tolerance, "{what}: {error:e}");
}

/// The same without some systems.
pub fn without(mut request: Request, systems: &[&str]) -> Request {
    request.without = systems.iter().map(|s| s.to_string()).collect();
    request
}

/// Every system that can be switched off.
pub fn optional() -> Vec<&'static str> {
    registry().systems.optional().collect()
}

/// The smallest memory budget that can be met, which the error for one of 0 names.
pub fn smallest_budget(request: &Request) -> usize {
    let error = compile(&budget(request, 0)).err().expect("nothing fits into 0 bytes").to_string();
    let number = error.split("the smallest that can is ").nth(1).unwrap_or_else(|| panic!("{error}"));
    number.chars().take_while(char::is_ascii_digit).collect::<String>().parse().unwrap()
}

/// The same with a memory budget.
pub fn budget(request: &Request, bytes: usize) -> Request {
    Request { memory_budget: Some(bytes), ..request.clone() }
}
