//! `update`: the optimizer's nodes, gradient accumulation over micro-batches, and the counters.
//!
//! Reads `GradientOf`, `Decays` of parameters; the resources `Options`, `OptimizerRef`, `States`.
//! Writes nodes of the phase `Update`, accumulation nodes of the phase `Step`, states, `GradientOf`.

use std::sync::Arc;

use crate::build::{STEP, TICK, add_op, state};
use crate::builtin::{Accumulate, Clear, Increment};
use crate::components::{GradientOf, Name, OptimizerRef, Options, Parameters, Phase, Role, States};
use crate::diagnostic::{Diagnostic, Errors};
use crate::op::OpError;
use crate::optimizer::Update;
use crate::types::TensorType;
use crate::world::World;

/// See the [module](self). Does nothing in a program that does not train.
///
/// # Errors
/// What the optimizer says.
pub fn update(world: &mut World) -> Result<(), Errors> {
    let options = world.resource::<Options>().expect("set before compiling").clone();
    let optimizer = world.resource::<OptimizerRef>().cloned();
    let (true, Some(optimizer)) = (options.training, optimizer) else { return Ok(()) };
    attach(world, &options, &optimizer).map_err(|e| Diagnostic::new(format!("optimizer: {}", e.0)).into())
}

/// The name of the state that sums a parameter's gradients over micro-batches.
pub(crate) fn gradient_sum(parameter: &str) -> String {
    format!("{parameter}.gradient")
}

fn attach(world: &mut World, options: &Options, optimizer: &OptimizerRef) -> Result<(), OpError> {
    let mut accumulators = Vec::new();
    if options.micro_batches > 1 {
        let parameters = world.resource::<Parameters>().cloned().unwrap_or_default();
        for value in parameters.0 {
            let Some(&GradientOf(gradient)) = world.get(value) else { continue };
            let name = gradient_sum(&world.expect::<Name>(value).0);
            let tensor = world.expect::<TensorType>(value).clone();
            let total = state(world, &name, tensor);
            let op = Arc::new(Accumulate);
            let sum = add_op(world, &name, None, op, &[total, gradient], Role::State, Phase::Step)?[0];
            world.set(value, GradientOf(sum));
            accumulators.push((name, sum));
        }
    }
    optimizer.0.update(&mut Update::new(world))?;
    for (name, total) in accumulators {
        add_op(world, &name, None, Arc::new(Clear), &[total], Role::State, Phase::Update)?;
    }
    let counters = [(TICK, Phase::Step), (STEP, Phase::Update)];
    for (name, phase) in counters {
        if world.resource::<States>().is_some_and(|s| s.0.contains_key(name)) {
            let counter = state(world, name, TensorType::i32([1]));
            add_op(world, name, None, Arc::new(Increment), &[counter], Role::State, phase)?;
        }
    }
    Ok(())
}
