//! Every CUDA kernel that training the six models launches compiles to machine code for Ampere and Hopper, without a
//! spill that is not listed here with its reason. Needs NVRTC and no GPU: on the library path, or below `CUDA_HOME`; skipped with a message where it is not.

mod common;

use std::collections::{BTreeMap, BTreeSet};

use common::{MODELS, SHAKESPEARE, model, training_for};
use dataflow_graph::components::Precision;
use dataflow_graph::plan::lower;
use dataflow_kernels::cuda::compile::{Options, Unit, compile, is_available, usage};
use dataflow_kernels::cuda::source;
use dataflow_kernels::cuda::units::{Units, describe};
use dataflow_kernels::device::Target;

/// Kernels that may spill: file, kernel, the most bytes for each thread, and why.
const SPILLS: &[(&str, &str, usize, &str)] = &[
    ("scan.cu", "scan_backward", 352, "three blocks a multiprocessor are one wave; rates and their sums are spilled"),
    ("attention.cu", "attention_backward_queries", 160, "f32 on Ampere: tiles of 64 by 64 sums and their factors"),
    ("gla.cu", "gla_backward", 640, "f32 on Ampere: three gradients of a chunk are summed at once"),
    ("retention.cu", "retention_forward", 32, "f32 values of 115 columns, padded to 128: one row of sums too many"),
    ("linear_attention.cu", "decay_backward", 576, "f32: sums of three gradients and of the state are held at once"),
];

/// What training a model compiles.
fn units_of(name: &str, precision: Precision, set: &[(&str, i64)], block: usize) -> Vec<Unit> {
    let compiled = training_for((Target::Cuda, precision), &model(name), set, 2, block, vec![]);
    let compiled = compiled.unwrap_or_else(|e| panic!("{e}"));
    let launches = lower(&compiled.world, &compiled.plan, Target::Cuda).unwrap_or_else(|e| panic!("{name}: {e}"));
    let described = describe(launches).unwrap_or_else(|e| panic!("{name}: {e}"));
    Units::of(&described.launches).unwrap_or_else(|e| panic!("{name}: {e}")).units
}

/// A unit by name, definitions and text: models share many.
type Key = (String, Vec<(&'static str, String)>, String);

#[test]
fn every_kernel_compiles_for_ampere_and_hopper_without_spills() {
    let mut units: BTreeMap<Key, Unit> = BTreeMap::new();
    let mut add = |unit: Unit| {
        units.insert((unit.name.clone(), unit.defines.clone(), unit.text.clone()), unit);
    };
    for (name, text) in source::FILES {
        add(Unit { name: format!("{name}.cu"), text: text.to_string(), defines: Vec::new() });
    }
    for name in MODELS {
        // in bf16 at the sizes of the published 120M models, in f32 at those for Shakespeare
        units_of(name, Precision::Bf16, &[("n_layer", 2), ("block", 1024)], 1024).into_iter().for_each(&mut add);
        let shakespeare: Vec<_> = SHAKESPEARE.iter().map(|&(k, v)| (k, if k == "n_layer" { 1 } else { v })).collect();
        units_of(name, Precision::F32, &shakespeare, 256).into_iter().for_each(&mut add);
    }
    let files: BTreeSet<&str> = units.keys().map(|(name, ..)| name.as_str()).collect();
    assert!(files.contains("generated.cu") && files.len() == source::FILES.len() + 1, "{files:?}");
    if !is_available() {
        println!(
            "skipped: NVRTC is not there; install the Python package nvidia-cuda-nvrtc and set CUDA_HOME to its folder cu13"
        );
        return;
    }
    let mut spilled = Vec::new();
    println!("{:24} {:44} {:7} {:>9} {:>7} {:>6}", "file", "kernel", "arch", "registers", "shared", "spills");
    for unit in units.values() {
        for arch in ["sm_80", "sm_90a"] {
            let options = Options { arch: arch.into(), verbose: true };
            let compiled = compile(unit, &options).unwrap_or_else(|e| panic!("{e}"));
            assert!(compiled.image.starts_with(b"\x7fELF"), "{}: no machine code", unit.name);
            let kernels = usage(&compiled.log);
            assert!(!kernels.is_empty(), "{}: the compiler lists no kernels:\n{}", unit.name, compiled.log);
            for k in kernels {
                let excused =
                    SPILLS.iter().any(|s| (s.0, s.1) == (unit.name.as_str(), k.kernel.as_str()) && k.spilled <= s.2);
                if k.spilled > 0 && !excused {
                    spilled
                        .push(format!("{} {:?} {} for {arch}: {} bytes", unit.name, unit.defines, k.kernel, k.spilled));
                }
                let row = (k.registers, k.shared, k.spilled);
                println!("{:24} {:44} {arch:7} {:>9} {:>7} {:>6}", unit.name, k.kernel, row.0, row.1, row.2);
            }
        }
    }
    assert!(spilled.is_empty(), "registers are spilled to memory:\n{}", spilled.join("\n"));
}
