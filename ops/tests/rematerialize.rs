//! Recomputation meets a memory budget, changes no number, and says what cannot be met.

mod common;

use common::compare::{budget, compiled, request, smallest_budget, train};
use common::{MODELS, model};
use dataflow_graph::compile::{Request, compile};
use dataflow_graph::format::model::ModelFile;
use dataflow_kernels::device::Region;

fn training(name: &str, set: &[(&str, i64)], sizes: (usize, usize)) -> Request {
    let file = ModelFile::read(&model(name)).unwrap_or_else(|e| panic!("{e}"));
    request(file, set, sizes, true)
}

fn small(name: &str) -> Request {
    training(name, &[("vocab", 65), ("d_model", 32), ("n_layer", 3), ("n_head", 2)], (2, 67))
}

#[test]
fn every_model_trains_alike_in_the_smallest_memory() {
    for name in MODELS {
        let mut request = small(name);
        request.options.micro_batches = 2;
        let smallest = smallest_budget(&request);
        let arena = compiled(&request).plan.bytes(Region::Arena);
        let tight = budget(&request, smallest);
        let plan = compiled(&tight).plan;
        let bought = plan.rematerialized.expect("there was a budget");
        println!("{name:9} {arena} to {smallest} bytes, {} launches, {:.0} FLOPs", bought.launches, bought.flops);
        assert!(plan.bytes(Region::Arena) <= smallest && smallest < arena * 3 / 4, "{name}: {smallest} of {arena}");
        assert_eq!(bought.arena_before, arena);
        assert!(train(&request) == train(&tight), "{name}");
        assert!(compile(&budget(&request, smallest - 1)).is_err(), "{name}");
    }
}

/// Budgets between the smallest and all of it are met; those that ask for nothing change nothing.
#[test]
fn a_smaller_budget_costs_more() {
    let request = small("longhorn");
    let full = compiled(&request).plan;
    let arena = full.bytes(Region::Arena);
    let smallest = smallest_budget(&request);
    let mut flops = full.cost().flops;
    for part in [0, 1, 2, 4, 7, 8] {
        let bytes = arena - (arena - smallest) * part / 8;
        let plan = compiled(&budget(&request, bytes)).plan;
        assert!(plan.bytes(Region::Arena) <= bytes);
        assert!(plan.cost().flops >= flops, "{part}");
        flops = plan.cost().flops;
        if part == 0 {
            assert_eq!((plan.launches.len(), flops), (full.launches.len(), full.cost().flops));
        }
    }
}

/// 60 % of the memory of a step that is mostly activations costs a third more FLOPs at most.
#[test]
fn three_fifths_of_the_memory_are_enough() {
    for name in MODELS {
        let request = training(name, &[("vocab", 65), ("d_model", 64), ("n_layer", 6), ("n_head", 4)], (4, 128));
        let full = compiled(&request).plan;
        let bytes = full.bytes(Region::Arena) * 6 / 10;
        let tight = compile(&budget(&request, bytes)).unwrap_or_else(|e| panic!("{name}: {e}")).plan;
        let ratio = tight.cost().flops / full.cost().flops;
        println!(
            "{name:9} {} of {} bytes, {ratio:.3} times the FLOPs",
            tight.bytes(Region::Arena),
            full.bytes(Region::Arena)
        );
        assert!(tight.bytes(Region::Arena) <= bytes && ratio <= 1.35, "{name}: {ratio}");
    }
}

#[test]
fn a_budget_that_cannot_be_met_names_the_smallest() {
    let error = compile(&budget(&small("llama"), 1000)).err().expect("an error").to_string();
    for part in ["a memory budget of 1000 bytes cannot be met", "the smallest that can is", "a smaller batch"] {
        assert!(error.contains(part), "{part} is not in: {error}");
    }
}

/// A budget is never passed over in silence.
#[test]
fn a_budget_without_recomputation_is_an_error() {
    let request = small("mamba");
    let arena = compiled(&request).plan.bytes(Region::Arena);
    let without = |bytes| compile(&common::compare::without(budget(&request, bytes), &["rematerialize"]));
    assert!(without(arena).is_ok());
    let error = without(arena - 1).err().expect("an error").to_string();
    assert!(error.contains(&format!("the plan takes {arena} bytes, more than the memory budget")), "{error}");
}
