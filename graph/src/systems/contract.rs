//! Two nodes become one: what `merge` and `fuse` share.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use crate::build::{finish, types_of};
use crate::components::{Name, OpRef, Phase, Role};
use crate::op::{Op, OpError};
use crate::types::TensorType;
use crate::world::{NodeId, ValueId, World};

use super::simplify::{NoLaunch, is_updated};

/// A topological order that is kept while nodes become one.
pub(super) struct Positions {
    at: HashMap<NodeId, usize>,
}

impl Positions {
    pub fn new(world: &World) -> Self {
        let order = world.topological().expect("`expand` reports cycles");
        Self { at: order.into_iter().enumerate().map(|(at, node)| (node, at)).collect() }
    }

    /// The nodes, in order.
    pub fn order(&self) -> Vec<NodeId> {
        let mut order: Vec<_> = self.at.iter().map(|(node, at)| (*at, *node)).collect();
        order.sort_unstable();
        order.into_iter().map(|(_, node)| node).collect()
    }

    pub fn of(&self, node: NodeId) -> usize {
        self.at[&node]
    }

    /// Whether `to` depends on `from` through another node, so that they cannot become one.
    pub fn detour(&self, world: &World, from: NodeId, to: NodeId) -> bool {
        let limit = self.of(to);
        let next = |node: NodeId| world.outputs(node).into_iter().flat_map(|v| world.consumers(v)).map(|(n, _)| n);
        let mut seen = HashSet::new();
        let mut stack: Vec<NodeId> = next(from).filter(|n| *n != to).collect();
        while let Some(node) = stack.pop() {
            if node == to {
                return true;
            }
            if self.of(node) < limit && seen.insert(node) {
                stack.extend(next(node));
            }
        }
        false
    }

    /// Whether all of `values` are there when `node` runs.
    pub fn ready(&self, world: &World, values: &[ValueId], node: NodeId) -> bool {
        values.iter().all(|v| world.producer(*v).is_none_or(|(n, _)| n == node || self.of(n) < self.of(node)))
    }

    /// After nodes became one: a new order, unless the old one still holds.
    pub fn update(&mut self, world: &World, node: NodeId) {
        let before =
            world.inputs(node).into_iter().all(|v| world.producer(v).is_none_or(|p| self.of(p.0) < self.of(node)));
        let after =
            world.outputs(node).into_iter().flat_map(|v| world.consumers(v)).all(|c| self.of(c.0) > self.of(node));
        if !before || !after {
            *self = Self::new(world);
        }
    }
}

/// Whether a node may become one with another at all: nothing updates its inputs or is updated by it while
/// micro-batches run.
pub(super) fn movable(world: &World, node: NodeId) -> bool {
    let role = |v: &ValueId| *world.expect::<Role>(*v);
    world.expect::<OpRef>(node).0.updates().is_empty()
        && world.get::<NoLaunch>(node).is_none()
        && *world.expect::<Phase>(node) == Phase::Step
        && world.inputs(node).iter().all(|v| {
            matches!(role(v), Role::Parameter | Role::Input) || !is_updated(world, *v)
            // counters move on when all readers are done
            || (role(v) == Role::State && world.expect::<TensorType>(*v).dtype == crate::types::DType::I32)
        })
}

/// Lets `keep` do `op` with these inputs and outputs, and removes `gone`. The step counter and outputs that `op` has
/// beyond those given are added.
pub(super) fn replace(
    world: &mut World,
    keep: NodeId,
    gone: NodeId,
    op: Arc<dyn Op>,
    inputs: &[ValueId],
    outputs: &[ValueId],
) -> Result<(), OpError> {
    let types = op.infer(&types_of(world, inputs))?;
    let role = *world.expect::<Role>(world.outputs(keep)[0]);
    world.set_inputs(keep, inputs);
    finish(world, keep, &*op);
    world.set_outputs(keep, outputs);
    world.remove_node(gone);
    let name = world.expect::<Name>(keep).0.clone();
    for (port, tensor) in types.into_iter().enumerate() {
        match outputs.get(port) {
            Some(&value) if *world.expect::<TensorType>(value) == tensor => {}
            Some(&value) => {
                let found = world.expect::<TensorType>(value);
                return Err(format!("`{name}`: {op:?} gives {tensor} in place of {found}").into());
            }
            None => {
                let value = world.add_output(keep, port);
                world.set(value, Name(format!("{name}:{port}")));
                world.set(value, tensor);
                world.set(value, role);
            }
        }
    }
    world.set(keep, OpRef(op));
    Ok(())
}
