//! `mixed_precision`: matrix products take their factors in `bf16`, if that is wanted, and on a CUDA device activations
//! and their gradients are stored in it.
//!
//! Reads the topology, `OpRef`, `Phase`, `TensorType`, `Alias`; the resources `Precision`, `Options` and `Outputs`. Writes
//! `Precision` of nodes and `TensorType` of values; for a CUDA device nodes that convert, and there
//! [`align_products`](super::align_products) follows.
//!
//! On the processor the choice is one of nodes: a kernel rounds what enters a product. Values keep their types, but for those
//! that nothing but products read (`round_factors`). On a CUDA device the bytes of activations count as much as the products, so every op whose kernels take activations in `bf16`
//! ([`Op::activations`](crate::op::Op::activations)) gets them so. Parameters, their gradients, statistics, states and what
//! the host reads stay `f32`; a parameter that enters a product is rounded once a step. (Micikevicius et al. 2018,
//! <https://arxiv.org/abs/1710.03740>; `bf16` has the range of `f32`, so that no loss needs scaling.)

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use crate::build::add_op;
use crate::builtin::Cast;
use crate::components::{Name, OpRef, Options, Outputs, Phase, Precision, Role, Target};
use crate::diagnostic::{Diagnostic, Errors};
use crate::op::OpError;
use crate::types::{DType, TensorType};
use crate::world::{NodeId, ValueId, World};

use super::align_products::align_products;
use super::round_factors::round_factors;
use super::simplify::{Alias, is_output};

/// See the [module](self).
///
/// # Errors
/// None for ops that keep their contracts.
pub fn mixed_precision(world: &mut World) -> Result<(), Errors> {
    let wanted = world.resource::<Precision>().copied().unwrap_or_default();
    if wanted == Precision::F32 {
        return Ok(());
    }
    for node in world.nodes() {
        if world.expect::<OpRef>(node).0.products() {
            world.set(node, wanted);
        }
    }
    match world.resource::<Options>() {
        Some(Options { target: Target::Cpu, recurrent: None, .. }) => round_factors(world),
        Some(Options { target: Target::Cuda, recurrent: None, .. }) => narrow_activations(world)?,
        _ => {}
    }
    Ok(())
}

/// On a CUDA device: every op reads and writes `bf16` where its kernels do.
fn narrow_activations(world: &mut World) -> Result<(), Errors> {
    let order = world.topological().map_err(|_| Errors::from(Diagnostic::new("nodes wait for each other")))?;
    let mut conversions = Conversions::default();
    for node in order.into_iter().filter(|n| *world.expect::<Phase>(*n) == Phase::Step).collect::<Vec<_>>() {
        narrow(world, &mut conversions, node).map_err(|e| Errors::from(Diagnostic::new(e.0)))?;
    }
    align_products(world).map_err(|e| Errors::from(Diagnostic::new(e.0)))
}

/// Values in another type than the one they are made in.
#[derive(Default)]
struct Conversions(HashMap<(ValueId, DType), ValueId>);

impl Conversions {
    fn of(&mut self, world: &mut World, value: ValueId, to: DType) -> Result<ValueId, OpError> {
        if let Some(&converted) = self.0.get(&(value, to)) {
            return Ok(converted);
        }
        let name = format!("{}.{to}", world.expect::<Name>(value).0);
        let role = match world.expect::<Role>(value) {
            Role::Gradient => Role::Gradient,
            _ => Role::Activation,
        };
        let made = add_op(world, &name, None, Arc::new(Cast { to }), &[value], role, Phase::Step)?[0];
        self.0.insert((value, to), made);
        Ok(made)
    }
}

/// Lets a node read and write `bf16` where its kernels do.
fn narrow(world: &mut World, conversions: &mut Conversions, node: NodeId) -> Result<(), OpError> {
    let op = world.expect::<OpRef>(node).0.clone();
    let (inputs, outputs) = (world.inputs(node), world.outputs(node));
    let slots = op.activations(inputs.len());
    let (narrow_inputs, narrow_outputs): (BTreeSet<usize>, BTreeSet<usize>) =
        (slots.inputs.into_iter().collect(), slots.outputs.into_iter().collect());
    let any = takes_any(world, node);
    let mut narrowed = false;
    for (port, &value) in inputs.iter().enumerate() {
        let found = dtype(world, value);
        let wanted = match found {
            DType::I32 => DType::I32,
            found if any => found,
            _ if narrow_inputs.contains(&port) => DType::Bf16,
            _ => DType::F32,
        };
        narrowed |= wanted == DType::Bf16;
        if found != wanted {
            let converted = conversions.of(world, value, wanted)?;
            world.replace_input(node, port, converted);
            move_views(world, node, value, converted);
        }
    }
    for (port, &value) in outputs.iter().enumerate() {
        let wanted = match any {
            true => narrowed && !is_output(world, value) && wanted_narrow(world, value),
            false => narrow_outputs.contains(&port) && dtype(world, value) == DType::F32,
        };
        if !wanted {
            continue;
        }
        let tensor = world.expect::<TensorType>(value).clone();
        world.set(value, TensorType { dtype: DType::Bf16, ..tensor });
        if is_output(world, value) {
            let wide = conversions.of(world, value, DType::F32)?;
            let outputs = world.resource_mut::<Outputs>().expect("it has this one");
            outputs.0.values_mut().filter(|v| **v == value).for_each(|v| *v = wide);
        }
    }
    Ok(())
}

/// Whether each tensor of the node may be of any type.
fn takes_any(world: &World, node: NodeId) -> bool {
    let op = &world.expect::<OpRef>(node).0;
    op.updates().is_empty() && op.expression(world.inputs(node).len()).is_some()
}

fn dtype(world: &World, value: ValueId) -> DType {
    world.expect::<TensorType>(value).dtype
}

/// Whether somebody reads the value in `bf16` or does not care.
fn wanted_narrow(world: &World, value: ValueId) -> bool {
    world.consumers(value).into_iter().any(|(reader, port)| {
        let slots = world.expect::<OpRef>(reader).0.activations(world.inputs(reader).len());
        slots.inputs.contains(&port) || takes_any(world, reader)
    })
}

/// `node` reads `new` in place of `old`: if it only moves data, its views are parts of the new value, or the new one is part
/// of what it makes.
fn move_views(world: &mut World, node: NodeId, old: ValueId, new: ValueId) {
    let outputs = world.outputs(node);
    for &output in &outputs {
        if let Some(Alias { of, column }) = world.get::<Alias>(output).copied()
            && of == old
        {
            world.set(output, Alias { of: new, column });
        }
    }
    if let Some(alias) = world.get::<Alias>(old).copied()
        && outputs.contains(&alias.of)
    {
        world.take::<Alias>(old);
        world.set(new, alias);
    }
}
