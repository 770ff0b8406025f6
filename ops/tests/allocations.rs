//! A training step allocates nothing once it is warm.
//!
//! One test in a binary of its own: the count is of the whole process.

mod common;

use std::sync::Arc;

use common::{MODELS, model, training};
use dataflow_graph::session::Session;
use dataflow_kernels::allocation::CountingAllocator;
use dataflow_kernels::device::CpuDevice;

#[global_allocator]
static HEAP: CountingAllocator = CountingAllocator::new();

/// More than one block of a queue holds: what allocates now and then shows.
const STEPS: usize = 40;

#[test]
fn a_training_step_allocates_nothing_after_the_first() {
    let mut failures = Vec::new();
    for threads in [1, 2] {
        let device = Arc::new(CpuDevice::new(Some(threads)).unwrap());
        for name in MODELS {
            let set = [("vocab", 65), ("d_model", 32), ("n_layer", 2), ("n_head", 2), ("block", 67)];
            let compiled = training(&model(name), &set, 2, 67).unwrap_or_else(|e| panic!("{e}"));
            let mut session = Session::new(device.clone(), &compiled, None).unwrap_or_else(|e| panic!("{e}"));
            session.initialize(1).unwrap();
            let tokens: Vec<i32> = (0..2 * 67).map(|i| i * i % 65).collect();
            session.write_input("tokens", &tokens);
            session.write_input("targets", &tokens);
            let mut update = || {
                let before = HEAP.count();
                session.run_step().unwrap();
                session.run_update().unwrap();
                HEAP.count() - before
            };
            // in the first step every thread gets its scratch memory
            update();
            let counts: [usize; STEPS] = std::array::from_fn(|_| update());
            if counts != [0; STEPS] {
                failures.push((name, threads, counts));
            }
        }
    }
    assert!(failures.is_empty(), "(model, threads, allocations of each step): {failures:?}");
}
