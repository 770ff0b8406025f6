//! How to add ops from outside of `dataflow`: a crate to read from top to bottom, and to copy.
//!
//! A plugin is a bundle of registrations. This one brings two ops, one of each kind there is:
//!
//! 1. [`leaky_relu`]: an **elementwise** op. It writes down what it computes as an expression, and the shape rule, the
//!    gradient, the kernels and the fusion with its neighbours follow. Most ops that one misses are of this kind.
//! 2. [`running_mean`]: an op with a **kernel of its own**. It states its shape rule, the op that computes its gradient,
//!    and the code that runs.
//!
//! With the [`App`](dataflow::App) of `main.rs` the program has every command of `dataflow` and knows both ops:
//!
//! ```sh
//! cargo run --release -p running-mean -- ops RunningMean
//! cargo run --release -p running-mean -- run tests/plugins/running_mean/pipeline.ron
//! ```
//!
//! `model.ron` is a model that is made of them, `pipeline.ron` trains it, and `tests/plugin.rs` shows how to test a
//! gradient against finite differences.

pub mod leaky_relu;
pub mod running_mean;

use dataflow::{Info, Plugin, Registry};

use leaky_relu::LeakyRelu;
use running_mean::RunningMean;

/// Registers the ops of this crate. The built-in ops come in through the very same trait.
pub struct RunningMeanPlugin;

impl Plugin for RunningMeanPlugin {
    fn build(&self, registry: &mut Registry) {
        // the name is what a row writes before `(`; the rest is what `dataflow ops NAME` prints
        registry.op::<LeakyRelu>(Info {
            name: "LeakyRelu",
            about: "A rectifier that lets a share of negative numbers through.",
            inputs: &["x"],
            formula: "max(x, 0) + slope min(x, 0)",
            source: "Maas et al., 2013",
            example: "",
        });
        registry.op::<RunningMean>(Info {
            name: "RunningMean",
            about: "The mean of this time step and all before it, in every channel.",
            inputs: &["x [B, T, C]"],
            formula: "y_t = (x_0 + ... + x_t) / (t + 1)",
            source: "",
            example: "",
        });
    }
}
