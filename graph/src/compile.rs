//! From a model file to a plan.

use std::sync::Arc;

use dataflow_kernels::device::Region;

use crate::check::check;
use crate::components::{MemoryBudget, Objectives, OptimizerRef, Options, Precision};
use crate::diagnostic::{Diagnostic, Errors};
use crate::format::model::ModelFile;
use crate::format::number::Scope;
use crate::op::Op;
use crate::optimizer::Optimizer;
use crate::plan::Plan;
use crate::registry::Registry;
use crate::systems::expand::expand;
use crate::world::World;

/// What to compile.
#[derive(Clone)]
pub struct Request {
    /// Where ops are found.
    pub registry: Arc<Registry>,
    /// The model.
    pub model: Arc<ModelFile>,
    /// Its config, with what was set.
    pub scope: Scope,
    /// Sizes, seed, training or not.
    pub options: Options,
    /// The loss and other figures by name; `loss` is what training minimises.
    pub objectives: Vec<(String, Arc<dyn Op>)>,
    /// What updates the parameters, if the model is trained.
    pub optimizer: Option<Arc<dyn Optimizer>>,
    /// The most bytes that activations and gradients may take; what is cheap is recomputed until they fit.
    pub memory_budget: Option<usize>,
    /// Systems to leave out.
    pub without: Vec<String>,
}

/// A world whose systems have run, and its plan.
pub struct Compiled {
    /// Nodes and values with their components.
    pub world: World,
    /// Launches and memory.
    pub plan: Plan,
}

/// Compiles a model in single precision.
///
/// # Errors
/// Everything that is wrong with the model file.
pub fn compile(request: &Request) -> Result<Compiled, Errors> {
    compile_in(request, Precision::F32)
}

/// Compiles a model.
///
/// # Errors
/// Everything that is wrong with the model file.
pub fn compile_in(request: &Request, precision: Precision) -> Result<Compiled, Errors> {
    let mut world = World::new();
    world.set_resource(precision);
    world.set_resource(request.registry.clone());
    world.set_resource(request.model.clone());
    world.set_resource(request.scope.clone());
    world.set_resource(request.options.clone());
    world.set_resource(Objectives(request.objectives.clone()));
    if let Some(optimizer) = &request.optimizer {
        world.set_resource(OptimizerRef(optimizer.clone()));
    }
    if let Some(bytes) = request.memory_budget {
        world.set_resource(MemoryBudget(bytes));
    }
    expand(&mut world)?;
    compile_world(world, &request.registry, &request.without)
}

/// Runs the systems behind `expand` on a world that was built by hand.
///
/// # Errors
/// What the first failing system says. The checker looks at every plan; what it finds is a bug of a system.
pub fn compile_world(mut world: World, registry: &Registry, without: &[String]) -> Result<Compiled, Errors> {
    registry.systems.run(&mut world, without)?;
    let plan = Plan::new(&world);
    check(&plan)?;
    let (bytes, budget) = (plan.bytes(Region::Arena), world.resource::<MemoryBudget>());
    if let Some(MemoryBudget(budget)) = budget.filter(|budget| bytes > budget.0) {
        return Err(Diagnostic::new(format!("the plan takes {bytes} bytes, more than the memory budget of {budget}"))
            .help("only the system `rematerialize` can change that: do not leave it out")
            .into());
    }
    Ok(Compiled { world, plan })
}
