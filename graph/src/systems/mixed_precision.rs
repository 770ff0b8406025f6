//! `mixed_precision`: matrix products take their factors in `bf16`, if that is wanted.
//!
//! Reads `OpRef`; the resource `Precision`. Writes `Precision` of nodes.
//!
//! The choice is one of nodes, not of values: parameters, activations and gradients keep their types, and a device
//! rounds what enters a product (Micikevicius et al. 2018, <https://arxiv.org/abs/1710.03740>; `bf16` has the range of
//! `f32`, so that no loss needs scaling).

use crate::components::{OpRef, Precision};
use crate::diagnostic::Errors;
use crate::world::World;

/// See the [module](self).
///
/// # Errors
/// None.
pub fn mixed_precision(world: &mut World) -> Result<(), Errors> {
    let wanted = world.resource::<Precision>().copied().unwrap_or_default();
    if wanted == Precision::F32 {
        return Ok(());
    }
    for node in world.nodes() {
        if world.expect::<OpRef>(node).0.products() {
            world.set(node, wanted);
        }
    }
    Ok(())
}
