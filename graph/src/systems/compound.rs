//! `compound`: ops with a kernel for all that they do stay whole. `decompose`: without it, they are written as primitive
//! ops, a launch for each step of their formula, where they know one ([`Op::decompose`]). Attention and scans stay whole.
//!
//! `compound` writes the resource `Whole`. `decompose` reads it, the topology, `OpRef`, `TensorType`, `Phase`, `Role`, and
//! the resources `Outputs` and `Parameters`; it writes the topology and `GradientOf`. It runs before `differentiate`, so
//! that gradients are those of the primitive ops, and once more behind `update`.

use std::sync::Arc;

use super::op_error;
use crate::build::{add_op, replace_everywhere};
use crate::components::{Name, OpRef, Phase, Place, Role};
use crate::diagnostic::Errors;
use crate::op::{Op, OpError};
use crate::types::TensorType;
use crate::world::{NodeId, ValueId, World};

/// Resource: compound ops stay as they are.
struct Whole;

/// See the [module](self).
///
/// # Errors
/// None.
pub fn compound(world: &mut World) -> Result<(), Errors> {
    world.set_resource(Whole);
    Ok(())
}

/// See the [module](self).
///
/// # Errors
/// What a shape rule says: a bug of the op.
pub fn decompose(world: &mut World) -> Result<(), Errors> {
    if world.resource::<Whole>().is_some() {
        return Ok(());
    }
    for node in world.topological().expect("`expand` reports cycles") {
        let op = world.expect::<OpRef>(node).0.clone();
        let made = vec![None; world.outputs(node).len()];
        let mut parts = Decomposition { inputs: world.inputs(node), world, node, made };
        let done = op.decompose(&mut parts);
        let made = parts.made;
        match done {
            Ok(false) => {}
            Ok(true) => {
                for (old, new) in world.outputs(node).into_iter().zip(made) {
                    if let Some(new) = new {
                        let name = world.expect::<Name>(old).clone();
                        world.set(new, name);
                        replace_everywhere(world, old, new);
                    }
                }
                world.remove_node(node);
            }
            Err(error) => return Err(op_error(world, node, &error).into()),
        }
    }
    Ok(())
}

/// What an op sees while it writes itself as primitive ops.
pub struct Decomposition<'w> {
    world: &'w mut World,
    node: NodeId,
    inputs: Vec<ValueId>,
    made: Vec<Option<ValueId>>,
}

impl Decomposition<'_> {
    /// The inputs, parameters included.
    pub fn inputs(&self) -> &[ValueId] {
        &self.inputs
    }

    /// The type of a value.
    pub fn type_of(&self, value: ValueId) -> TensorType {
        self.world.expect::<TensorType>(value).clone()
    }

    /// Adds a node; returns its first output.
    ///
    /// # Errors
    /// What its shape rule says.
    pub fn emit(&mut self, op: impl Op, inputs: &[ValueId]) -> Result<ValueId, OpError> {
        let name = self.world.expect::<Name>(self.node).0.clone();
        let place = self.world.get::<Place>(self.node).cloned();
        let phase = *self.world.expect::<Phase>(self.node);
        Ok(add_op(self.world, &name, place, Arc::new(op), inputs, Role::Activation, phase)?[0])
    }

    /// Says which value output `o` is. What nobody reads, such as statistics for a gradient, may be left out.
    pub fn set(&mut self, o: usize, value: ValueId) {
        self.made[o] = Some(value);
    }
}
