//! `epilogue`: an elementwise node that reads the result of a matrix product is computed by the product's launch, a part of
//! the result at a time, while that is in the cache ([`Op::with_epilogue`](crate::op::Op::with_epilogue)).
//!
//! Runs behind `fuse`, so that such a node is a whole chain: activation, gate, their gradients, a sum with a residual.
//! Where others read the product's result too (the backward pass, usually), it is one more output. A sum over
//! micro-batches is an epilogue as well. Every number stays the same bit for bit: the program sees the same results.
//!
//! For the processor alone: on a GPU the products are a library's.
//!
//! Reads the topology, `OpRef`, `TensorType`, `Phase`, `Role`, `Alias`; the resources `Options` and `Outputs`. Writes the topology and
//! `OpRef`.

use dataflow_kernels::cpu::interpreter::{MAX_INPUTS, MAX_OUTPUTS};

use crate::builtin::{Accumulate, sum};
use crate::components::{Name, OpRef, Options, Role, Target};
use crate::diagnostic::{Diagnostic, Errors};
use crate::op::{Epilogue, OpError};
use crate::types::TensorType;
use crate::world::{NodeId, ValueId, World};

use super::contract::{Positions, movable, replace};
use super::fuse::part;
use super::simplify::{Alias, is_output};

/// See the [module](self).
///
/// # Errors
/// None for ops that keep their contracts.
pub fn epilogue(world: &mut World) -> Result<(), Errors> {
    if world.resource::<Options>().is_some_and(|o| o.target != Target::Cpu) {
        return Ok(());
    }
    let mut positions = Positions::new(world);
    for node in positions.order() {
        if world.get::<OpRef>(node).is_some() {
            attach(world, &mut positions, node).map_err(|e| Errors::from(Diagnostic::new(e.0)))?;
        }
    }
    Ok(())
}

/// What an elementwise node does: its program, inputs without a step counter, and outputs.
struct Chain {
    epilogue: Epilogue,
    inputs: Vec<ValueId>,
    outputs: Vec<ValueId>,
    role: Role,
}

fn chain(world: &World, node: NodeId) -> Option<Chain> {
    if world.expect::<OpRef>(node).0.downcast::<Accumulate>().is_some() {
        let (inputs, outputs) = (world.inputs(node), world.outputs(node));
        let role = *world.expect::<Role>(inputs[1]);
        let epilogue = Epilogue { program: sum(2).program, result: 1, kept: false, updates: true };
        return Some(Chain { epilogue, inputs, outputs, role });
    }
    let part = part(world, node)?;
    let epilogue = Epilogue { program: part.program, result: 0, kept: false, updates: false };
    Some(Chain { epilogue, inputs: part.inputs, outputs: part.outputs, role: part.role })
}

/// Lets the product that makes one of `node`'s inputs compute it, if there is one that can: the one that is made last, as
/// the others are there by then.
fn attach(world: &mut World, positions: &mut Positions, node: NodeId) -> Result<(), OpError> {
    let Some(chain) = chain(world, node) else { return Ok(()) };
    let tensor = world.expect::<TensorType>(chain.outputs[0]).clone();
    let ports = if chain.epilogue.updates { 1..2 } else { 0..chain.inputs.len() };
    let mut products: Vec<(usize, NodeId)> = Vec::new();
    for port in ports {
        let value = chain.inputs[port];
        let Some((producer, _)) = world.producer(value) else { continue };
        let fits = world.outputs(producer).len() == 1
            && *world.expect::<TensorType>(value) == tensor
            && *world.expect::<Role>(value) == chain.role
            && chain.inputs.iter().filter(|v| **v == value).count() == 1
            && movable(world, producer)
            && !world.expect::<OpRef>(producer).0.uses_step()
            && !positions.detour(world, producer, node);
        if fits {
            products.push((port, producer));
        }
    }
    products.sort_unstable_by_key(|(_, producer)| std::cmp::Reverse(positions.of(*producer)));
    for (result, producer) in products {
        let value = chain.inputs[result];
        let kept = is_output(world, value) || world.consumers(value).len() > 1;
        let full = chain.inputs.len() > MAX_INPUTS || chain.outputs.len() + usize::from(kept) > MAX_OUTPUTS;
        if full || (kept && chain.epilogue.updates) || (!kept && world.get::<Alias>(value).is_some()) {
            continue;
        }
        let epilogue = Epilogue { result, kept, ..chain.epilogue.clone() };
        let Some(op) = world.expect::<OpRef>(producer).0.with_epilogue(epilogue) else { continue };
        let others: Vec<ValueId> = chain.inputs.iter().copied().filter(|v| *v != value).collect();
        let inputs: Vec<ValueId> = world.inputs(producer).into_iter().chain(others.iter().copied()).collect();
        let outputs: Vec<ValueId> = chain.outputs.iter().copied().chain(kept.then_some(value)).collect();
        let early = positions.ready(world, &others, producer);
        let (keep, gone) = if early { (producer, node) } else { (node, producer) };
        // a launch bears the name of the product, which is most of its work
        let name = world.expect::<Name>(producer).clone();
        world.set(keep, name);
        replace(world, keep, gone, op, &inputs, &outputs)?;
        positions.update(world, keep);
        return Ok(());
    }
    Ok(())
}
