//! How far this program may be from the golden numbers: largest difference over largest magnitude of a tensor.
//!
//! Golden numbers are computed in double precision and rounded once, so the differences are this program's own
//! rounding in single precision. PyTorch in single precision stays under a tenth of each of these.

/// Ops, logits, losses and gradients. A wrong eps, scale or activation is off by more.
pub const VALUES: f64 = 1e-4;

/// Learning rates: computed in double precision from the step, then rounded once.
pub const LEARNING_RATE: f64 = 1e-6;

/// Losses along a trajectory and the size of each parameter at its end: rounding errors of ten updates add up
/// slowly, since AdamW normalises each gradient.
pub const TRAJECTORY: f64 = 1e-4;

/// Norms of all gradients along a trajectory. They are the first to feel the rounding of earlier updates: a
/// small difference in the parameters turns the gradient where the loss is curved. PyTorch is off by 2e-5.
pub const GRADIENT_NORM: f64 = 1e-3;

/// RetNet's form without the row normaliser, which the published model decodes with.
pub const RECURRENT: f64 = 1e-3;
