//! The compiler's main test: a plan with every optional system on gives the numbers of one with all of them off.

mod common;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use common::compare::{BATCH, BLOCK, close, compiled, optional, request, train, without};
use common::{MODELS, SHAKESPEARE, model};
use dataflow_graph::compile::{Request, compile};
use dataflow_graph::diagnostic::Source;
use dataflow_graph::format::formula::Number;
use dataflow_graph::format::model::ModelFile;
use dataflow_graph::session::Session;
use dataflow_kernels::device::CpuDevice;

fn models() -> Vec<PathBuf> {
    MODELS.iter().map(|name| model(name)).collect()
}

fn read(file: &Path) -> ModelFile {
    ModelFile::read(file).unwrap_or_else(|e| panic!("{e}"))
}

fn small(file: &Path, training: bool) -> Request {
    request(read(file), &[("vocab", 65), ("d_model", 32), ("n_layer", 2), ("n_head", 2)], (BATCH, BLOCK), training)
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
        // whole ops and `merge` add gradients inside of products, in another order
        let base = train(&without(request.clone(), &["compound", "merge", "merge_gradients"]));
        let plain = train(&without(request, &optional()));
        assert_eq!(plain.0, base.0, "{file:?}: losses");
        for (name, value) in &plain.1 {
            assert!(value == &base.1[name], "{file:?}: {name}");
        }
    }
}

/// Products take elementwise readers along, forward and backward, and sums over micro-batches.
#[test]
fn epilogues_change_no_bit() {
    for file in models() {
        let mut request = small(&file, true);
        request.options.micro_batches = 2;
        let plain = without(request.clone(), &["epilogue"]);
        let (with, before) = (train(&request), train(&plain));
        assert_eq!(with.0, before.0, "{file:?}: losses");
        for (name, value) in &before.1 {
            assert!(value == &with.1[name], "{file:?}: {name}");
        }
        let launches = |request: &Request| compiled(request).plan.launches;
        let (with, before) = (launches(&request), launches(&plain));
        let count = |op: &str| with.iter().filter(|l| l.op.starts_with(op)).count();
        assert_eq!(
            count("Accumulate"),
            before.iter().filter(|l| l.op.starts_with("Accumulate")).count() - count("LinearWeightElementwise")
        );
        assert!(count("LinearWeightElementwise") > 4, "{file:?}");
        let saved = ["LinearElementwise", "LinearInputElementwise", "LinearWeightElementwise"].map(count);
        println!("{}: {saved:?} of {} launches", file.display(), before.len());
        assert_eq!(before.len() - with.len(), saved.iter().sum::<usize>(), "{file:?}");
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
        let request = request(read(&file), SHAKESPEARE, (8, 256), true);
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
        let (launches, unfused) = (full.plan.launches.len(), plain.plan.launches.len());
        assert!(3 * launches <= unfused, "{file:?}: {launches} of {unfused}");
        assert!(layout.bytes[0] < before.bytes[0], "{file:?}");
    }
}

/// Seconds that this thread has run, however busy the machine is; seconds of the clock where that is not known.
fn processor_time(start: Instant) -> f64 {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap_or_default();
    let nanoseconds = text.split(' ').next().and_then(|n| n.parse::<f64>().ok());
    nanoseconds.map_or_else(|| start.elapsed().as_secs_f64(), |n| n / 1e9)
}

/// Models of 120 million parameters: from the file to a checked plan.
#[test]
fn large_models_compile_in_half_a_second() {
    let start = Instant::now();
    for file in models() {
        let before = processor_time(start);
        let request = request(read(&file), &[], (4, 1024), true);
        let plan = compile(&request).unwrap_or_else(|e| panic!("{e}")).plan;
        let seconds = processor_time(start) - before;
        let unfused = compile(&without(request, &optional())).unwrap_or_else(|e| panic!("{e}")).plan.launches.len();
        let (arena, peak, launches) = (plan.layout.bytes[0], plan.layout.live_peak_bytes, plan.launches.len());
        println!("{file:?}: {seconds:.3} s, {launches} launches of {unfused}, arena {arena}, live peak {peak}");
        assert!(seconds < 0.5, "{file:?}: {seconds}");
        assert!(arena as f64 <= 1.05 * peak as f64, "{file:?}");
        assert!(3 * launches <= unfused, "{file:?}: {launches} of {unfused}");
    }
}

/// Dropout masks depend on an element's place and on the node, so fusing may not change them.
#[test]
fn dropout_draws_the_same_masks() {
    for name in ["llama", "rwkv"] {
        let model = read(&model(name));
        let mut request = small(&common::model(name), true);
        let set = [("vocab", 65), ("d_model", 32), ("n_layer", 2), ("n_head", 2)];
        let mut set: std::collections::BTreeMap<_, _> =
            set.into_iter().map(|(k, v)| (k.to_string(), Number::Int(v))).collect();
        set.insert("dropout".into(), Number::Real(0.25));
        request.scope = model.config(&set).unwrap_or_else(|e| panic!("{e}"));
        request.options.micro_batches = 2;
        let plain = train(&without(request.clone(), &optional()));
        let exact = train(&without(request.clone(), &["compound", "merge", "merge_gradients"]));
        let full = train(&request);
        assert!(plain == exact, "{name}");
        close(name, &plain.0, &full.0, 1e-5);
        let without_dropout = train(&small(&common::model(name), true));
        assert!(without_dropout.0[0] != full.0[0], "{name}: dropout does something");
    }
}

/// More rows than a block of the head has; the last block is smaller.
#[test]
fn the_head_sums_over_blocks_of_rows() {
    let text = r#"Model(
        about: "bigram",
        config: {},
        nodes: [
            ("table",  Embedding(rows: 65, dim: 8, init: Normal(std: 1.0)), ["tokens"]),
            ("normed", RmsNorm,                                             ["table"]),
            ("logits", Linear(out: 65, tie: "table.weight"),                ["normed"]),
        ],
    )"#;
    let model = || {
        let source = Source { name: "bigram.ron".into(), text: text.into() };
        ModelFile::parse(Arc::new(source)).unwrap_or_else(|e| panic!("{e}"))
    };
    let mut request = request(model(), &[], (5, 1000), true);
    request.options.micro_batches = 2;
    let (plain, full) = (train(&without(request.clone(), &optional())), train(&request));
    close("losses", &plain.0, &full.0, 1e-5);
    for (name, value) in &plain.1 {
        close(name, value, &full.1[name], 1e-5);
    }
    let evaluation = common::compare::request(model(), &[], (5, 1000), false);
    let launches = compiled(&evaluation).plan.launches;
    let head = launches.iter().find(|l| l.op.starts_with("LinearCrossEntropy")).expect("the head is merged");
    assert!(head.outputs.iter().all(|o| o.rows <= 2048), "{head:?}");
}
