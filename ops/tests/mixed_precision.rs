//! Training with factors of matrix products in `bf16`.

mod common;

use common::{MODELS, learn, learn_on, model, training, training_in};
use dataflow_graph::components::Precision;
use dataflow_kernels::device::DType;

const SIZE: &[(&str, i64)] = &[("vocab", 40), ("d_model", 64), ("n_layer", 1), ("n_head", 2), ("block", 32)];
const UPDATES: usize = 6;

#[test]
fn every_model_learns_as_in_single_precision() {
    for name in MODELS {
        let bf16 = training_in(Precision::Bf16, &model(name), SIZE, 4, 32, vec![]).unwrap();
        let (single, mixed) =
            (learn(&training(&model(name), SIZE, 4, 32).unwrap(), 40, UPDATES), learn(&bf16, 40, UPDATES));
        assert!(mixed.last() < mixed.first(), "{name}: {mixed:?}");
        for (a, b) in single.iter().zip(&mixed) {
            // at this learning rate (1e-2) any difference grows
            assert!((a - b).abs() < 0.1, "{name}: {single:?} in f32, {mixed:?} in bf16");
        }
        assert!(single != mixed, "{name}: nothing was rounded");
        // what only products read is stored as they take it
        let narrow = bf16.plan.launches.iter().flat_map(|l| &l.outputs).filter(|o| o.dtype == DType::Bf16).count();
        assert!(narrow >= 2, "{name}: {narrow} results in bf16");
        assert!(mixed == learn_on(1, &bf16, 40, UPDATES), "{name}: 1 and 2 threads differ");
    }
}

#[test]
fn without_the_system_nothing_is_rounded() {
    let file = model("llama");
    let off = training_in(Precision::Bf16, &file, SIZE, 4, 32, vec!["mixed_precision".into()]).unwrap();
    assert_eq!(learn(&off, 40, UPDATES), learn(&training(&file, SIZE, 4, 32).unwrap(), 40, UPDATES));
}
