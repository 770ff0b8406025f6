//! Every model file trains.

mod common;

use common::{MODELS, learn, model, path, training};

/// Unrelated random targets can only be learnt by heart: the loss falls from ln 65 = 4.17 towards 0.
#[test]
fn each_model_learns_a_batch_by_heart() {
    // neither length is a multiple of a chunk, the second one spans several
    for (batch, block, updates) in [(2, 19, 60), (1, 67, 80)] {
        for name in MODELS {
            let set = [("vocab", 65), ("d_model", 32), ("n_layer", 2), ("n_head", 2), ("block", block)];
            let compiled = training(&model(name), &set, batch, block as usize).unwrap_or_else(|e| panic!("{e}"));
            let losses = learn(&compiled, 65, updates);
            let last = losses[updates - 1];
            println!("{name:9} T = {block}: {:.3} to {last:.4}", losses[0]);
            assert!((losses[0] - 65f32.ln()).abs() < 0.3 && last < 0.2, "{name}, T = {block}: {losses:?}");
        }
    }
}

/// RetNet's linear-time form is a config name away, and starts from the same loss.
#[test]
fn retnet_trains_in_its_linear_form() {
    let [exact, chunk] = [1, 0].map(|exact| {
        let set = [("vocab", 65), ("d_model", 32), ("n_layer", 2), ("n_head", 2), ("exact", exact)];
        let compiled = training(&model("retnet"), &set, 1, 67).unwrap_or_else(|e| panic!("{e}"));
        let form = if exact == 1 { "form: Exact" } else { "form: Chunk" };
        assert!(compiled.plan.launches.iter().any(|l| l.op.contains(form)));
        learn(&compiled, 65, 80)
    });
    assert!((exact[0] - chunk[0]).abs() < 1e-3, "{} {}", exact[0], chunk[0]);
    assert!(chunk[79] < 0.2, "{chunk:?}");
}

/// A seventh architecture needs a file and nothing else.
#[test]
fn a_hybrid_of_longhorn_and_attention_trains() {
    let set = [("vocab", 65), ("d_model", 32), ("n_layer", 4), ("n_head", 2)];
    let compiled = training(&path("tests/models/hybrid.ron"), &set, 2, 19).unwrap_or_else(|e| panic!("{e}"));
    let count = |op: &str| compiled.plan.launches.iter().filter(|l| l.op.starts_with(op)).count();
    assert_eq!((count("Longhorn"), count("CausalAttention {")), (12, 2));
    let losses = learn(&compiled, 65, 60);
    assert!(losses[0] - losses[59] > 3.5, "{losses:?}");
}

/// Where upstream divides by zero, for a single layer or head, the initial decays stand at their start.
#[test]
fn rwkv_trains_with_one_layer_or_one_head() {
    for (layers, heads) in [(1, 2), (2, 1)] {
        let set = [("vocab", 65), ("d_model", 32), ("n_layer", layers), ("n_head", heads)];
        let compiled = training(&model("rwkv"), &set, 2, 19).unwrap_or_else(|e| panic!("{e}"));
        let losses = learn(&compiled, 65, 60);
        assert!(losses[0] - losses[59] > 3.0, "{losses:?}");
    }
}

/// An initial value that divides by zero names the row and the numbers.
#[test]
fn a_formula_without_a_value_says_why() {
    let set = [("vocab", 65), ("d_model", 32), ("n_layer", 2), ("n_head", 2)];
    let text = std::fs::read_to_string(model("rwkv")).unwrap().replace("max(n_head - 1, 1)", "(n_head - 2)");
    let file = std::env::temp_dir().join(format!("rwkv-{}.ron", std::process::id()));
    std::fs::write(&file, text).unwrap();
    let message = training(&file, &set, 1, 16).err().expect("an error").to_string();
    std::fs::remove_file(&file).unwrap();
    for part in ["division by zero", "n_head = 2", "tmix.time_decay", "rwkv-"] {
        assert!(message.contains(part), "{part} is not in: {message}");
    }
}
