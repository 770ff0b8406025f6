//! The update of all parameters: one launch, or a launch for each line of its formula.

mod common;

use std::sync::Arc;

use common::compare::{BATCH, BLOCK, compiled, optional, request, without};
use common::model;
use dataflow_graph::format::model::ModelFile;
use dataflow_graph::session::Session;
use dataflow_kernels::device::CpuDevice;

/// Every parameter and state but the counters.
fn contents(session: &Session) -> Vec<(String, Vec<f32>)> {
    let parameters = session.plan().parameters.iter().map(|p| (p.parameter.name.clone(), &p.port));
    let moments = session.plan().states.iter().filter(|s| s.0.ends_with(".m") || s.0.ends_with(".v"));
    let all = parameters.chain(moments.map(|(name, port)| (name.clone(), port)));
    all.map(|(name, port)| (name, session.read::<f32>(port))).collect()
}

fn run(session: &mut Session) -> f32 {
    session.write_input("tokens", &[3i32; BATCH * BLOCK]);
    session.write_input("targets", &[5i32; BATCH * BLOCK]);
    session.run_step().unwrap();
    session.run_update().unwrap();
    session.scalar("grad_norm").unwrap()
}

#[test]
fn gradients_that_are_not_finite_change_nothing() {
    let file = ModelFile::read(&model("llama")).unwrap_or_else(|e| panic!("{e}"));
    let set = [("vocab", 65), ("d_model", 16), ("n_layer", 1), ("n_head", 2)];
    let request = request(file, &set, (BATCH, BLOCK), true);
    for request in [without(request.clone(), &optional()), without(request.clone(), &["compound"]), request] {
        for bad in [f32::NAN, f32::INFINITY] {
            let device = Arc::new(CpuDevice::new(Some(2)).unwrap());
            let mut session = Session::new(device, &compiled(&request), None).unwrap_or_else(|e| panic!("{e}"));
            session.initialize(1).unwrap();
            let fresh = contents(&session);
            assert!(run(&mut session).is_finite());
            let before = contents(&session);
            assert!(before != fresh, "a finite gradient changes parameters and moments");
            // of the head, so that the loss and all gradients follow
            let port = session.plan().parameters[0].port.clone();
            let mut values = session.read::<f32>(&port);
            values.iter_mut().step_by(3).for_each(|x| *x *= bad);
            session.write(&port, &values);
            let before: Vec<_> = contents(&session);
            assert!(!run(&mut session).is_finite(), "{bad}");
            let bits = |all: &[(String, Vec<f32>)]| -> Vec<Vec<u32>> {
                all.iter().map(|t| t.1.iter().map(|x| x.to_bits()).collect()).collect()
            };
            assert!(bits(&before) == bits(&contents(&session)), "{bad}: {:?}", request.without);
        }
    }
}
