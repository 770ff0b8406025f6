//! Model FLOPs utilization (MFU; Chowdhery et al. 2022, <https://arxiv.org/abs/2204.02311>, appendix B): the operations that
//! a model asks for over those that the device's maker promises for the same time.

use dataflow_graph::components::Precision;
use dataflow_graph::plan::Plan;
use dataflow_kernels::device::{DType, Device};

/// Turns the time of an update into MFU.
#[derive(Clone, Copy, Debug)]
pub struct Utilization {
    /// Seconds that an update would take at the peak.
    least: f64,
}

impl Utilization {
    /// That of a plan's updates with so many micro-batches, where the device's peak is known. What is computed a second
    /// time to save memory does not count.
    pub fn new(plan: &Plan, micro_batches: usize, precision: Precision, device: &dyn Device) -> Option<Self> {
        let factors = match precision {
            Precision::F32 => DType::F32,
            Precision::Bf16 => DType::Bf16,
        };
        Some(Self { least: plan.update_flops(micro_batches) / device.peak_flops(factors)? })
    }

    /// From 0 to 1, of an update that took so long.
    pub fn in_seconds(&self, seconds: f64) -> f64 {
        self.least / seconds
    }
}
