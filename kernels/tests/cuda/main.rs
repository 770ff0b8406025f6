//! CUDA kernels on the emulation, launched as the device launches them, against golden numbers: forward and every
//! gradient, in several thread orders, and once under sanitizers.

mod emulation;
#[path = "../golden/mod.rs"]
mod golden;
mod norms;
mod optimizer;
mod positions;
mod sanitizers;
mod scans;
mod sequences;
mod states;
mod time_mixing;
mod traps;

use emulation::{Memory, ORDERS, available, sanitized};

/// As [`in_all_orders`], and once with bf16 activations.
fn in_both_formats(test: impl Fn(&Memory)) {
    in_all_orders(&test);
    if available() {
        test(&Memory::bf16(ORDERS[3]));
    }
}

/// Runs `test` in every thread order, if there is an emulation.
fn in_all_orders(test: impl Fn(&Memory)) {
    if !available() {
        return;
    }
    // sanitizers find the same in any order
    let orders = if sanitized() { &ORDERS[2..3] } else { &ORDERS[..] };
    for &order in orders {
        test(&Memory::new(order));
    }
}
