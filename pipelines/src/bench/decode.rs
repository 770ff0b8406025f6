//! Times decoding: one more token for each sequence of a batch, against reading all parameters once.

use std::hint::black_box;
use std::time::Instant;

use dataflow_graph::components::{Precision, Target};
use dataflow_graph::diagnostic::Errors;
use serde::Serialize;

use super::median;
use super::roofline::Roofline;
use crate::generate::pool::{Next, Pool, Setup};

/// Steps before the first that counts.
const WARMUP: usize = 3;
/// Elements of the memory that is read to measure the machine: 256 MiB, beyond any cache.
const READ: usize = 1 << 26;
/// How often it is read; the fastest counts.
const READS: usize = 5;

/// What decoding came to.
#[derive(Clone, Debug, Serialize)]
pub struct Decoding {
    /// Tokens of all sequences in a second.
    pub tokens_per_s: f64,
    /// Milliseconds of a step.
    pub step_ms_median: f64,
    /// Of the fastest.
    pub step_ms_min: f64,
    /// Of the slowest.
    pub step_ms_max: f64,
    /// Bytes of all parameters.
    pub weight_bytes: usize,
    /// Bytes of the states of all sequences.
    pub state_bytes: usize,
    /// Bytes that the machine reads in a second.
    pub read_bytes_per_s: f64,
    /// Milliseconds to read the parameters once: no step can be faster, where they do not fit the caches.
    pub bound_ms: f64,
    /// The share of that bound which is reached.
    pub bound_fraction: f64,
}

/// Times `steps` steps for as many sequences as the pool has slots, behind `context` tokens of each.
///
/// # Errors
/// Everything that is wrong with the model, or no memory left.
pub fn measure(setup: Setup, context: usize, steps: usize, threads: usize) -> Result<Decoding, Errors> {
    let (slots, registry, device) = (setup.slots, setup.registry.clone(), setup.device.clone());
    let mut pool = Pool::new(setup)?;
    pool.parameters().initialize(1)?;
    let classes = pool.classes();
    let mut seconds = Vec::with_capacity(steps);
    let mut token = 0;
    for step in 0..WARMUP + steps {
        // what the states hold does not matter for the time
        let next: Vec<Next> = (0..slots)
            .map(|slot| Next { slot, position: context + step, token: ((token + slot) % classes.min(65)) as u32 })
            .collect();
        let start = Instant::now();
        let logits = pool.step(&next)?;
        if step >= WARMUP {
            seconds.push(start.elapsed().as_secs_f64());
        }
        token = crate::generate::sampling::best(&logits[..classes]) as usize;
    }
    let (state_bytes, weight_bytes) = pool.bytes();
    let read_bytes_per_s = match device.target() {
        Target::Cpu => read_rate(threads),
        Target::Cuda => Roofline::measure(&registry, &device, Precision::F32)?.bytes_per_s,
    };
    let (step, bound) = (median(&seconds), weight_bytes as f64 / read_bytes_per_s);
    let extreme = |pick: fn(f64, f64) -> f64| seconds.iter().copied().reduce(pick).unwrap_or(0.0) * 1e3;
    Ok(Decoding {
        tokens_per_s: slots as f64 / step,
        step_ms_median: step * 1e3,
        step_ms_min: extreme(f64::min),
        step_ms_max: extreme(f64::max),
        weight_bytes,
        state_bytes,
        read_bytes_per_s,
        bound_ms: bound * 1e3,
        bound_fraction: bound / step,
    })
}

/// Bytes that so many threads read from memory in a second.
pub fn read_rate(threads: usize) -> f64 {
    let memory: Vec<f32> = (0..READ).map(|i| (i & 0xff) as f32).collect();
    let part = READ.div_ceil(threads.max(1));
    let mut best = f64::INFINITY;
    for _ in 0..READS {
        let start = Instant::now();
        std::thread::scope(|scope| {
            for part in memory.chunks(part) {
                scope.spawn(move || black_box(sum(part)));
            }
        });
        best = best.min(start.elapsed().as_secs_f64());
    }
    (READ * size_of::<f32>()) as f64 / best
}

/// In as many sums as it takes to wait for memory alone.
fn sum(values: &[f32]) -> f32 {
    let mut sums = [0.0f32; 32];
    for piece in values.chunks_exact(32) {
        sums.iter_mut().zip(piece).for_each(|(sum, x)| *sum += x);
    }
    sums.iter().sum()
}
