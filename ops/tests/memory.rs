//! The memory of a training step grows linearly with the length of the sequences.

mod common;

use std::time::{Duration, Instant};

use common::{MODELS, SHAKESPEARE, model, training};
use dataflow_kernels::device::Region;

const BLOCKS: [usize; 4] = [256, 512, 1024, 2048];

/// Plans only: what a run takes is the arena, which is allocated whole. `--example step_memory` measures runs.
#[test]
fn the_arena_grows_linearly_with_the_sequence() {
    println!("arena of a training step in MB, and seconds to compile it, by T");
    for name in MODELS {
        let mut sizes = vec![];
        let mut line = format!("{name:9}");
        for block in BLOCKS {
            let mut set = SHAKESPEARE.to_vec();
            set.retain(|(name, _)| *name != "block");
            set.push(("block", block as i64)); // learned positions need it
            let start = Instant::now();
            let compiled = training(&model(name), &set, 1, block).unwrap_or_else(|e| panic!("{e}"));
            let seconds = start.elapsed();
            let bytes = compiled.plan.bytes(Region::Arena) as f64;
            line += &format!("  {:8.1} ({:.3})", bytes / 1e6, seconds.as_secs_f64());
            // a plan does not depend on T; the bound is generous, for busy machines
            assert!(seconds < Duration::from_secs(2), "{name} compiles in {seconds:?}");
            sizes.push(bytes);
        }
        println!("{line}");
        // a constant part is the gradients of the parameters, which all exist at once before they are clipped
        assert!((1.8..2.1).contains(&(sizes[3] / sizes[2])), "{name}: {sizes:?}");
        let growth = (sizes[3] - sizes[2]) / (sizes[2] - sizes[1]);
        assert!((1.9..2.1).contains(&growth), "{name}: {sizes:?}");
    }
}
