//! `fuse`: chains, trees and siblings of elementwise nodes become one node, which goes over memory once.
//!
//! Reads the topology, `OpRef`, `TensorType`, `Phase`, `Role`; the resource `Outputs`. Writes the topology and
//! `OpRef`.
//!
//! A producer joins its consumer if both have one shape (so that dropout masks, which depend on an element's index,
//! stay the same) and
//! - nobody else reads its result: the result is never stored; or
//! - others do, but the consumer is ready as soon as the producer is: the result is one more output; or
//! - the consumer reads the producer's inputs anyway: it computes the result again.
//!
//! Nodes without a path between them join if one reads nothing that the other does not, and the later one is ready
//! when the earlier one runs. Every number stays the same bit for bit: the operations are those of the separate
//! programs.

use std::collections::HashMap;
use std::sync::Arc;

use dataflow_kernels::cpu::interpreter::{MAX_INPUTS, MAX_MASKS, MAX_OUTPUTS};
use dataflow_kernels::expression::{Instruction, Program};

use crate::builtin::Elementwise;
use crate::components::{OpRef, Role};
use crate::diagnostic::{Diagnostic, Errors};
use crate::op::OpError;
use crate::types::TensorType;
use crate::world::{NodeId, ValueId, World};

use super::contract::{Positions, movable, replace};
use super::simplify::is_output;

/// Most instructions of a program: beyond, its intermediate results leave the first cache.
const MAX_INSTRUCTIONS: usize = 200;
/// Most floating-point operations for an element that are worth a read saved: about what a core does meanwhile.
const CHEAP: usize = 16;

/// See the [module](self).
///
/// # Errors
/// None for ops that keep their contracts.
pub fn fuse(world: &mut World) -> Result<(), Errors> {
    let mut positions = Positions::new(world);
    for node in positions.order() {
        while part(world, node).is_some() && fuse_producer(world, &mut positions, node).map_err(bug)? {}
    }
    // siblings read one value
    for node in positions.order() {
        while part(world, node).is_some() && fuse_sibling(world, &mut positions, node).map_err(bug)? {}
    }
    Ok(())
}

fn bug(error: OpError) -> Errors {
    Diagnostic::new(error.0).into()
}

/// An elementwise node.
pub(super) struct Part {
    pub node: NodeId,
    pub program: Program,
    pub inputs: Vec<ValueId>,
    pub outputs: Vec<ValueId>,
    pub tensor: TensorType,
    pub role: Role,
}

/// The node's program, if it has one and may be fused.
pub(super) fn part(world: &World, node: NodeId) -> Option<Part> {
    let op = world.get::<OpRef>(node)?.0.clone();
    let mut inputs = world.inputs(node);
    let program = op.expression(inputs.len())?;
    let outputs = world.outputs(node);
    if !movable(world, node) || inputs.len() != program.inputs() + usize::from(op.uses_step()) {
        return None;
    }
    inputs.truncate(program.inputs());
    let tensor = world.expect::<TensorType>(*outputs.first()?).clone();
    let role = *world.expect::<Role>(outputs[0]);
    Some(Part { node, program, inputs, outputs, tensor, role })
}

/// Two parts in one program; inputs that both read are read once, and the second reads results of the first.
fn compose(first: &Part, second: &Part, outputs: &[ValueId]) -> Option<(Elementwise, Vec<ValueId>)> {
    let mut inputs = first.inputs.clone();
    inputs.extend(second.inputs.iter().filter(|v| !first.outputs.contains(v)));
    inputs.sort_unstable();
    inputs.dedup();
    let program = Program::new(inputs.len(), |b, x| {
        let mut known: HashMap<ValueId, u32> = inputs.iter().copied().zip(x.iter().copied()).collect();
        for part in [first, second] {
            let arguments: Vec<u32> = part.inputs.iter().map(|v| known[v]).collect();
            let made = b.inline(&part.program, &arguments);
            known.extend(part.outputs.iter().copied().zip(made));
        }
        outputs.iter().map(|v| known[v]).collect()
    });
    let (op, used) = Elementwise::compact(program, first.tensor.shape.clone());
    let masks = op.program.instructions().iter().filter(|i| matches!(i, Instruction::Keep { .. })).count();
    let fits = op.program.inputs() <= MAX_INPUTS
        && op.program.outputs().len() <= MAX_OUTPUTS
        && masks <= MAX_MASKS
        && op.program.instructions().len() <= MAX_INSTRUCTIONS;
    fits.then(|| (op, used.into_iter().map(|i| inputs[i]).collect()))
}

/// Lets one of `node`'s producers join it; whether there was one.
fn fuse_producer(world: &mut World, positions: &mut Positions, node: NodeId) -> Result<bool, OpError> {
    let Some(second) = part(world, node) else { return Ok(false) };
    for value in &second.inputs {
        let Some(first) = world.producer(*value).and_then(|(n, _)| part(world, n)) else { continue };
        if first.tensor != second.tensor {
            continue;
        }
        let needed = |v: &ValueId| is_output(world, *v) || world.consumers(*v).iter().any(|c| c.0 != node);
        let kept: Vec<ValueId> = first.outputs.iter().copied().filter(needed).collect();
        let others: Vec<ValueId> = second.inputs.iter().copied().filter(|v| !first.outputs.contains(v)).collect();
        let early = positions.ready(world, &others, first.node);
        let join =
            first.role == second.role && (kept.is_empty() || early) && !positions.detour(world, first.node, node);
        if join {
            let mut outputs = second.outputs.clone();
            outputs.extend(kept);
            let Some((op, inputs)) = compose(&first, &second, &outputs) else { continue };
            let (keep, gone) = if early { (first.node, node) } else { (node, first.node) };
            let name = world.get::<crate::components::Name>(node).cloned();
            replace(world, keep, gone, Arc::new(op), &inputs, &outputs)?;
            if let Some(name) = name {
                world.set(keep, name);
            }
            positions.update(world, keep);
            // the other node's turn comes, or came: go on with this one at once
            return fuse_producer(world, positions, keep).map(|_| true);
        }
        let again = !first.program.is_random()
            && first.program.flops() <= CHEAP
            && first.inputs.iter().all(|v| second.inputs.contains(v));
        if again && let Some((op, inputs)) = compose(&first, &second, &second.outputs) {
            world.set_inputs(node, &inputs);
            crate::build::finish(world, node, &op);
            world.set(node, OpRef(Arc::new(op)));
            if first.outputs.iter().all(|v| !is_output(world, *v) && world.consumers(*v).is_empty()) {
                world.remove_node(first.node);
            }
            return Ok(true);
        }
    }
    Ok(false)
}

/// Lets a later node that reads what `node` does join it; whether there was one.
fn fuse_sibling(world: &mut World, positions: &mut Positions, node: NodeId) -> Result<bool, OpError> {
    let Some(first) = part(world, node) else { return Ok(false) };
    let mut near: Vec<NodeId> =
        first.inputs.iter().flat_map(|v| world.consumers(*v)).map(|c| c.0).filter(|n| *n != node).collect();
    near.sort_unstable_by_key(|n| positions.of(*n));
    near.dedup();
    for other in near {
        let Some(second) = part(world, other) else { continue };
        let within = |a: &Part, b: &Part| a.inputs.iter().all(|v| b.inputs.contains(v));
        let join = first.tensor == second.tensor
            && first.role == second.role
            && positions.of(node) < positions.of(other)
            && (within(&first, &second) || within(&second, &first))
            && positions.ready(world, &second.inputs, node)
            && !second.inputs.iter().any(|v| first.outputs.contains(v));
        if !join || positions.detour(world, node, other) {
            continue;
        }
        let outputs: Vec<ValueId> = first.outputs.iter().chain(&second.outputs).copied().collect();
        let Some((op, inputs)) = compose(&first, &second, &outputs) else { continue };
        replace(world, node, other, Arc::new(op), &inputs, &outputs)?;
        positions.update(world, node);
        return Ok(true);
    }
    Ok(false)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::build::{add_op, add_source};
    use crate::components::{Outputs, Phase};
    use crate::systems::simplify::simplify;

    fn program(inputs: usize, form: fn(&mut dataflow_kernels::expression::Builder, &[u32]) -> u32) -> Elementwise {
        Elementwise { program: Program::new(inputs, |b, x| vec![form(b, x)]), shape: None }
    }

    fn emit(world: &mut World, op: Elementwise, inputs: &[ValueId]) -> ValueId {
        add_op(world, "n", None, Arc::new(op), inputs, Role::Activation, Phase::Step).unwrap()[0]
    }

    fn world(shapes: &[&[usize]]) -> (World, Vec<ValueId>) {
        let mut world = World::new();
        let source = |s: &&[usize]| add_source(&mut world, "x", TensorType::f32(s.to_vec()), Role::Input);
        let sources = shapes.iter().map(source).collect();
        (world, sources)
    }

    /// The programs that are left when these values are wanted, as text, with the numbers of their outputs.
    fn fused(mut world: World, wanted: &[ValueId]) -> Vec<(String, usize)> {
        let names = wanted.iter().enumerate().map(|(i, v)| (i.to_string(), *v)).collect();
        world.set_resource(Outputs(names));
        simplify(&mut world).unwrap();
        fuse(&mut world).unwrap();
        let order = world.topological().unwrap();
        let text = |n: &NodeId| part(&world, *n).expect("elementwise").program.to_string();
        order.iter().map(|n| (text(n), world.outputs(*n).len())).collect()
    }

    #[test]
    fn a_chain_with_a_broadcast_becomes_one_program() {
        let (mut world, x) = world(&[&[2, 3], &[3]]);
        let a = emit(&mut world, program(2, |b, x| b.mul(x[0], x[1])), &x);
        let c = emit(&mut world, program(1, |b, x| b.tanh(x[0])), &[a]);
        let d = emit(&mut world, program(2, |b, x| b.add(x[0], x[1])), &[c, x[0]]);
        let left = fused(world, &[d]);
        assert_eq!(left.len(), 1, "{left:?}");
        assert_eq!(left[0].1, 1);
    }

    #[test]
    fn shapes_that_differ_stay_apart() {
        let (mut world, x) = world(&[&[3], &[2, 3]]);
        let a = emit(&mut world, program(1, |b, x| b.exp(x[0])), &x[..1]);
        let c = emit(&mut world, program(2, |b, x| b.mul(x[0], x[1])), &[a, x[1]]);
        assert_eq!(fused(world, &[c]).len(), 2);
    }

    #[test]
    fn a_result_that_others_read_is_an_output_too() {
        let (mut world, x) = world(&[&[2, 3]]);
        let a = emit(&mut world, program(1, |b, x| b.exp(x[0])), &x);
        let c = emit(&mut world, program(1, |b, x| b.tanh(x[0])), &[a]);
        let left = fused(world, &[a, c]);
        assert_eq!((left.len(), left[0].1), (1, 2));
    }

    #[test]
    fn siblings_become_one() {
        let (mut world, x) = world(&[&[2, 3], &[2, 3]]);
        let a = emit(&mut world, program(2, |b, x| b.mul(x[0], x[1])), &x);
        let c = emit(&mut world, program(2, |b, x| b.sub(x[1], x[0])), &x);
        let left = fused(world, &[a, c]);
        assert_eq!((left.len(), left[0].1), (1, 2));
    }

    #[test]
    fn a_detour_keeps_nodes_apart() {
        let (mut world, x) = world(&[&[2, 3]]);
        let a = emit(&mut world, program(1, |b, x| b.exp(x[0])), &x);
        let sum = Arc::new(crate::builtin::SumTo { shape: vec![3] });
        let s = add_op(&mut world, "s", None, sum, &[a], Role::Activation, Phase::Step).unwrap()[0];
        let c = emit(&mut world, program(2, |b, x| b.mul(x[0], x[1])), &[a, s]);
        let names = [("y".to_string(), c)].into();
        world.set_resource(Outputs(names));
        fuse(&mut world).unwrap();
        // exp, its sum, and the product, which may not wait for itself
        assert_eq!(world.nodes().len(), 3);
        assert_eq!(world.topological().unwrap().len(), 3);
    }

    #[test]
    fn dropout_keeps_its_mask_and_its_counter() {
        let (mut world, x) = world(&[&[2, 3]]);
        let a = emit(&mut world, program(1, |b, x| b.dropout(x[0], 7, 0.5)), &x);
        let c = emit(&mut world, program(2, |b, x| b.add(x[0], x[1])), &[a, x[0]]);
        world.set_resource(Outputs([("y".to_string(), c)].into()));
        fuse(&mut world).unwrap();
        let nodes = world.nodes();
        assert_eq!(nodes.len(), 1);
        let inputs = world.inputs(nodes[0]);
        assert_eq!(inputs.len(), 2);
        assert_eq!(*world.expect::<Role>(inputs[1]), Role::State);
        let part = part(&world, nodes[0]).unwrap();
        assert!(part.program.instructions().iter().any(|i| matches!(i, Instruction::Keep { site: 7, .. })));
    }
}
