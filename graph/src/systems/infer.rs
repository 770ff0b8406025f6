//! `infer`: shapes and element types of all values, and the parameters that ops ask for.
//!
//! Reads the topology, `OpRef`, `Name`, `Place`, `RowNames` of nodes, `Arc<ModelFile>`.
//! Writes `TensorType`, `Role`, `Name` of values; new parameter values with `ParameterOf` and `Decays`,
//! connected behind the data inputs; the resource `Parameters`.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;

use super::expand::RowNames;
use super::{op_error, push_once};
use crate::build::{add_source, finish, state, types_of};
use crate::components::{Decays, Name, OpRef, Options, ParameterOf, Parameters, Role};
use crate::diagnostic::{Errors, nearest};
use crate::format::model::ModelFile;
use crate::op::{Op, OpError, Recurrent};
use crate::types::TensorType;
use crate::world::{NodeId, ValueId, World};

/// Gives a node its recurrent form: states as further inputs, and as further outputs that update them.
fn recur(world: &mut World, node: NodeId, name: &str, recurrent: Recurrent) -> Result<Vec<TensorType>, OpError> {
    for (state_name, tensor) in recurrent.states {
        let value = state(world, &format!("{name}.{state_name}"), tensor);
        world.push_input(node, value);
    }
    let outputs = recurrent.op.infer(&types_of(world, &world.inputs(node)))?;
    world.set(node, OpRef(recurrent.op));
    Ok(outputs)
}

/// See the [module](self).
///
/// # Errors
/// Every node whose inputs do not fit its op, named once for a repeated block.
pub fn infer(world: &mut World) -> Result<(), Errors> {
    let prefix = world.resource::<Arc<ModelFile>>().map(|m| m.prefix.clone()).unwrap_or_default();
    let order = world.topological().expect("`expand` reports cycles");
    let mut errors = Errors::default();
    let mut failed: HashSet<NodeId> = HashSet::new();
    let mut parameters: BTreeMap<String, ValueId> = BTreeMap::new();
    world.set_resource(Parameters::default());
    for node in order {
        let inputs = world.inputs(node);
        if inputs.iter().any(|&v| world.producer(v).is_some_and(|(n, _)| failed.contains(&n))) {
            failed.insert(node);
            continue;
        }
        let op = world.expect::<OpRef>(node).0.clone();
        if let Err(error) = infer_node(world, node, &*op, &inputs, &prefix, &mut parameters) {
            push_once(&mut errors, op_error(world, node, &error));
            failed.insert(node);
        }
    }
    errors.into_result()
}

fn infer_node(
    world: &mut World,
    node: NodeId,
    op: &dyn Op,
    inputs: &[ValueId],
    prefix: &str,
    parameters: &mut BTreeMap<String, ValueId>,
) -> Result<(), OpError> {
    let op_name = format!("{op:?}");
    let op_name = op_name.split([' ', '(', '{']).next().unwrap_or_default().to_string();
    let types = types_of(world, inputs);
    let shown = || types.iter().map(TensorType::to_string).collect::<Vec<_>>().join(", ");
    if !op.arity().contains(&inputs.len()) {
        let (least, most) = (*op.arity().start(), *op.arity().end());
        let wanted = if least == most { format!("{least}") } else { format!("{least} to {most}") };
        return Err(format!("`{op_name}` takes {wanted} input(s), but the row gives {}", inputs.len()).into());
    }
    let context = |e: OpError| OpError(format!("`{op_name}`: {} (inputs: {})", e.0, shown()));
    let outputs = op.infer(&types).map_err(context)?;
    let row_names = world.get::<RowNames>(node).map_or(0, |r| r.0.len());
    if row_names > outputs.len() {
        let message = format!("`{op_name}` gives {} output(s), but the row names {row_names}", outputs.len());
        return Err(message.into());
    }
    let name = world.expect::<Name>(node).0.clone();
    for wanted in op.parameters(&types).map_err(context)? {
        let value = match &wanted.tie {
            Some(tie) => {
                let full = if prefix.is_empty() { tie.clone() } else { format!("{prefix}.{tie}") };
                let Some(&value) = parameters.get(&full) else {
                    let hint = nearest(&full, parameters.keys().map(String::as_str));
                    let hint = hint.map(|h| format!(", did you mean `{h}`?")).unwrap_or_default();
                    return Err(format!("`{op_name}`: there is no parameter `{full}` to tie to{hint}").into());
                };
                let found = world.expect::<TensorType>(value);
                if found.shape != wanted.shape {
                    let message = format!(
                        "`{op_name}`: tied to `{full}` of shape {:?}, but needs {:?}",
                        found.shape, wanted.shape
                    );
                    return Err(message.into());
                }
                value
            }
            None => {
                let dot = if wanted.name.is_empty() { "" } else { "." };
                let full = format!("{name}{dot}{}", wanted.name);
                let value = add_source(world, &full, TensorType::f32(wanted.shape.clone()), Role::Parameter);
                world.set(value, Decays(wanted.shape.len() >= 2));
                world.set(value, ParameterOf(crate::op::Parameter { name: full.clone(), ..wanted }));
                world.resource_mut::<Parameters>().expect("set above").0.push(value);
                if parameters.insert(full.clone(), value).is_some() {
                    return Err(format!("there are two parameters of the name `{full}`").into());
                }
                value
            }
        };
        world.push_input(node, value);
    }
    finish(world, node, op);
    let capacity = world.resource::<Options>().and_then(|o| o.recurrent);
    let outputs = match capacity.map(|capacity| op.recurrent(&types, capacity).map_err(context)).transpose()?.flatten()
    {
        Some(recurrent) => recur(world, node, &name, recurrent)?,
        None => outputs,
    };
    let existing = world.outputs(node);
    for (port, tensor) in outputs.into_iter().enumerate() {
        let value = match existing.get(port) {
            Some(&value) => value,
            None => {
                let value = world.add_output(node, port);
                world.set(value, Name(format!("{name}:{port}")));
                value
            }
        };
        world.set(value, tensor);
        world.set(value, Role::Activation);
        if world.get::<Name>(value).is_none() {
            world.set(value, Name(name.clone()));
        }
    }
    Ok(())
}
