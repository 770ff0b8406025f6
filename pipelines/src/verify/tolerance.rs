//! How far this program may be from the golden numbers: largest difference over largest magnitude of a tensor.
//!
//! Golden numbers are computed in double precision and rounded once, so the differences are this program's own
//! rounding. In single precision PyTorch stays under a tenth of each of these; in `bf16`, with eight bits of mantissa, a
//! difference says less, so the limits are to find what is wrong, not what is imprecise.

use dataflow_graph::components::Precision;

/// What is compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Ops, logits, losses and gradients. A wrong eps, scale or activation is off by more.
    Values,
    /// Logits and gradients of whole models. In `bf16` they carry the roundings of all layers: PyTorch's autocast is off by up to
    /// 1.6e-1 in these files.
    Deep,
    /// Learning rates: computed in double precision from the step, then rounded once.
    LearningRate,
    /// Losses along a trajectory and the size of each parameter at its end: rounding errors of ten updates add up
    /// slowly, since AdamW normalises each gradient.
    Trajectory,
    /// Norms of all gradients along a trajectory. They are the first to feel the rounding of earlier updates: a
    /// small difference in the parameters turns the gradient where the loss is curved. PyTorch is off by 2e-5.
    GradientNorm,
    /// RetNet's form without the row normaliser, which the published model decodes with.
    Recurrent,
}

impl Kind {
    /// The largest error that is no mistake.
    pub fn tolerance(self, precision: Precision) -> f64 {
        match (precision, self) {
            (_, Kind::LearningRate) => 1e-6,
            (Precision::F32, Kind::Values | Kind::Deep | Kind::Trajectory) => 1e-4,
            (Precision::F32, Kind::GradientNorm | Kind::Recurrent) => 1e-3,
            (Precision::Bf16, Kind::Trajectory) => 5e-3,
            (Precision::Bf16, Kind::Values) => 2e-2,
            (Precision::Bf16, Kind::GradientNorm | Kind::Deep | Kind::Recurrent) => 5e-1,
        }
    }
}
