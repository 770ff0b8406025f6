//! `merge`: neighbours that have a kernel in common become one node, where one of their ops knows how
//! ([`Op::merge`](crate::op::Op::merge)): residual sums and norms, scans and gates, the head and the loss.
//!
//! Runs before `differentiate`, so that the gradient is that of the merged op, and once more behind `update` as
//! `merge_gradients` for what the backward pass brings.
//!
//! Reads the topology, `OpRef`, `TensorType`, `Phase`, `Role`; the resources `Options`, `Outputs`. Writes the
//! topology and `OpRef`.

use crate::build::types_of;
use crate::components::{Name, OpRef, Options};
use crate::diagnostic::{Diagnostic, Errors};
use crate::op::{Merged, Of, OpError, Pair};
use crate::world::{NodeId, ValueId, World};

use super::contract::{Positions, movable, replace};
use super::simplify::is_output;

/// See the [module](self).
///
/// # Errors
/// A merged op whose shape rule does not give what it stands for: a bug of the op.
pub fn merge(world: &mut World) -> Result<(), Errors> {
    let Some(options) = world.resource::<Options>().cloned() else { return Ok(()) };
    let mut positions = Positions::new(world);
    for node in positions.order() {
        // a node that was merged into another is gone
        while world.get::<OpRef>(node).is_some()
            && merge_into(world, &mut positions, node, &options).map_err(|e| Errors::from(Diagnostic::new(e.0)))?
        {
        }
    }
    Ok(())
}

/// Merges one of the producers of `node`'s inputs into it; whether there was one. Later inputs first: in a sum of
/// gradients it is the one that is made last that can add the others.
fn merge_into(world: &mut World, positions: &mut Positions, node: NodeId, options: &Options) -> Result<bool, OpError> {
    let inputs = world.inputs(node);
    for (port, &value) in inputs.iter().enumerate().rev() {
        let Some((producer, output)) = world.producer(value) else { continue };
        let once = inputs.iter().filter(|v| **v == value).count() == 1;
        if !once || !movable(world, node) || !movable(world, producer) {
            continue;
        }
        let (first, second) = (world.expect::<OpRef>(producer).0.clone(), world.expect::<OpRef>(node).0.clone());
        let pair = Pair {
            producer: &*first,
            consumer: &*second,
            output,
            input: port,
            producer_inputs: &types_of(world, &world.inputs(producer)),
            consumer_inputs: &types_of(world, &inputs),
            shared: world.consumers(value).len() > 1 || is_output(world, value),
            options,
        };
        let (merged, name) = match second.merge(&pair) {
            Some(merged) => (merged, None),
            None => match first.merge(&pair) {
                Some(merged) => (merged, Some(world.expect::<Name>(producer).clone())),
                None => continue,
            },
        };
        let Merged { op, inputs: wanted, outputs: given } = merged;
        let outputs_of = |of: &Of| match *of {
            Of::Producer(o) => world.outputs(producer)[o],
            Of::Consumer(o) => world.outputs(node)[o],
        };
        let given: Vec<ValueId> = given.iter().map(outputs_of).collect();
        let read_elsewhere = |v: &ValueId| is_output(world, *v) || world.consumers(*v).iter().any(|c| c.0 != node);
        let lost = |v: &ValueId| read_elsewhere(v) && !given.contains(v);
        if world.outputs(producer).iter().chain(&world.outputs(node)).any(lost)
            || positions.detour(world, producer, node)
        {
            continue;
        }
        let inputs_of = |of: &Of| match *of {
            Of::Producer(i) => world.inputs(producer)[i],
            Of::Consumer(i) => world.inputs(node)[i],
        };
        let wanted: Vec<ValueId> = wanted.iter().map(inputs_of).collect();
        // where all is there already, the node runs in the producer's place, and frees what it reads early
        let others: Vec<ValueId> = inputs.iter().copied().filter(|v| *v != value).collect();
        let early = positions.ready(world, &others, producer);
        let (keep, gone) = if early { (producer, node) } else { (node, producer) };
        let name = name.unwrap_or_else(|| world.expect::<Name>(node).clone());
        world.set(keep, name);
        replace(world, keep, gone, op, &wanted, &given)?;
        positions.update(world, keep);
        return Ok(true);
    }
    Ok(false)
}
