//! `in_place`: nodes overwrite an input that they are the last to read.
//!
//! Reads the topology, the resources `Order` and `Outputs`, `OpRef`, `TensorType`, `Role`, `Alias`.
//! Writes `InPlace` of nodes and `Alias` of values.

use std::collections::{HashMap, HashSet};
use std::ops::Range;

use super::allocate::{locate, root_of};
use super::order::Order;
use super::simplify::{Alias, NoLaunch, is_output, is_updated, may_have_gaps};
use crate::components::{OpRef, Role};
use crate::diagnostic::Errors;
use crate::types::TensorType;
use crate::world::{NodeId, ValueId, World};

/// Of nodes: pairs (output, input) that are the same memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InPlace(pub Vec<(usize, usize)>);

/// Who touches the memory of a root value: the launch, and the columns.
type Touches = HashMap<ValueId, Vec<(usize, Range<usize>)>>;

/// See the [module](self).
///
/// # Errors
/// None.
pub fn in_place(world: &mut World) -> Result<(), Errors> {
    let order = world.resource::<Order>().expect("`order` ran").0.clone();
    let mut touches = Touches::new();
    let mut fixed: HashSet<ValueId> = HashSet::new();
    for (at, &node) in order.iter().enumerate() {
        let launched = world.get::<NoLaunch>(node).is_none();
        for value in world.inputs(node).into_iter().chain(world.outputs(node)) {
            let (root, columns) = columns(world, value);
            if launched {
                touches.entry(root).or_default().push((at, columns));
            }
            let role = world.expect::<Role>(value);
            let temporary = matches!(role, Role::Activation | Role::Gradient) && world.producer(root).is_some();
            if !temporary || is_output(world, value) || is_updated(world, value) {
                fixed.insert(root);
            }
        }
    }
    for (at, &node) in order.iter().enumerate() {
        let mut pairs = pairs(world, node, |value| {
            let (root, columns) = columns(world, value);
            let meets = |c: &Range<usize>| c.start < columns.end && columns.start < c.end;
            let here = touches[&root].iter().filter(|(a, c)| *a == at && meets(c)).count();
            here == 1 && !fixed.contains(&root) && !touches[&root].iter().any(|(a, c)| *a > at && meets(c))
        });
        pairs.retain(|(o, _)| !fixed.contains(&world.outputs(node)[*o]));
        for &(output, input) in &pairs {
            let (output, input) = (world.outputs(node)[output], world.inputs(node)[input]);
            let moved = touches.remove(&output).unwrap_or_default();
            world.set(output, Alias { of: input, column: 0 });
            let (root, columns) = columns(world, output);
            let moved = moved.into_iter().map(|(a, c)| (a, columns.start + c.start..columns.start + c.end));
            touches.entry(root).or_default().extend(moved);
        }
        if !pairs.is_empty() {
            world.set(node, InPlace(pairs));
        }
    }
    Ok(())
}

/// Takes back what [`in_place`] decided.
pub(super) fn undo(world: &mut World) {
    for node in world.nodes() {
        for (output, _) in world.take::<InPlace>(node).map_or_else(Vec::new, |pairs| pairs.0) {
            let output = world.outputs(node)[output];
            world.take::<Alias>(output);
        }
    }
}

/// The root of a value and its columns there.
fn columns(world: &World, value: ValueId) -> (ValueId, Range<usize>) {
    let (root, column, _) = locate(world, value);
    (root, column..column + world.expect::<TensorType>(value).cols())
}

/// What `node` may overwrite, given which of its inputs nobody reads afterwards.
fn pairs(world: &World, node: NodeId, free: impl Fn(ValueId) -> bool) -> Vec<(usize, usize)> {
    let op = &world.expect::<OpRef>(node).0;
    if !op.updates().is_empty() || world.get::<NoLaunch>(node).is_some() {
        return Vec::new();
    }
    let (inputs, outputs) = (world.inputs(node), world.outputs(node));
    let any = op.expression(inputs.len()).is_some();
    let allowed = op.in_place();
    let mut pairs: Vec<(usize, usize)> = Vec::new();
    for (o, &output) in outputs.iter().enumerate() {
        if world.get::<Alias>(output).is_some() || is_output(world, output) {
            continue;
        }
        let tensor = world.expect::<TensorType>(output);
        // a part of a wider value leaves gaps that every reader must be able to follow
        let fits = |value: ValueId| {
            let root = world.expect::<TensorType>(root_of(world, value));
            root == tensor || (root.rows() == tensor.rows() && may_have_gaps(world, output))
        };
        let found = (0..inputs.len()).find(|&i| {
            (any || allowed.contains(&(o, i)))
                && !pairs.iter().any(|p| p.1 == i)
                && world.expect::<TensorType>(inputs[i]) == tensor
                && fits(inputs[i])
                && free(inputs[i])
        });
        pairs.extend(found.map(|i| (o, i)));
    }
    pairs
}
