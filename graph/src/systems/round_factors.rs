//! `round_factors`, the part of [`mixed_precision`](super::mixed_precision) for the processor: activations and gradients
//! that nothing reads but matrix products are stored in `bf16`, as the products would round them in any case.
//!
//! Their numbers stay the same, and half of the bytes go to memory and come back, twice for most of them. What other ops read
//! stays `f32`: a conversion of its own would cost what it saves.
//!
//! Reads the topology, `OpRef`, `Phase`, `Role`, `TensorType`, `Alias`; writes `TensorType` of values.

use std::collections::BTreeMap;

use crate::components::{OpRef, Phase, Role};
use crate::types::{DType, TensorType};
use crate::world::{NodeId, ValueId, World};

use super::allocate::root_of;
use super::simplify::{NoLaunch, is_output, is_updated};

/// See the [module](self).
pub(super) fn round_factors(world: &mut World) {
    // the values that share memory change together
    let mut groups: BTreeMap<ValueId, Vec<ValueId>> = BTreeMap::new();
    for value in world.values() {
        groups.entry(root_of(world, value)).or_default().push(value);
    }
    for group in groups.into_values() {
        if group.iter().all(|v| can_be_rounded(world, *v)) && group.iter().any(|v| !readers(world, *v).is_empty()) {
            for value in group {
                let tensor = world.expect::<TensorType>(value).clone();
                world.set(value, TensorType { dtype: DType::Bf16, ..tensor });
            }
        }
    }
}

fn can_be_rounded(world: &World, value: ValueId) -> bool {
    let Some((producer, port)) = world.producer(value) else { return false };
    matches!(world.expect::<Role>(value), Role::Activation | Role::Gradient)
        && world.expect::<TensorType>(value).dtype == DType::F32
        && *world.expect::<Phase>(producer) == Phase::Step
        && !is_output(world, value)
        && !is_updated(world, value)
        && (world.get::<NoLaunch>(producer).is_some() || makes_rounded(world, producer, port))
        && readers(world, value).into_iter().all(|(reader, port)| takes_rounded(world, reader, port))
}

/// What is launched and reads a value.
fn readers(world: &World, value: ValueId) -> Vec<(NodeId, usize)> {
    let launched = |node: NodeId| world.get::<NoLaunch>(node).is_none();
    world.consumers(value).into_iter().filter(|(node, _)| launched(*node)).collect()
}

fn makes_rounded(world: &World, node: NodeId, port: usize) -> bool {
    let (op, inputs) = (&world.expect::<OpRef>(node).0, world.inputs(node).len());
    let elementwise = op.updates().is_empty() && op.expression(inputs).is_some();
    elementwise || op.rounds(inputs).outputs.contains(&port)
}

fn takes_rounded(world: &World, node: NodeId, port: usize) -> bool {
    let op = &world.expect::<OpRef>(node).0;
    *world.expect::<Phase>(node) == Phase::Step && op.rounds(world.inputs(node).len()).inputs.contains(&port)
}
