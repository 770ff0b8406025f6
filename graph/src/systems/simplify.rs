//! `simplify`: nodes that nobody needs or that do nothing go, nodes that compute the same become one, and data that
//! only moves stays where it is.
//!
//! Reads the topology, `OpRef`, `TensorType`, `Role`, `Phase`; the resources `Outputs`, `Options`.
//! Writes the topology; `Alias` of values that lie inside of another, `NoLaunch` of nodes whose work that
//! saves.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use crate::build::{add_op, replace_everywhere};
use crate::builtin::Copy;
use crate::components::{Name, OpRef, Outputs, Phase, Role};
use crate::diagnostic::{Diagnostic, Errors};
use crate::op::{OpError, View};
use crate::types::TensorType;
use crate::world::{NodeId, ValueId, World};

/// Of values: it lies in the memory of another, from this column on. The other one may be an alias too.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Alias {
    /// The value whose memory it is.
    pub of: ValueId,
    /// First column.
    pub column: usize,
}

/// Of nodes: its outputs are aliases, nothing is to be run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NoLaunch;

/// See the [module](self).
///
/// # Errors
/// None for ops that keep their contracts.
pub fn simplify(world: &mut World) -> Result<(), Errors> {
    remove_identities(world);
    remove_dead(world);
    merge_equal(world);
    views(world).map_err(|e| Errors::from(Diagnostic::new(e.0)))?;
    Ok(())
}

/// Removes nodes that neither lead to an output nor update a state.
pub(super) fn remove_dead(world: &mut World) {
    let order = world.topological().expect("`expand` reports cycles");
    let outputs: HashSet<ValueId> =
        world.resource::<Outputs>().map(|o| o.0.values().copied().collect()).unwrap_or_default();
    for &node in order.iter().rev() {
        let needed = world.outputs(node).iter().any(|v| outputs.contains(v) || !world.consumers(*v).is_empty());
        if !needed && world.expect::<OpRef>(node).0.updates().is_empty() {
            world.remove_node(node);
        }
    }
}

/// Lets the readers of a node that does nothing, such as dropout of probability 0, read its input.
fn remove_identities(world: &mut World) {
    for node in world.nodes() {
        let (inputs, outputs) = (world.inputs(node), world.outputs(node));
        let ([input], [output]) = (&inputs[..], &outputs[..]) else { continue };
        let op = &world.expect::<OpRef>(node).0;
        let nothing = op.updates().is_empty()
            && op.expression(1).is_some_and(|p| p.is_identity())
            && world.expect::<TensorType>(*input) == world.expect::<TensorType>(*output)
            && !is_output(world, *output)
            && !is_updated(world, *input);
        if nothing {
            let (old, new) = (*output, *input);
            replace_everywhere(world, old, new);
            world.remove_node(node);
        }
    }
}

/// Merges nodes of equal op and inputs.
fn merge_equal(world: &mut World) {
    let order = world.topological().expect("`expand` reports cycles");
    let mut seen: HashMap<(String, Phase, Vec<ValueId>), NodeId> = HashMap::new();
    for node in order {
        let op = world.expect::<OpRef>(node).0.clone();
        if !op.updates().is_empty() {
            continue;
        }
        // an op's attributes are its whole meaning, and `Debug` shows them all
        let key = (format!("{op:?}"), *world.expect::<Phase>(node), world.inputs(node));
        let Some(&first) = seen.get(&key) else {
            seen.insert(key, node);
            continue;
        };
        for (old, new) in world.outputs(node).into_iter().zip(world.outputs(first)) {
            replace_everywhere(world, old, new);
        }
        world.remove_node(node);
    }
}

/// Whether every reader of a value, and its producer, can follow gaps between rows.
pub(super) fn may_have_gaps(world: &World, value: ValueId) -> bool {
    let strided = |node: NodeId| world.expect::<OpRef>(node).0.strided() || world.get::<NoLaunch>(node).is_some();
    world.producer(value).is_none_or(|(node, _)| strided(node))
        && world.consumers(value).into_iter().all(|(n, _)| strided(n))
}

pub(super) fn is_output(world: &World, value: ValueId) -> bool {
    world.resource::<Outputs>().is_some_and(|o| o.0.values().any(|v| *v == value))
}

/// Whether a value is updated in place somewhere, so that nothing may share its memory.
pub(super) fn is_updated(world: &World, value: ValueId) -> bool {
    let by = |(node, port): (NodeId, usize)| world.expect::<OpRef>(node).0.updates().iter().any(|u| u.1 == port);
    let from = |(node, port): (NodeId, usize)| world.expect::<OpRef>(node).0.updates().iter().any(|u| u.0 == port);
    world.consumers(value).into_iter().any(by) || world.producer(value).is_some_and(from)
}

/// Lets the outputs of splits lie in their input, and the inputs of concatenations in the output.
fn views(world: &mut World) -> Result<(), OpError> {
    for node in world.topological().expect("`expand` reports cycles") {
        let op = world.expect::<OpRef>(node).0.clone();
        let inputs = world.inputs(node);
        let types = crate::build::types_of(world, &inputs);
        let Some(view) = op.view(&types) else { continue };
        let outputs = world.outputs(node);
        match view {
            View::Columns(columns) => {
                let readable = |v: &ValueId| {
                    let whole = world.expect::<TensorType>(*v) == &types[0];
                    !is_output(world, *v)
                        && !is_updated(world, *v)
                        && world.consumers(*v).into_iter().all(|(n, _)| whole || world.expect::<OpRef>(n).0.strided())
                };
                // parameters change when all micro-batches are done
                let steady = *world.expect::<Role>(inputs[0]) == Role::Parameter
                    && *world.expect::<Phase>(node) == Phase::Step
                    || !is_updated(world, inputs[0]);
                if outputs.iter().all(readable) && steady {
                    for (&value, column) in outputs.iter().zip(columns) {
                        world.set(value, Alias { of: inputs[0], column });
                    }
                    world.set(node, NoLaunch);
                }
            }
            View::Gather(columns) => {
                if is_updated(world, outputs[0]) {
                    continue;
                }
                for (port, (&value, column)) in inputs.iter().zip(columns).enumerate() {
                    let of = outputs[0];
                    let once = inputs.iter().filter(|v| **v == value).count() == 1;
                    let own = world.producer(value).is_some()
                        && world.get::<Alias>(value).is_none()
                        && once
                        && !is_output(world, value)
                        && !is_updated(world, value)
                        && may_have_gaps(world, value);
                    if own {
                        world.set(value, Alias { of, column });
                        continue;
                    }
                    let (name, role) = (world.expect::<Name>(value).0.clone(), *world.expect::<Role>(of));
                    let phase = *world.expect::<Phase>(node);
                    let copy = add_op(world, &format!("{name}.copy"), None, Arc::new(Copy), &[value], role, phase)?[0];
                    world.replace_input(node, port, copy);
                    world.set(copy, Alias { of, column });
                }
                world.set(node, NoLaunch);
            }
        }
    }
    Ok(())
}
