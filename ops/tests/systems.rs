//! The compiler's main test: a plan with every optional system on gives the numbers of one with all of them off.

mod common;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use common::{MODELS, SHAKESPEARE, model};
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

const BATCH: usize = 2;
const BLOCK: usize = 19;

fn registry() -> Arc<Registry> {
    let mut registry = Registry::new();
    registry.add_plugin(&BuiltinOps);
    Arc::new(registry)
}

fn models() -> Vec<PathBuf> {
    MODELS.iter().map(|name| model(name)).collect()
}

fn request(file: &Path, set: &[(&str, i64)], sizes: (usize, usize), training: bool) -> Request {
    let registry = registry();
    let model = Arc::new(ModelFile::read(file).unwrap_or_else(|e| panic!("{e}")));
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
        options: Options { batch: sizes.0, block: sizes.1, micro_batches: 1, seed: 1, training, recurrent: None },
        objectives: vec![("loss".into(), loss)],
        optimizer: training.then(|| Arc::new(optimizer) as _),
        without: vec![],
    }
}

fn small(file: &Path, training: bool) -> Request {
    request(file, &[("vocab", 65), ("d_model", 32), ("n_layer", 2), ("n_head", 2)], (BATCH, BLOCK), training)
}

fn compiled(request: &Request) -> Compiled {
    let compiled = compile(request).unwrap_or_else(|e| panic!("{e}"));
    check(&compiled.plan).unwrap_or_else(|e| panic!("{e}"));
    compiled
}

/// Losses of three updates of `micro_batches`, the gradients before the first one, and the parameters at last.
fn train(request: &Request) -> (Vec<f32>, BTreeMap<String, Vec<f32>>) {
    let compiled = compiled(request);
    let device = Arc::new(CpuDevice::new(Some(2)).unwrap());
    let mut session = Session::new(device, &compiled, None).unwrap_or_else(|e| panic!("{e}"));
    session.initialize(1).unwrap();
    let (mut losses, mut tensors) = (vec![], BTreeMap::new());
    for update in 0..3 {
        for part in 0..request.options.micro_batches {
            let at = |i: usize| ((i * i + 7 * i + 5 * (update + 3 * part)) % 65) as i32;
            session.write_input("tokens", &(0..BATCH * BLOCK).map(at).collect::<Vec<_>>());
            // a target of -1 does not count
            let target = |i: usize| if i % 11 == 4 { -1 } else { at(i + 1) };
            session.write_input("targets", &(0..BATCH * BLOCK).map(target).collect::<Vec<_>>());
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

#[track_caller]
fn close(what: &str, a: &[f32], b: &[f32], tolerance: f32) {
    assert_eq!(a.len(), b.len());
    let largest = a.iter().fold(1e-30f32, |m, x| m.max(x.abs()));
    let error = a.iter().zip(b).fold(0.0f32, |m, (x, y)| m.max((x - y).abs())) / largest;
    assert!(error <= tolerance, "{what}: {error:e}");
}

fn without(mut request: Request, systems: &[&str]) -> Request {
    request.without = systems.iter().map(|s| s.to_string()).collect();
    request
}

fn optional() -> Vec<&'static str> {
    registry().systems.optional().collect()
}

#[test]
fn models_train_alike_with_and_without_the_systems() {
    for file in models() {
        for micro_batches in [1, 2] {
            let mut request = small(&file, true);
            request.options.micro_batches = micro_batches;
            let plain = train(&without(request.clone(), &optional()));
            let full = train(&request);
            let label = format!("{} x {micro_batches}", file.file_stem().unwrap().to_string_lossy());
            close(&format!("{label}: losses"), &plain.0, &full.0, 1e-5);
            assert_eq!(plain.1.len(), full.1.len());
            for (name, value) in &plain.1 {
                // an update divides a gradient by its size, and with it the rounding errors of small ones
                let tolerance = if name.ends_with(".gradient") { 1e-5 } else { 1e-4 };
                close(&format!("{label}: {name}"), value, &full.1[name], tolerance);
            }
        }
    }
}

#[test]
fn systems_that_reorder_no_sum_change_no_bit() {
    for file in models() {
        let request = small(&file, true);
        // `merge` adds gradients inside of products, in another order
        let base = train(&without(request.clone(), &["merge", "merge_gradients"]));
        let plain = train(&without(request, &optional()));
        assert_eq!(plain.0, base.0, "{file:?}: losses");
        for (name, value) in &plain.1 {
            assert!(value == &base.1[name], "{file:?}: {name}");
        }
    }
}

#[test]
fn evaluation_gives_the_loss_of_training() {
    for file in models() {
        let losses = [true, false].map(|training| {
            let compiled = compiled(&small(&file, training));
            let device = Arc::new(CpuDevice::new(Some(2)).unwrap());
            let mut session = Session::new(device, &compiled, None).unwrap_or_else(|e| panic!("{e}"));
            session.initialize(1).unwrap();
            session.write_input("tokens", &[3i32; BATCH * BLOCK]);
            session.write_input("targets", &[5i32; BATCH * BLOCK]);
            session.run_step().unwrap();
            session.scalar("loss").unwrap()
        });
        close(&format!("{file:?}"), &losses[..1], &losses[1..], 1e-5);
    }
}

#[test]
fn plans_are_small() {
    for file in models() {
        let request = request(&file, SHAKESPEARE, (8, 256), true);
        let (full, plain) = (compiled(&request), compiled(&without(request.clone(), &optional())));
        let (layout, before) = (&full.plan.layout, &plain.plan.layout);
        println!(
            "{}: {} launches of {}; arena {:.1} MB, live peak {:.1}, sum {:.1}; without systems {:.1}",
            file.file_stem().unwrap().to_string_lossy(),
            full.plan.launches.len(),
            plain.plan.launches.len(),
            layout.bytes[0] as f64 / 1e6,
            layout.live_peak_bytes as f64 / 1e6,
            layout.sum_bytes as f64 / 1e6,
            before.bytes[0] as f64 / 1e6,
        );
        assert!(layout.bytes[0] as f64 <= 1.05 * layout.live_peak_bytes as f64, "{file:?}: {layout:?}");
        assert!(full.plan.launches.len() < plain.plan.launches.len());
        assert!(layout.bytes[0] < before.bytes[0], "{file:?}");
    }
}

#[test]
#[ignore = "for people: the time to compile models of 120 million parameters"]
fn compile_time() {
    for file in models() {
        let request = request(&file, &[], (4, 1024), true);
        let start = std::time::Instant::now();
        let plan = compile(&request).unwrap_or_else(|e| panic!("{e}")).plan;
        let seconds = start.elapsed().as_secs_f64();
        let (arena, peak) = (plan.layout.bytes[0], plan.layout.live_peak_bytes);
        println!("{file:?}: {seconds:.3} s, arena {arena}, {} of the live peak", arena as f64 / peak as f64);
        assert!(seconds < 0.5, "{file:?}");
        assert!(arena as f64 <= 1.05 * peak as f64, "{file:?}");
    }
}
