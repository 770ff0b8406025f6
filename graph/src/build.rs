//! Adding nodes to a world: what `infer`, `differentiate` and `update` share.

use std::sync::Arc;

use crate::components::{GradientOf, Name, OpRef, Outputs, Parameters, Phase, Place, Role, States};
use crate::op::{Op, OpError};
use crate::types::TensorType;
use crate::world::{NodeId, ValueId, World};

/// The name of the state that counts micro-batches; random masks are drawn from it.
pub const TICK: &str = "tick";

/// The name of the state that counts updates.
pub const STEP: &str = "step";

/// A source value with its components.
pub fn add_source(world: &mut World, name: &str, tensor: TensorType, role: Role) -> ValueId {
    let value = world.add_source();
    world.set(value, Name(name.to_string()));
    world.set(value, tensor);
    world.set(value, role);
    value
}

/// The state value of this name, made at its first use.
pub fn state(world: &mut World, name: &str, tensor: TensorType) -> ValueId {
    if let Some(&value) = world.resource::<States>().and_then(|s| s.0.get(name)) {
        return value;
    }
    let value = add_source(world, name, tensor, Role::State);
    if world.resource::<States>().is_none() {
        world.set_resource(States::default());
    }
    world.resource_mut::<States>().expect("just set").0.insert(name.to_string(), value);
    value
}

/// A node whose inputs are all known, with its types inferred; returns its outputs.
///
/// # Errors
/// What the op says.
pub fn add_op(
    world: &mut World,
    name: &str,
    place: Option<Place>,
    op: Arc<dyn Op>,
    inputs: &[ValueId],
    role: Role,
    phase: Phase,
) -> Result<Vec<ValueId>, OpError> {
    let node = world.add_node();
    world.set(node, Name(name.to_string()));
    if let Some(place) = place {
        world.set(node, place);
    }
    world.set(node, phase);
    world.set(node, OpRef(op.clone()));
    inputs.iter().for_each(|&v| world.push_input(node, v));
    let types = types_of(world, inputs);
    let outputs = op.infer(&types)?;
    finish(world, node, &*op);
    Ok(outputs
        .into_iter()
        .enumerate()
        .map(|(port, tensor)| {
            let value = world.add_output(node, port);
            world.set(value, Name(name.to_string()));
            world.set(value, tensor);
            world.set(value, role);
            value
        })
        .collect())
}

/// Connects the step counter to a node whose other inputs are complete, if its op wants it.
pub fn finish(world: &mut World, node: NodeId, op: &dyn Op) {
    if op.uses_step() {
        let tick = state(world, TICK, TensorType::i32([1]));
        world.push_input(node, tick);
    }
}

/// Lets whoever reads `old` read `new`: nodes, the host, and the update of a parameter whose gradient it is.
pub(crate) fn replace_everywhere(world: &mut World, old: ValueId, new: ValueId) {
    world.replace_uses(old, new);
    if let Some(outputs) = world.resource_mut::<Outputs>() {
        outputs.0.values_mut().filter(|v| **v == old).for_each(|v| *v = new);
    }
    for parameter in world.resource::<Parameters>().cloned().unwrap_or_default().0 {
        if world.get(parameter) == Some(&GradientOf(old)) {
            world.set(parameter, GradientOf(new));
        }
    }
}

/// The types of values.
pub fn types_of(world: &World, values: &[ValueId]) -> Vec<TensorType> {
    values.iter().map(|&v| world.expect::<TensorType>(v).clone()).collect()
}
