//! `differentiate`: each op writes its gradient as further nodes, so the backward pass is ordinary graph.
//!
//! Reads the topology, `OpRef`, `TensorType`, `Role`; the resources `Options`, `Outputs` (the value `loss`) and
//! `Parameters`. Writes gradient nodes and values, and `GradientOf` of parameters.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use super::op_error;
use crate::build::add_op;
use crate::builtin::{Fill, sum};
use crate::components::{GradientOf, Name, OpRef, Options, Outputs, Parameters, Phase, Role};
use crate::diagnostic::{Diagnostic, Errors};
use crate::gradient::Gradient;
use crate::op::OpError;
use crate::types::{DType, TensorType};
use crate::world::{NodeId, ValueId, World};

/// See the [module](self). Does nothing in a program that does not train.
///
/// # Errors
/// A node on a path from a parameter to the loss whose op has no gradient.
pub fn differentiate(world: &mut World) -> Result<(), Errors> {
    let options = world.resource::<Options>().expect("set before compiling").clone();
    if !options.training {
        return Ok(());
    }
    let loss = world.resource::<Outputs>().and_then(|o| o.0.get("loss").copied());
    let Some(loss) = loss else {
        return Err(Diagnostic::new("the model has no loss to train on")
            .help("add a row such as (\"loss\", CrossEntropy, [\"model\", \"batches\"]) to the pipeline")
            .into());
    };
    let shape = world.expect::<TensorType>(loss).shape.clone();
    if shape.iter().product::<usize>() != 1 {
        return Err(Diagnostic::new(format!("the loss must be one number, but is {shape:?}")).into());
    }
    // the loss of an update is the mean over its micro-batches
    let seed = Fill { value: 1.0 / options.micro_batches as f32, shape };
    let seed = add_op(world, "loss.gradient", None, Arc::new(seed), &[], Role::Gradient, Phase::Step)
        .map_err(|e| Diagnostic::new(e.0))?[0];
    let wanted = world.resource::<Parameters>().cloned().unwrap_or_default().0;
    let gradients = gradients_of(world, loss, seed, &wanted)?;
    for (parameter, gradient) in wanted.into_iter().zip(gradients) {
        if let Some(gradient) = gradient {
            let name = format!("{}.gradient", world.expect::<Name>(parameter).0);
            world.set(gradient, Name(name));
            world.set(parameter, GradientOf(gradient));
        }
    }
    Ok(())
}

/// The gradients of `sum(seed * output)` with respect to some values; `None` for one that `output` does not
/// depend on.
///
/// # Errors
/// A node between them whose op has no gradient.
pub fn gradients_of(
    world: &mut World,
    output: ValueId,
    seed: ValueId,
    wanted: &[ValueId],
) -> Result<Vec<Option<ValueId>>, Errors> {
    let order = world.topological().expect("`expand` reports cycles");
    // values that depend on a wanted one through numbers that have a derivative
    let mut depends: HashSet<ValueId> = wanted.iter().copied().collect();
    for &node in &order {
        if world.inputs(node).iter().any(|v| depends.contains(v)) {
            let real = |v: &ValueId| world.expect::<TensorType>(*v).dtype == DType::F32;
            depends.extend(world.outputs(node).into_iter().filter(real));
        }
    }
    let mut parts: HashMap<ValueId, Vec<ValueId>> = HashMap::from([(output, vec![seed])]);
    let mut errors = Errors::default();
    for &node in order.iter().rev() {
        if let Err(error) = differentiate_node(world, node, &depends, &mut parts) {
            super::push_once(&mut errors, op_error(world, node, &error));
        }
    }
    errors.into_result()?;
    let gradients = wanted.iter().map(|v| combine(world, &mut parts, *v)).collect::<Result<_, _>>();
    gradients.map_err(|e: OpError| Diagnostic::new(e.0).into())
}

fn differentiate_node(
    world: &mut World,
    node: NodeId,
    depends: &HashSet<ValueId>,
    parts: &mut HashMap<ValueId, Vec<ValueId>>,
) -> Result<(), OpError> {
    let (inputs, outputs) = (world.inputs(node), world.outputs(node));
    let wanted: Vec<bool> = inputs.iter().map(|v| depends.contains(v)).collect();
    if !wanted.contains(&true) || !outputs.iter().any(|v| parts.contains_key(v)) {
        return Ok(());
    }
    let from_above = outputs.iter().map(|v| combine(world, parts, *v)).collect::<Result<Vec<_>, _>>()?;
    let op = world.expect::<OpRef>(node).0.clone();
    let mut gradient = Gradient::new(world, node, from_above, wanted.clone());
    op.gradient(&mut gradient)?;
    for (i, part) in gradient.finish().into_iter().enumerate() {
        match part {
            Some(part) if wanted[i] => parts.entry(inputs[i]).or_default().push(part),
            None if wanted[i] => {
                return Err(format!("the op has no gradient for input {i}, which depends on a parameter").into());
            }
            _ => {}
        }
    }
    Ok(())
}

/// The sum of the parts of a value's gradient, in the order in which they were written. Each sum is a node of two
/// inputs, which the producer of its second one may take over.
fn combine(
    world: &mut World,
    parts: &mut HashMap<ValueId, Vec<ValueId>>,
    value: ValueId,
) -> Result<Option<ValueId>, OpError> {
    let Some(list) = parts.get(&value).cloned() else { return Ok(None) };
    let name = format!("{}.gradient", world.get::<Name>(value).map_or("value", |n| &n.0));
    let mut total = list[0];
    for &part in &list[1..] {
        let both = [total, part];
        total = add_op(world, &name, None, Arc::new(sum(2)), &both, Role::Gradient, Phase::Step)?[0];
    }
    parts.insert(value, vec![total]);
    Ok(Some(total))
}
