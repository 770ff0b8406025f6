//! `rematerialize`: activations that are cheap to make again are not kept for the backward pass, until the plan fits
//! the memory budget.
//!
//! Reads the topology, `OpRef`, `TensorType`, `Role`, `Phase`, `Alias`; the resources `MemoryBudget` and `Without`.
//! Writes nodes that compute once more what others computed, marked as `Late`, and the resource `Rematerialized`.
//!
//! The plan is laid out as it stands. Where its live set is largest, some values only wait there for a later reader: the
//! node that made one can run again right before that reader (which is where `order` puts it), or only there if nobody
//! reads the value earlier, and the memory is free meanwhile. A node's price is its FLOPs for each byte that this saves, less what it must keep alive instead. The cheapest
//! nodes of one price, which are usually the same row of all layers, are recomputed together; the plan is laid out again,
//! and so on, until it fits; of the last such group only as many nodes are recomputed as it takes. None of these choices
//! depends on the budget, so a smaller budget means the same and more. Every number stays the same bit for bit: the
//! same kernels run on the same inputs.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use super::allocate::{Layout, allocate, lives, root_of, size_of};
use super::in_place::{in_place, undo};
use super::order::{Order, order};
use super::simplify::{Alias, NoLaunch, is_output, is_updated};
use crate::build::types_of;
use crate::components::{MemoryBudget, Name, OpRef, Options, Phase, Place, Precision, Role};
use crate::diagnostic::{Diagnostic, Errors};
use crate::op::{NodeView, Op, Slot};
use crate::schedule::Without;
use crate::types::TensorType;
use crate::world::{NodeId, ValueId, World};

/// Of nodes: they run as late as possible.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Late;

/// Of nodes: all readers read a later copy, so that they need not run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Unread;

/// Of values: they are made again later.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Copied;

/// Resource: what recomputation bought.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Rematerialized {
    /// Launches that compute again.
    pub launches: usize,
    /// Their floating-point operations.
    pub flops: f64,
    /// Bytes of the arena without them.
    pub arena_before: usize,
}

/// Prices that differ by less belong to one group.
const SAME_PRICE: f64 = 1.01;

/// See the [module](self).
///
/// # Errors
/// A budget that cannot be met, with the smallest one that can.
pub fn rematerialize(world: &mut World) -> Result<(), Errors> {
    let Some(MemoryBudget(budget)) = world.resource().copied() else { return Ok(()) };
    let mut layout = lay_out(world)?;
    let mut search = Search::default();
    let mut bought = Rematerialized { arena_before: layout.bytes[0], ..Rematerialized::default() };
    while layout.bytes[0] > budget {
        let group = search.cheapest(world, peak(&layout));
        if group.is_empty() {
            let smallest = layout.bytes[0];
            return Err(Diagnostic::new(format!(
                "a memory budget of {budget} bytes cannot be met; the smallest that can is {smallest}"
            ))
            .help("the budget is for activations and gradients; a smaller batch or shorter sequences need less")
            .into());
        }
        let order = world.resource::<Order>().cloned().expect("`lay_out` ran");
        search.apply(world, &group);
        let smaller = lay_out(world)?;
        if smaller.bytes[0] >= layout.bytes[0] {
            search.undo(world, group.len());
            search.refused.extend(group.iter().map(|c| (c.node, c.part)));
            mark_unread(world);
            world.set_resource(order);
            continue;
        }
        if smaller.bytes[0] > budget {
            layout = smaller;
            continue;
        }
        // as few of the last group as it takes
        let (mut few, mut many) = (1, group.len());
        let mut applied = many;
        while few < many {
            let middle = few.midpoint(many);
            search.undo(world, applied);
            search.apply(world, &group[..middle]);
            applied = middle;
            if lay_out(world)?.bytes[0] <= budget { many = middle } else { few = middle + 1 }
        }
        search.undo(world, applied);
        search.apply(world, &group[..many]);
        break;
    }
    mark_unread(world);
    for node in world.nodes().into_iter().rev().filter(|n| world.get::<Unread>(*n).is_some()).collect::<Vec<_>>() {
        world.remove_node(node);
    }
    for applied in search.applied.iter().filter(|a| !a.made.is_empty()) {
        bought.launches += 1;
        bought.flops += applied.flops;
    }
    world.set_resource(bought);
    Ok(())
}

/// The layout of the plan as it stands; leaves `Order` as a trace, and no decision of `in_place`.
fn lay_out(world: &mut World) -> Result<Layout, Errors> {
    mark_unread(world);
    order(world)?;
    if !world.resource::<Without>().is_some_and(|w| w.0.iter().any(|name| name == "in_place")) {
        in_place(world)?;
    }
    allocate(world)?;
    undo(world);
    Ok(world.resource::<Layout>().expect("`allocate` ran").clone())
}

/// Marks nodes whose results nobody reads since they are made again later, and their views.
fn mark_unread(world: &mut World) {
    for node in world.nodes() {
        world.take::<Unread>(node);
    }
    for node in world.nodes().into_iter().rev() {
        let copied = world.outputs(node).iter().any(|v| world.get::<Copied>(*v).is_some());
        let unread = |v: &ValueId| users(world, *v).is_empty() && !is_output(world, *v);
        if copied && world.outputs(node).iter().all(unread) {
            world.set(node, Unread);
        }
    }
}

/// The place in the launch order at which most is alive.
fn peak(layout: &Layout) -> usize {
    super::allocate::live_peak(&layout.arena).1
}

/// A node that may run again.
#[derive(Clone)]
struct Candidate {
    node: NodeId,
    /// Whether only some outputs are made, from others ([`Op::recompute`]).
    part: bool,
    op: Arc<dyn Op>,
    inputs: Vec<ValueId>,
    /// For each output of `op`, the value that it is.
    outputs: Vec<ValueId>,
    /// The readers that come later, of the outputs and of views of them.
    readers: HashSet<NodeId>,
    /// Whether nobody reads it earlier, so that it runs later instead of again.
    moves: bool,
    flops: f64,
    price: f64,
    /// Values that must still be there.
    needs: HashSet<ValueId>,
}

/// A candidate that was taken, with what it takes to undo that.
struct Applied {
    node: NodeId,
    /// What only runs later: the node itself, and those of its views.
    late: Vec<NodeId>,
    made: Vec<NodeId>,
    /// Node, port, and the value that it read before.
    moved: Vec<(NodeId, usize, ValueId)>,
    replaced: Vec<(ValueId, Option<ValueId>)>,
    flops: f64,
}

#[derive(Default)]
struct Search {
    applied: Vec<Applied>,
    /// Where a value was recomputed: its later copy.
    latest: HashMap<ValueId, ValueId>,
    refused: HashSet<(NodeId, bool)>,
}

/// Facts about the plan as it stands.
struct Situation<'w> {
    world: &'w World,
    place: HashMap<NodeId, usize>,
    /// The last use of each root in the arena.
    last: HashMap<ValueId, usize>,
    peak: usize,
    seed: u64,
}

impl Search {
    /// The nodes of the lowest price, in launch order; none of them reads what another one makes.
    fn cheapest(&self, world: &World, peak: usize) -> Vec<Candidate> {
        let order = &world.resource::<Order>().expect("`lay_out` ran").0;
        let place = order.iter().enumerate().map(|(at, node)| (*node, at)).collect();
        let last = lives(world, order).into_iter().map(|life| (life.value, life.last)).collect();
        let seed = world.resource::<Options>().map_or(0, |o| o.seed);
        let situation = Situation { world, place, last, peak, seed };
        let done: HashSet<NodeId> = self.applied.iter().map(|a| a.node).collect();
        let mut candidates = Vec::new();
        for &node in &order[..peak.min(order.len())] {
            let fit = *world.expect::<Phase>(node) == Phase::Step
                && world.get::<NoLaunch>(node).is_none()
                && world.get::<Late>(node).is_none()
                && world.expect::<OpRef>(node).0.updates().is_empty()
                && !done.contains(&node);
            if !fit {
                continue;
            }
            let variants = [false, true].into_iter().filter(|part| !self.refused.contains(&(node, *part)));
            let cheaper = |a: &Candidate, b: &Candidate| a.price.total_cmp(&b.price);
            candidates.extend(variants.filter_map(|part| self.candidate(&situation, node, part)).min_by(cheaper));
        }
        let lowest = candidates.iter().map(|c| c.price).fold(f64::INFINITY, f64::min);
        candidates.retain(|c| c.price <= lowest * SAME_PRICE);
        let mut group: Vec<Candidate> = Vec::new();
        for candidate in candidates {
            let apart = |other: &Candidate| {
                !candidate.outputs.iter().any(|v| other.needs.contains(v))
                    && !other.outputs.iter().any(|v| candidate.needs.contains(v))
            };
            if group.iter().all(apart) {
                group.push(candidate);
            }
        }
        group
    }

    /// What it takes to run `node` again, if that saves memory.
    fn candidate(&self, s: &Situation<'_>, node: NodeId, part: bool) -> Option<Candidate> {
        let world = s.world;
        let (inputs, made) = (world.inputs(node), world.outputs(node));
        let own = |v: &ValueId| world.get::<Alias>(*v).is_none() && !is_output(world, *v) && !is_updated(world, *v);
        if !made.iter().all(own) {
            return None;
        }
        let whole = world.expect::<OpRef>(node).0.clone();
        let (op, inputs, outputs) = match part {
            false => (whole, inputs, made),
            true => {
                let part = whole.recompute()?;
                let value = |slot: &Slot| match *slot {
                    Slot::Input(i) => inputs[i],
                    Slot::Output(o) => made[o],
                };
                let outputs = part.outputs.iter().map(|&o| made[o]).collect();
                (part.op, part.inputs.iter().map(value).collect(), outputs)
            }
        };
        let mut readers = HashSet::new();
        let mut saved = 0;
        for &value in &outputs {
            let users = users(world, value);
            let late = users.iter().filter(|n| s.place[n] > s.peak);
            let busy = users.iter().any(|n| s.place[n] == s.peak);
            if late.clone().count() > 0 && !busy {
                saved += size_of(world, value);
            }
            readers.extend(late);
        }
        // what is read once more must live until then
        let inputs: Vec<ValueId> = inputs.into_iter().map(|v| self.latest.get(&v).copied().unwrap_or(v)).collect();
        let mut needs = HashSet::new();
        let mut cost = 0;
        for &input in &inputs {
            let root = root_of(world, input);
            if !matches!(world.expect::<Role>(root), Role::Activation | Role::Gradient) || !needs.insert(root) {
                continue;
            }
            let again = world.producer(root).is_some_and(|(n, _)| world.get::<Late>(n).is_some());
            if !again && s.last.get(&root).is_none_or(|last| *last < s.peak) {
                cost += size_of(world, root);
            }
        }
        if saved <= cost {
            return None;
        }
        let (input_types, output_types) = (types_of(world, &inputs), types_of(world, &outputs));
        let name = &world.expect::<Name>(node).0;
        let precision = Precision::default();
        let view = NodeView { name, inputs: &input_types, outputs: &output_types, seed: s.seed, precision };
        let early = |v: &ValueId| users(world, *v).iter().any(|n| s.place[n] <= s.peak);
        let moves = !part && !outputs.iter().any(early);
        let flops = if moves { 0.0 } else { op.cost(&view).flops };
        Some(Candidate {
            node,
            part,
            op,
            inputs,
            outputs,
            readers,
            moves,
            flops,
            // a launch that does no arithmetic moves memory all the same
            price: flops.max(1.0) / (saved - cost) as f64,
            needs,
        })
    }

    fn apply(&mut self, world: &mut World, group: &[Candidate]) {
        group.iter().for_each(|candidate| self.apply_one(world, candidate));
    }

    fn apply_one(&mut self, world: &mut World, candidate: &Candidate) {
        let Candidate { node, op, inputs, outputs, readers, flops, .. } = candidate;
        let mut applied = Applied {
            node: *node,
            late: Vec::new(),
            made: Vec::new(),
            moved: Vec::new(),
            replaced: Vec::new(),
            flops: *flops,
        };
        if candidate.moves {
            for (port, &input) in inputs.iter().enumerate() {
                let before = world.inputs(*node)[port];
                if before != input {
                    world.replace_input(*node, port, input);
                    applied.moved.push((*node, port, before));
                }
            }
            applied.late = outputs.iter().flat_map(|v| views(world, *v)).chain([*node]).collect();
            applied.late.iter().for_each(|n| world.set(*n, Late));
            self.applied.push(applied);
            return;
        }
        let copies = add_copy(world, *node, op.clone(), inputs, outputs);
        applied.made.push(copies.0);
        let pairs: Vec<_> = outputs.iter().copied().zip(copies.1).collect();
        for (value, copy) in pairs {
            self.redirect(world, value, copy, readers, &mut applied);
        }
        self.applied.push(applied);
    }

    /// Lets the late readers of `value`, and of views of it, read `copy`.
    fn redirect(
        &mut self,
        world: &mut World,
        value: ValueId,
        copy: ValueId,
        readers: &HashSet<NodeId>,
        applied: &mut Applied,
    ) {
        applied.replaced.push((value, self.latest.insert(value, copy)));
        world.set(value, Copied);
        for (node, port) in world.consumers(value) {
            if world.get::<NoLaunch>(node).is_some() {
                let views: Vec<ValueId> = world.outputs(node);
                let op = world.expect::<OpRef>(node).0.clone();
                let (view_node, view_copies) = add_copy(world, node, op, &[copy], &views);
                world.set(view_node, NoLaunch);
                applied.made.push(view_node);
                for (view, view_copy) in views.into_iter().zip(view_copies) {
                    let column = world.expect::<Alias>(view).column;
                    world.set(view_copy, Alias { of: copy, column });
                    self.redirect(world, view, view_copy, readers, applied);
                }
            } else if readers.contains(&node) {
                world.replace_input(node, port, copy);
                applied.moved.push((node, port, value));
            }
        }
    }

    /// Takes back the last `count` candidates.
    fn undo(&mut self, world: &mut World, count: usize) {
        for applied in self.applied.split_off(self.applied.len() - count).into_iter().rev() {
            for (node, port, value) in applied.moved.into_iter().rev() {
                world.replace_input(node, port, value);
            }
            for &node in &applied.late {
                world.take::<Late>(node);
            }
            for (value, before) in applied.replaced.into_iter().rev() {
                world.take::<Copied>(value);
                match before {
                    Some(before) => self.latest.insert(value, before),
                    None => self.latest.remove(&value),
                };
            }
            applied.made.into_iter().rev().for_each(|node| world.remove_node(node));
        }
    }
}

/// A marked node like `node`, with `op` on `inputs`, whose outputs are like `outputs`.
fn add_copy(
    world: &mut World,
    node: NodeId,
    op: Arc<dyn Op>,
    inputs: &[ValueId],
    outputs: &[ValueId],
) -> (NodeId, Vec<ValueId>) {
    let copy = world.add_node();
    let name = format!("{}.recomputed", world.expect::<Name>(node).0);
    if let Some(place) = world.get::<Place>(node).cloned() {
        world.set(copy, place);
    }
    world.set(copy, Name(name.clone()));
    if let Some(precision) = world.get::<Precision>(node).copied() {
        world.set(copy, precision);
    }
    world.set(copy, Phase::Step);
    world.set(copy, OpRef(op));
    world.set(copy, Late);
    inputs.iter().for_each(|&v| world.push_input(copy, v));
    let values = outputs.iter().enumerate().map(|(port, &like)| {
        let value = world.add_output(copy, port);
        let (tensor, role) = (world.expect::<TensorType>(like).clone(), *world.expect::<Role>(like));
        world.set(value, Name(name.clone()));
        world.set(value, tensor);
        world.set(value, role);
        value
    });
    let values = values.collect();
    (copy, values)
}

/// The launches that read a value or a view of it, but for those that are not needed.
fn users(world: &World, value: ValueId) -> Vec<NodeId> {
    let mut all = Vec::new();
    for (node, _) in world.consumers(value) {
        match world.get::<NoLaunch>(node) {
            Some(_) => all.extend(world.outputs(node).into_iter().flat_map(|v| users(world, v))),
            None if world.get::<Unread>(node).is_none() => all.push(node),
            None => {}
        }
    }
    all
}

/// The nodes that make views of a value.
fn views(world: &World, value: ValueId) -> Vec<NodeId> {
    let direct = world.consumers(value).into_iter().map(|(n, _)| n).filter(|n| world.get::<NoLaunch>(*n).is_some());
    direct
        .flat_map(|n| world.outputs(n).into_iter().flat_map(|v| views(world, v)).chain([n]).collect::<Vec<_>>())
        .collect()
}
