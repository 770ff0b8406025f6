//! Programs to compare: what they have in common whether they come from a model file or from rows of ops.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::RangeInclusive;
use std::sync::Arc;

use dataflow_graph::build::add_source;
use dataflow_graph::builtin::{SumTo, sum};
use dataflow_graph::compile::{Compiled, compile_world};
use dataflow_graph::components::{Inputs, Name, OpRef, OptimizerRef, Options, Outputs, Phase, Role};
use dataflow_graph::diagnostic::Source;
use dataflow_graph::format::formula::Number;
use dataflow_graph::format::model::ModelFile;
use dataflow_graph::format::number::Scope;
use dataflow_graph::op::{Op, OpError};
use dataflow_graph::optimizer::{Optimizer, Update};
use dataflow_graph::plan::Plan;
use dataflow_graph::registry::Registry;
use dataflow_graph::session::Session;
use dataflow_graph::systems::expand::expand;
use dataflow_graph::types::TensorType;
use dataflow_graph::world::{ValueId, World};
use dataflow_kernels::expression::Program;

use super::{Backend, Problem};

/// Lets the host read the gradient of every parameter, and changes none.
#[derive(Debug)]
pub(super) struct Gradients;

impl Gradients {
    /// The output that holds a parameter's gradient.
    pub(super) fn output(parameter: &str) -> String {
        format!("{parameter}.gradient")
    }
}

impl Optimizer for Gradients {
    fn update(&self, update: &mut Update<'_>) -> Result<(), OpError> {
        for parameter in update.parameters() {
            update.report(&Self::output(&parameter.name), parameter.gradient);
        }
        Ok(())
    }
}

/// (result, weights) to their product. Unlike `Mul` it does not broadcast: the result must have the golden shape.
#[derive(Debug)]
struct Weighted;

impl Op for Weighted {
    fn arity(&self) -> RangeInclusive<usize> {
        2..=2
    }
    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, OpError> {
        let (result, golden) = (&inputs[0], &inputs[1]);
        if result != golden {
            return Err(format!("the result is {result}, but the golden one {golden}").into());
        }
        Ok(vec![result.clone()])
    }
    fn expression(&self, _: usize) -> Option<Program> {
        Some(Program::new(2, |b, x| vec![b.mul(x[0], x[1])]))
    }
    fn strided(&self) -> bool {
        true
    }
}

/// A value of the rows, which enters the loss weighted.
pub(super) struct Term {
    /// The row's name.
    pub value: String,
    /// What its shape must be.
    pub shape: Vec<usize>,
}

impl Term {
    /// The input that holds the weights.
    pub(super) fn weights(value: &str) -> String {
        format!("{value}.weights")
    }
}

/// Rows of ops, and a loss that gives each term any gradient: `sum over terms of sum(weights * value)`.
pub(super) struct Rows {
    /// For messages.
    pub name: String,
    /// The rows, in the text of a model file.
    pub text: String,
    /// The row that a model file must name as its output.
    pub output: String,
    /// Names that attributes may use.
    pub scope: BTreeMap<String, Number>,
    /// Shape of the input `tokens`.
    pub tokens: [usize; 2],
    /// The loss.
    pub terms: Vec<Term>,
}

impl Rows {
    /// Compiles the rows with their gradient. The values of the terms are outputs by name, their weights inputs.
    pub(super) fn compile(
        &self,
        registry: &Arc<Registry>,
        backend: &Backend,
        optimizer: Arc<dyn Optimizer>,
    ) -> Result<Compiled, Problem> {
        let text = format!("Model(nodes: [{}], output: \"{}\")", self.text, self.output);
        let model = Arc::new(ModelFile::parse(Arc::new(Source { name: self.name.clone(), text }))?);
        let [batch, block] = self.tokens;
        let mut world = World::new();
        world.set_resource(registry.clone());
        world.set_resource(model);
        world.set_resource(Scope::new(self.scope.clone()));
        world.set_resource(Options { training: true, target: backend.device.target(), ..Options::new(batch, block) });
        world.set_resource(backend.precision);
        world.set_resource(OptimizerRef(optimizer));
        expand(&mut world)?;
        self.add_loss(&mut world)?;
        Ok(compile_world(world, registry, &[])?)
    }

    /// Writes the loss behind the rows.
    fn add_loss(&self, world: &mut World) -> Result<(), Problem> {
        let mut sums = Vec::new();
        let (mut inputs, mut outputs) = (BTreeMap::new(), BTreeMap::new());
        for Term { value: name, shape } in &self.terms {
            let value = world.values().into_iter().find(|v| world.get::<Name>(*v).is_some_and(|n| n.0 == *name));
            let Some(value) = value else {
                return Err(Problem::Content(format!("{}: there is no row `{name}`", self.name)));
            };
            let weights = Term::weights(name);
            let factor = add_source(world, &weights, TensorType::f32(shape.clone()), Role::Input);
            inputs.insert(weights, factor);
            outputs.insert(name.clone(), value);
            let weighted = add_row(world, &self.name, Arc::new(Weighted), &[value, factor]);
            sums.push(add_row(world, "sum", Arc::new(SumTo { shape: Vec::new() }), &[weighted]));
        }
        outputs.insert("loss".into(), add_row(world, "loss", Arc::new(sum(sums.len())), &sums));
        world.resource_mut::<Inputs>().expect("set by `expand`").0.extend(inputs);
        world.set_resource(Outputs(outputs));
        Ok(())
    }
}

/// A node as `expand` makes it: its types are inferred when the systems run.
fn add_row(world: &mut World, name: &str, op: Arc<dyn Op>, inputs: &[ValueId]) -> ValueId {
    let node = world.add_node();
    world.set(node, Name(name.to_string()));
    world.set(node, Phase::Step);
    world.set(node, OpRef(op));
    inputs.iter().for_each(|v| world.push_input(node, *v));
    world.add_output(node, 0)
}

/// Fails unless the parameters are exactly the golden ones, given by name and shape.
pub(super) fn check_parameters(model: &str, plan: &Plan, golden: &BTreeMap<String, Vec<usize>>) -> Result<(), Problem> {
    let mut differences = Vec::new();
    let mut known = BTreeSet::new();
    for planned in &plan.parameters {
        let (name, shape) = (&planned.parameter.name, &planned.port.tensor.shape);
        known.insert(name.as_str());
        match golden.get(name) {
            Some(wanted) if wanted == shape => {}
            Some(wanted) => differences.push(format!("`{name}` is {shape:?}, but {wanted:?} in the file")),
            None => differences.push(format!("`{name}` {shape:?} is not in the file")),
        }
    }
    for (name, shape) in golden.iter().filter(|(name, _)| !known.contains(name.as_str())) {
        differences.push(format!("`{name}` {shape:?} is only in the file"));
    }
    if differences.is_empty() { Ok(()) } else { Err(Problem::Parameters { model: model.to_string(), differences }) }
}

/// The output of this name, which the program was built to have.
pub(super) fn output(session: &Session, name: &str) -> Result<Vec<f32>, Problem> {
    session.output(name).ok_or_else(|| Problem::Content(format!("the program has no `{name}`: nothing depends on it")))
}
