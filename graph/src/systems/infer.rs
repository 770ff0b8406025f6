//! `infer`: shapes and element types of all values, and the parameters that ops ask for.
//!
//! Reads the topology, `OpRef`, `Name`, `Place`, `RowNames` of nodes, `Arc<ModelFile>`.
//! Writes `TensorType`, `Role`, `Name` of values; new parameter values with `ParameterOf`, `Place` and `Decays`,
//! connected behind the data inputs; the resources `Parameters` and `TokenLimit`.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;

use super::expand::RowNames;
use super::{op_error, push_once};
use crate::build::{add_source, finish, state, types_of};
use crate::components::{
    Decays, Inputs, Name, OpRef, Options, ParameterOf, Parameters, Place, Recurrence, Role, TokenLimit,
};
use crate::diagnostic::{Errors, nearest};
use crate::format::model::ModelFile;
use crate::op::{Op, OpError, Recurrent};
use crate::types::{DType, TensorType};
use crate::world::{NodeId, ValueId, World};

/// The inputs that tell a recurrent program about its sequences; see [`Recurrence`](crate::components::Recurrence).
pub(super) const SEQUENCES: [&str; 3] = ["slots", "positions", "lengths"];

/// The input that tells a packed program about its documents; see [`Options::packed`].
pub(super) const POSITIONS: &str = "positions";

/// Gives a node of a packed program, of which data inputs and parameters are known, the form that starts anew at each
/// document, if its op looks back.
fn pack(world: &mut World, node: NodeId, op: &Arc<dyn Op>, types: &[TensorType]) -> Result<Arc<dyn Op>, OpError> {
    let Some(packed) = op.packed(types)? else {
        // an op that looks back has a state to decode with
        let one = Recurrence { slots: 1, capacity: 1, logits: true, weights: DType::F32 };
        return match op.recurrent(types, &one)? {
            None if op.tokenwise() => Ok(op.clone()),
            None => Err(UNSAID.into()),
            Some(_) => Err("the op looks back, and has no form that starts anew at each document: \
                            use other batches than `Packed`"
                .into()),
        };
    };
    let positions = world.resource::<Inputs>().and_then(|inputs| inputs.0.get(POSITIONS).copied());
    world.push_input(node, positions.ok_or_else(|| OpError(format!("a packed program has no input `{POSITIONS}`")))?);
    world.set(node, OpRef(packed.clone()));
    Ok(packed)
}

/// What is wrong with an op of which nobody knows whether it looks back.
const UNSAID: &str = "the op has no recurrent form and does not say that it works on each token alone, so that it can \
                      neither generate nor start anew at documents: its author adds `Op::recurrent` or `Op::tokenwise`";

/// Gives a node its recurrent form: states as further inputs, and as further outputs that update them.
fn recur(world: &mut World, node: NodeId, name: &str, recurrent: Recurrent) -> Result<Vec<TensorType>, OpError> {
    for (state_name, tensor) in recurrent.states {
        let value = state(world, &format!("{name}.{state_name}"), tensor);
        world.push_input(node, value);
    }
    for input in SEQUENCES {
        let value = world.resource::<Inputs>().and_then(|inputs| inputs.0.get(input).copied());
        let value = value.ok_or_else(|| OpError(format!("a recurrent program has no input `{input}`")))?;
        world.push_input(node, value);
    }
    let before = world.resource::<TokenLimit>().and_then(|limit| limit.0);
    world.set_resource(TokenLimit(before.into_iter().chain(recurrent.limit).min()));
    let outputs = recurrent.op.infer(&types_of(world, &world.inputs(node)))?;
    world.set(node, OpRef(recurrent.op));
    Ok(outputs)
}

/// See the [module](self).
///
/// # Errors
/// Every node whose inputs do not fit its op, named once for a repeated block.
pub fn infer(world: &mut World) -> Result<(), Errors> {
    shapes(world, false).into_result()
}

/// What is wrong with the shapes. In a `partial` world some rows are missing, with their parameters.
pub(super) fn shapes(world: &mut World, partial: bool) -> Errors {
    let prefix = world.resource::<Arc<ModelFile>>().map(|m| m.prefix.clone()).unwrap_or_default();
    let order = world.topological().expect("`expand` reports cycles");
    let mut errors = Errors::default();
    let mut failed: HashSet<NodeId> = HashSet::new();
    let mut parameters: BTreeMap<String, ValueId> = BTreeMap::new();
    world.set_resource(Parameters::default());
    let mut elements = 0;
    for node in order {
        let inputs = world.inputs(node);
        if inputs.iter().any(|&v| world.producer(v).is_some_and(|(n, _)| failed.contains(&n))) {
            failed.insert(node);
            continue;
        }
        let op = world.expect::<OpRef>(node).0.clone();
        if let Some(error) = miscounted(&*op, inputs.len()) {
            let help = format!("`dataflow ops {}` shows the inputs", name_of(&*op));
            push_once(&mut errors, op_error(world, node, &error).help(help));
            failed.insert(node);
            continue;
        }
        if let Some(error) = count(world, &inputs, &mut elements) {
            errors.push(op_error(world, node, &error));
            break;
        }
        if let Err(error) = infer_node(world, node, &op, &inputs, &prefix, &mut parameters) {
            if !(partial && FOLLOWING.iter().any(|f| error.0.contains(f))) {
                push_once(&mut errors, op_error(world, node, &error));
            }
            failed.insert(node);
            continue;
        }
        let made: Vec<ValueId> = world.outputs(node).into_iter().chain(world.inputs(node)).collect();
        if let Some(error) = count(world, &made, &mut elements) {
            errors.push(op_error(world, node, &error));
            break;
        }
    }
    errors
}

const NOTHING_TO_TIE_TO: &str = "there is no parameter to tie to:";
const TWO_OF_A_NAME: &str = "there are two parameters of the name";
/// What may follow from rows that were reported already.
const FOLLOWING: [&str; 2] = [NOTHING_TO_TIE_TO, TWO_OF_A_NAME];

/// The most elements that all values of the forward pass may have together. Beyond any machine; it keeps the sizes
/// and offsets that are computed later within 64 bits.
const MAX_ELEMENTS: u128 = 1 << 50;

/// Adds the sizes of some values, which may be counted more than once.
fn count(world: &World, values: &[ValueId], elements: &mut u128) -> Option<OpError> {
    for &value in values {
        let tensor = world.expect::<TensorType>(value);
        let size = tensor.shape.iter().fold(1u128, |n, d| n.saturating_mul(*d as u128));
        *elements = elements.saturating_add(size);
        if *elements > MAX_ELEMENTS {
            let message = format!("a tensor {tensor} makes the model too large for any device: use smaller sizes");
            return Some(message.into());
        }
    }
    None
}

/// The op's name: the first word of how it is printed.
fn name_of(op: &dyn Op) -> String {
    let text = format!("{op:?}");
    text.split([' ', '(', '{']).next().unwrap_or_default().to_string()
}

/// A row with too few or too many inputs.
fn miscounted(op: &dyn Op, given: usize) -> Option<OpError> {
    let arity = op.arity();
    let wanted = match (*arity.start(), *arity.end()) {
        _ if arity.contains(&given) => return None,
        (1, 1) => "1 input".to_string(),
        (least, most) if least == most => format!("{least} inputs"),
        (least, most) => format!("{least} to {most} inputs"),
    };
    Some(format!("`{}` takes {wanted}, but the row gives {given}", name_of(op)).into())
}

fn infer_node(
    world: &mut World,
    node: NodeId,
    op: &Arc<dyn Op>,
    inputs: &[ValueId],
    prefix: &str,
    parameters: &mut BTreeMap<String, ValueId>,
) -> Result<(), OpError> {
    let op_name = name_of(&**op);
    let types = types_of(world, inputs);
    let shown = || types.iter().map(TensorType::to_string).collect::<Vec<_>>().join(", ");
    let context = |e: OpError| OpError(format!("`{op_name}`: {} (inputs: {})", e.0, shown()));
    let outputs = op.infer(&types).map_err(context)?;
    let row_names = world.get::<RowNames>(node).map_or(0, |r| r.0.len());
    if row_names > outputs.len() {
        let message = format!("`{op_name}` gives {} output(s), but the row names {row_names}", outputs.len());
        return Err(message.into());
    }
    let name = world.expect::<Name>(node).0.clone();
    let (recurrence, packed) = world.resource::<Options>().map_or((None, false), |o| (o.recurrent, o.packed));
    for (i, wanted) in op.parameters(&types).map_err(context)?.into_iter().enumerate() {
        let dtype = recurrence.filter(|_| op.narrow(i)).map_or(DType::F32, |r| r.weights);
        let value = match &wanted.tie {
            Some(tie) => {
                let full = if prefix.is_empty() { tie.clone() } else { format!("{prefix}.{tie}") };
                let Some(&value) = parameters.get(&full) else {
                    let hint = nearest(&full, parameters.keys().map(String::as_str));
                    let hint = hint.map(|h| format!(", did you mean `{h}`?")).unwrap_or_default();
                    return Err(format!("`{op_name}`: {NOTHING_TO_TIE_TO} `{full}`{hint}").into());
                };
                let found = world.expect::<TensorType>(value);
                if found.shape != wanted.shape {
                    let message = format!(
                        "`{op_name}`: tied to `{full}` of shape {:?}, but needs {:?}",
                        found.shape, wanted.shape
                    );
                    return Err(message.into());
                }
                if found.dtype != dtype {
                    let message = format!("`{op_name}`: tied to `{full}`, which is {}, but takes {dtype}", found.dtype);
                    return Err(message.into());
                }
                value
            }
            None => {
                let dot = if wanted.name.is_empty() { "" } else { "." };
                let full = format!("{name}{dot}{}", wanted.name);
                let value =
                    add_source(world, &full, TensorType { shape: wanted.shape.clone(), dtype }, Role::Parameter);
                world.set(value, Decays(wanted.shape.len() >= 2));
                if let Some(place) = world.get::<Place>(node).cloned() {
                    world.set(value, place);
                }
                world.set(value, ParameterOf(crate::op::Parameter { name: full.clone(), ..wanted }));
                world.resource_mut::<Parameters>().expect("set above").0.push(value);
                if parameters.insert(full.clone(), value).is_some() {
                    return Err(format!("{TWO_OF_A_NAME} `{full}`").into());
                }
                value
            }
        };
        world.push_input(node, value);
    }
    let (outputs, form) = match packed {
        true => {
            let form = pack(world, node, op, &types).map_err(context)?;
            (form.infer(&types_of(world, &world.inputs(node))).map_err(context)?, form)
        }
        false => (outputs, op.clone()),
    };
    finish(world, node, &*form);
    let outputs = match recurrence.map(|r| op.recurrent(&types, &r).map_err(context)).transpose()?.flatten() {
        Some(recurrent) => recur(world, node, &name, recurrent)?,
        None if recurrence.is_some() && !op.tokenwise() => return Err(context(UNSAID.into())),
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
