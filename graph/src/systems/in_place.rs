//! `in_place`: nodes overwrite an input that they are the last to read.
//!
//! Reads the topology, the resources `Order` and `Outputs`, `OpRef`, `TensorType`, `Role`, `Alias`.
//! Writes `InPlace` of nodes and `Alias` of values.

use std::collections::{HashMap, HashSet};

use super::allocate::root_of;
use super::order::Order;
use super::simplify::{Alias, NoLaunch, is_output, is_updated};
use crate::components::{OpRef, Role};
use crate::diagnostic::Errors;
use crate::types::TensorType;
use crate::world::{NodeId, ValueId, World};

/// Of nodes: pairs (output, input) that are the same memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InPlace(pub Vec<(usize, usize)>);

/// See the [module](self).
///
/// # Errors
/// None.
pub fn in_place(world: &mut World) -> Result<(), Errors> {
    let order = world.resource::<Order>().expect("`order` ran").0.clone();
    // the last launch that touches the memory of each value
    let mut last: HashMap<ValueId, usize> = HashMap::new();
    let mut fixed: HashSet<ValueId> = HashSet::new();
    for (at, &node) in order.iter().enumerate() {
        for value in world.inputs(node).into_iter().chain(world.outputs(node)) {
            let root = root_of(world, value);
            last.insert(root, at);
            let role = world.expect::<Role>(value);
            let temporary = matches!(role, Role::Activation | Role::Gradient) && world.producer(root).is_some();
            if !temporary || is_output(world, value) || is_updated(world, value) {
                fixed.insert(root);
            }
        }
    }
    for (at, &node) in order.iter().enumerate() {
        let pairs = pairs(world, node, |root| last[&root] == at && !fixed.contains(&root));
        for &(output, input) in &pairs {
            let (output, input) = (world.outputs(node)[output], world.inputs(node)[input]);
            world.set(output, Alias { of: input, column: 0 });
            last.insert(root_of(world, input), last[&output]);
        }
        if !pairs.is_empty() {
            world.set(node, InPlace(pairs));
        }
    }
    Ok(())
}

/// What `node` may overwrite, given which roots are read by it for the last time.
fn pairs(world: &World, node: NodeId, free: impl Fn(ValueId) -> bool) -> Vec<(usize, usize)> {
    let op = &world.expect::<OpRef>(node).0;
    if !op.updates().is_empty() || world.get::<NoLaunch>(node).is_some() {
        return Vec::new();
    }
    let (inputs, outputs) = (world.inputs(node), world.outputs(node));
    let any = op.expression(inputs.len()).is_some();
    let allowed = op.in_place();
    let roots: Vec<ValueId> = inputs.iter().map(|v| root_of(world, *v)).collect();
    let mut pairs: Vec<(usize, usize)> = Vec::new();
    for (o, &output) in outputs.iter().enumerate() {
        if world.get::<Alias>(output).is_some() || is_output(world, output) {
            continue;
        }
        let tensor = world.expect::<TensorType>(output);
        let found = (0..inputs.len()).find(|&i| {
            (any || allowed.contains(&(o, i)))
                && !pairs.iter().any(|p| p.1 == i)
                && world.expect::<TensorType>(inputs[i]) == tensor
                && world.expect::<TensorType>(roots[i]) == tensor
                && roots.iter().filter(|r| **r == roots[i]).count() == 1
                && free(roots[i])
        });
        pairs.extend(found.map(|i| (o, i)));
    }
    pairs
}
