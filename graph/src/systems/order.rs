//! `order`: the launch order.
//!
//! Reads the topology, `OpRef`, `Phase`. Writes the resource `Order`.
//!
//! A node runs as soon as its inputs are there, the one that was created first before others: the forward
//! pass in the order of the file, the backward pass in its reverse, so each activation is consumed as early
//! as the chain rule allows. A node that updates a value in place waits for the value's other readers.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap, HashSet};

use crate::components::{Name, OpRef, Phase};
use crate::diagnostic::{Diagnostic, Errors};
use crate::world::{NodeId, World};

/// Resource: nodes in launch order.
#[derive(Clone, Debug, Default)]
pub struct Order(pub Vec<NodeId>);

/// See the [module](self).
///
/// # Errors
/// If updates in place and reads wait for each other in a circle, or a micro-batch waits for an update.
pub fn order(world: &mut World) -> Result<(), Errors> {
    let nodes = world.nodes();
    let mut before: HashMap<NodeId, HashSet<NodeId>> = HashMap::new();
    for &node in &nodes {
        let mut earlier = HashSet::new();
        let inputs = world.inputs(node);
        earlier.extend(inputs.iter().filter_map(|v| world.producer(*v)).map(|(n, _)| n));
        for (_, input) in world.expect::<OpRef>(node).0.updates() {
            earlier.extend(world.consumers(inputs[input]).into_iter().map(|(n, _)| n).filter(|n| *n != node));
        }
        before.insert(node, earlier);
    }
    let mut after: HashMap<NodeId, Vec<NodeId>> = HashMap::new();
    let mut waiting: HashMap<NodeId, usize> = HashMap::new();
    let mut ready = BinaryHeap::new();
    let key = |world: &World, node: NodeId| Reverse((*world.expect::<Phase>(node), node));
    for &node in &nodes {
        let earlier = &before[&node];
        earlier.iter().for_each(|n| after.entry(*n).or_default().push(node));
        waiting.insert(node, earlier.len());
        if earlier.is_empty() {
            ready.push(key(world, node));
        }
    }
    let mut order = Vec::with_capacity(nodes.len());
    while let Some(Reverse((phase, node))) = ready.pop() {
        if let Some(&last) = order.last()
            && *world.expect::<Phase>(last) > phase
        {
            let name = &world.expect::<Name>(node).0;
            return Err(Diagnostic::new(format!("`{name}` runs in every micro-batch but waits for the update")).into());
        }
        order.push(node);
        for next in after.get(&node).into_iter().flatten() {
            let count = waiting.get_mut(next).expect("every node was counted");
            *count -= 1;
            if *count == 0 {
                ready.push(key(world, *next));
            }
        }
    }
    if order.len() < nodes.len() {
        let done: HashSet<_> = order.iter().copied().collect();
        let stuck = nodes.iter().find(|n| !done.contains(n)).map(|n| world.expect::<Name>(*n).0.clone());
        return Err(Diagnostic::new(format!(
            "`{}` updates a value that others still wait to read",
            stuck.unwrap_or_default()
        ))
        .into());
    }
    world.set_resource(Order(order));
    Ok(())
}
