//! The built-in ops, one file for each family: shape rule, gradient, and the kernels to call.
//!
//! They come in through [`BuiltinOps`], a plugin like any other.

pub mod attention;
pub mod conv1d;
pub mod elementwise;
pub mod embedding;
mod head;
pub mod layout;
pub mod linear;
pub mod linear_attention;
pub mod loss;
pub mod norm;
pub mod optimizer;
mod packed;
mod product;
mod recurrent;
pub mod rotary;
pub mod scan;
mod sequence;
pub mod token_shift;

use dataflow_graph::registry::{Plugin, Registry};

/// Registers every built-in op.
pub struct BuiltinOps;

impl Plugin for BuiltinOps {
    fn build(&self, registry: &mut Registry) {
        elementwise::register(registry);
        linear::register(registry);
        layout::register(registry);
        embedding::register(registry);
        norm::register(registry);
        rotary::register(registry);
        attention::register(registry);
        conv1d::register(registry);
        scan::register(registry);
        token_shift::register(registry);
        linear_attention::register(registry);
        loss::register(registry);
    }
}
