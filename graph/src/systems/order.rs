//! `order`: the launch order.
//!
//! Reads the topology, `OpRef`, `Phase`, `Late`. Writes the resource `Order`.
//!
//! The base is the order of creation: a node runs as soon as its inputs are there, the one that was created first
//! before others. That is the forward pass in the order of the file and the backward pass in its reverse, so each
//! activation is consumed as early as the chain rule allows. A node that updates a value in place waits for the value's
//! other readers.
//!
//! From the base, nodes sink towards their first reader where that keeps less alive meanwhile: what a node makes is
//! larger than what only it still reads. A node that is `Late`, such as a recomputed one, always sinks. Of the two orders, with and without the
//! sinking of other nodes, the one with the smaller live set is taken. Nothing depends on chance or on time.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap, HashSet};

use super::allocate::{live_peak, lives, root_of, size_of};
use super::rematerialize::{Late, Unread};
use crate::components::{Name, OpRef, Phase, Role};
use crate::diagnostic::{Diagnostic, Errors};
use crate::world::{NodeId, ValueId, World};

/// Resource: nodes in launch order.
#[derive(Clone, Debug, Default)]
pub struct Order(pub Vec<NodeId>);

/// See the [module](self).
///
/// # Errors
/// If updates in place and reads wait for each other in a circle, or a micro-batch waits for an update.
pub fn order(world: &mut World) -> Result<(), Errors> {
    let base = by_creation(world)?;
    let sinking = Sinking::new(world, &base);
    let orders = [sinking.order(world, false), sinking.order(world, true)];
    let [plain, sunk] = orders.map(|order| (live_peak(&lives(world, &order)).0, order));
    world.set_resource(Order(if sunk.0 < plain.0 { sunk.1 } else { plain.1 }));
    Ok(())
}

/// Every node as soon as it is ready, the one that was created first before others.
fn by_creation(world: &World) -> Result<Vec<NodeId>, Errors> {
    let mut nodes = world.nodes();
    nodes.retain(|n| world.get::<Unread>(*n).is_none());
    let there: HashSet<NodeId> = nodes.iter().copied().collect();
    let mut before: HashMap<NodeId, HashSet<NodeId>> = HashMap::new();
    for &node in &nodes {
        let mut earlier = HashSet::new();
        let inputs = world.inputs(node);
        earlier.extend(inputs.iter().filter_map(|v| world.producer(*v)).map(|(n, _)| n));
        for (_, input) in world.expect::<OpRef>(node).0.updates() {
            earlier.extend(
                world.consumers(inputs[input]).into_iter().map(|(n, _)| n).filter(|n| *n != node && there.contains(n)),
            );
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
    Ok(order)
}

/// When a node runs: nodes that sink to the place of another run right before it.
type Turn = (usize, bool, usize);

/// What sinking needs to know of each node of the base order.
struct Sinking {
    base: Vec<NodeId>,
    facts: Vec<Facts>,
}

/// Of a node: memory in the arena, by root value, and who must come later.
#[derive(Default)]
struct Facts {
    reads: Vec<(ValueId, usize)>,
    makes: Vec<(ValueId, usize)>,
    /// Readers of its outputs, and those that update its inputs.
    later: Vec<usize>,
    fixed: bool,
}

impl Sinking {
    fn new(world: &World, base: &[NodeId]) -> Self {
        let place: HashMap<NodeId, usize> = base.iter().enumerate().map(|(at, node)| (*node, at)).collect();
        // a launch between micro-batch and update stays in front of the update
        let update = base.iter().position(|n| *world.expect::<Phase>(*n) == Phase::Update).unwrap_or(base.len());
        let facts = base.iter().enumerate().map(|(at, &node)| {
            let (inputs, outputs) = (world.inputs(node), world.outputs(node));
            let roots = |values: &[ValueId]| {
                let temporary = |v: &&ValueId| matches!(world.expect::<Role>(**v), Role::Activation | Role::Gradient);
                let mut roots: Vec<ValueId> = values.iter().filter(temporary).map(|v| root_of(world, *v)).collect();
                roots.sort_unstable();
                roots.dedup();
                roots.into_iter().map(|root| (root, size_of(world, root))).collect::<Vec<_>>()
            };
            let updates = |(n, port): &(NodeId, usize)| {
                *n != node
                    && place.contains_key(n)
                    && world.expect::<OpRef>(*n).0.updates().iter().any(|u| u.1 == *port)
            };
            let readers = outputs.iter().flat_map(|v| world.consumers(*v)).filter(|(n, _)| place.contains_key(n));
            let updaters = inputs.iter().flat_map(|v| world.consumers(*v)).filter(updates);
            let later: Vec<usize> = readers.chain(updaters).map(|(n, _)| place[&n].min(update)).collect();
            let fixed = at >= update
                || later.is_empty()
                || !world.expect::<OpRef>(node).0.updates().is_empty()
                || outputs.iter().any(|v| super::simplify::is_output(world, *v));
            Facts { reads: roots(&inputs), makes: roots(&outputs), later, fixed }
        });
        Self { facts: facts.collect(), base: base.to_vec() }
    }

    /// The base with the late nodes sunk, and with `all` the others where that pays.
    fn order(&self, world: &World, all: bool) -> Vec<NodeId> {
        let mut turns: Vec<Turn> = (0..self.base.len()).map(|at| (at, true, at)).collect();
        // for each root, its users and those that make it
        let mut users: HashMap<ValueId, Vec<usize>> = HashMap::new();
        for (at, facts) in self.facts.iter().enumerate() {
            facts.reads.iter().chain(&facts.makes).for_each(|(root, _)| users.entry(*root).or_default().push(at));
        }
        for at in (0..self.base.len()).rev() {
            let facts = &self.facts[at];
            let late = world.get::<Late>(self.base[at]).is_some();
            if facts.fixed || !(all || late) {
                continue;
            }
            // an update has one place, whoever waits for it
            let to = facts.later.iter().map(|&n| turns.get(n).map_or(n, |t| t.0)).min().expect("it has a reader");
            let turn = (to, false, at);
            if to <= at {
                continue;
            }
            let others = |root: &ValueId| users[root].iter().filter(|u| **u != at).map(|u| turns[*u]);
            let first = |m: &&(ValueId, usize)| !others(&m.0).any(|t| t < turn);
            let extended = |r: &&(ValueId, usize)| !others(&r.0).any(|t| t > turn);
            let saved: usize = facts.makes.iter().filter(first).map(|m| m.1).sum();
            let cost: usize = facts.reads.iter().filter(extended).map(|r| r.1).sum();
            if late || saved > cost {
                turns[at] = turn;
            }
        }
        let mut order: Vec<usize> = (0..self.base.len()).collect();
        order.sort_unstable_by_key(|&at| turns[at]);
        order.into_iter().map(|at| self.base[at]).collect()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::build::{add_op, add_source};
    use crate::builtin::{Elementwise, SumTo, sum};
    use crate::components::Outputs;
    use crate::types::TensorType;

    /// `wide` is made first and read last; a chain of `others` takes memory meanwhile.
    fn waiting(shape: &[usize], others: usize) -> Vec<String> {
        let mut world = World::new();
        let x = add_source(&mut world, "x", TensorType::f32(shape.to_vec()), Role::Input);
        let mut emit = |name: &str, op: Arc<dyn crate::op::Op>, inputs: &[ValueId]| {
            add_op(&mut world, name, None, op, inputs, Role::Activation, Phase::Step).unwrap()[0]
        };
        let wide = emit("wide", Arc::new(Elementwise::of(1, |b, x| b.exp(x[0]))), &[x]);
        let mut last = x;
        for i in 0..others {
            last = emit(&format!("chain {i}"), Arc::new(Elementwise::of(1, |b, x| b.tanh(x[0]))), &[last]);
        }
        let total = emit("total", Arc::new(SumTo { shape: vec![] }), &[last]);
        let end = emit("end", Arc::new(sum(2)), &[wide, total]);
        world.set_resource(Outputs([("end".to_string(), end)].into()));
        order(&mut world).unwrap();
        let order = &world.resource::<Order>().unwrap().0;
        order.iter().map(|n| world.expect::<Name>(*n).0.clone()).collect()
    }

    #[test]
    fn a_node_sinks_to_its_reader() {
        assert_eq!(waiting(&[64, 64], 2), ["chain 0", "chain 1", "total", "wide", "end"]);
    }

    /// Where nothing is gained, the order of creation stays.
    #[test]
    fn the_order_of_creation_is_the_base() {
        assert_eq!(waiting(&[64, 64], 0), ["wide", "total", "end"]);
    }
}
