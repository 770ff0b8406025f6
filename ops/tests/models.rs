//! Training of the model files in small.

use std::path::Path;
use std::sync::Arc;

use dataflow_graph::compile::{Request, compile};
use dataflow_graph::components::Options;
use dataflow_graph::format::model::ModelFile;
use dataflow_graph::op::Op;
use dataflow_graph::registry::Registry;
use dataflow_graph::session::Session;
use dataflow_kernels::device::CpuDevice;
use dataflow_ops::BuiltinOps;
use dataflow_ops::optimizer::{AdamW, Schedule};

#[test]
fn longhorn_learns_a_batch_by_heart() {
    for model in ["llama", "longhorn"] {
        let mut registry = Registry::new();
        registry.add_plugin(&BuiltinOps);
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("../models/{model}.ron"));
        let model = Arc::new(ModelFile::read(&path).unwrap());
        let set = [("vocab", 65), ("d_model", 32), ("n_layer", 2), ("n_head", 2)]
            .map(|(k, v)| (k.to_string(), dataflow_graph::format::formula::Number::Int(v)));
        let scope = model.config(&set.into()).unwrap();
        let loss: Arc<dyn Op> = registry.ops().unwrap().get("CrossEntropy").unwrap().parse("()").unwrap();
        let request = Request {
            registry: Arc::new(registry),
            model,
            scope,
            options: Options { batch: 2, block: 19, micro_batches: 1, seed: 1, training: true },
            objectives: vec![("loss".into(), loss)],
            optimizer: Some(Arc::new(AdamW {
                schedule: Schedule::Constant(1e-2),
                betas: (0.9, 0.99),
                eps: 1e-8,
                decay: 0.1,
                clip: Some(1.0),
            })),
            without: vec![],
        };
        let compiled = compile(&request).unwrap_or_else(|e| panic!("{e}"));
        dataflow_graph::check::check(&compiled.plan).unwrap_or_else(|e| panic!("{e}"));
        println!("{} launches, {:?}", compiled.plan.launches.len(), compiled.plan.layout.bytes);
        let device = Arc::new(CpuDevice::new(Some(2)).unwrap());
        let mut session = Session::new(device, &compiled, None).unwrap_or_else(|e| panic!("{e}"));
        session.initialize(1).unwrap();
        let tokens: Vec<i32> = (0..38).map(|i| (i * 7) % 65).collect();
        let targets: Vec<i32> = (0..38).map(|i| (i * 7 + 7) % 65).collect();
        session.write_input("tokens", &tokens);
        session.write_input("targets", &targets);
        let mut losses = vec![];
        for _ in 0..60 {
            session.run_step().unwrap();
            session.run_update().unwrap();
            losses.push(session.scalar("loss").unwrap());
        }
        println!("{losses:?}");
        assert!((losses[0] - 65f32.ln()).abs() < 0.3 && losses[59] < 0.2, "{losses:?}");
    }
}
