//! The compiler: each system is a function over the world, in a file of its own that states what it reads and
//! writes. [`Schedule`](crate::schedule::Schedule) lists them in order.

pub mod align_products;
pub mod allocate;
pub mod compound;
mod contract;
pub mod differentiate;
pub mod epilogue;
pub mod expand;
pub mod fuse;
pub mod in_place;
pub mod infer;
pub mod merge;
pub mod mixed_precision;
pub mod order;
pub mod rematerialize;
mod round_factors;
pub mod simplify;
pub mod update;

use crate::components::{Name, Place};
use crate::diagnostic::{Diagnostic, Errors};
use crate::op::OpError;
use crate::world::{NodeId, World};

/// Adds an error unless the same one stands there: a wrong row of a repeated block is reported once.
fn push_once(errors: &mut Errors, diagnostic: Diagnostic) {
    let start = |d: &Diagnostic| d.span.as_ref().map(|s| s.bytes.clone());
    if !errors.0.iter().any(|d| d.message == diagnostic.message && start(d) == start(&diagnostic)) {
        errors.push(diagnostic);
    }
}

/// What an op said about a node, with the node's place.
fn op_error(world: &World, node: NodeId, error: &OpError) -> Diagnostic {
    let mut diagnostic = Diagnostic::new(error.0.clone());
    diagnostic.row = world.get::<Name>(node).map(|n| n.0.clone());
    diagnostic.span = world.get::<Place>(node).map(|p| p.0.clone());
    diagnostic
}
