//! What an optimizer is: a writer of nodes that update parameters from their gradients.

use std::fmt;
use std::sync::Arc;

use crate::build::{add_op, state};
use crate::components::{Decays, GradientOf, Name, Outputs, Parameters, Phase, Role};
use crate::op::{Op, OpError};
use crate::types::TensorType;
use crate::world::{ValueId, World};

/// A rule that turns gradients into new parameters, as nodes of the graph.
pub trait Optimizer: fmt::Debug + Send + Sync + 'static {
    /// Writes the nodes.
    ///
    /// # Errors
    /// What a shape rule says.
    fn update(&self, update: &mut Update<'_>) -> Result<(), OpError>;
}

/// A parameter in training.
#[derive(Clone, Debug)]
pub struct Trained {
    /// Full name.
    pub name: String,
    /// The parameter.
    pub value: ValueId,
    /// Its gradient, averaged over the micro-batches.
    pub gradient: ValueId,
    /// Whether weight decay applies.
    pub decays: bool,
}

/// What an optimizer sees while it writes its nodes.
pub struct Update<'w> {
    world: &'w mut World,
}

impl<'w> Update<'w> {
    pub(crate) fn new(world: &'w mut World) -> Self {
        Self { world }
    }

    /// The parameters that have a gradient, in the order of the model file.
    pub fn parameters(&self) -> Vec<Trained> {
        let parameters = self.world.resource::<Parameters>().cloned().unwrap_or_default();
        let trained = parameters.0.into_iter().filter_map(|value| {
            Some(Trained {
                name: self.world.expect::<Name>(value).0.clone(),
                value,
                gradient: self.world.get::<GradientOf>(value)?.0,
                decays: self.world.get::<Decays>(value).is_some_and(|d| d.0),
            })
        });
        trained.collect()
    }

    /// The type of a value.
    pub fn type_of(&self, value: ValueId) -> TensorType {
        self.world.expect::<TensorType>(value).clone()
    }

    /// A tensor that is kept from step to step, zero at first.
    pub fn state(&mut self, name: &str, tensor: TensorType) -> ValueId {
        state(self.world, name, tensor)
    }

    /// Adds a node that runs after the micro-batches; returns its outputs.
    ///
    /// # Errors
    /// What its shape rule says.
    pub fn emit(&mut self, name: &str, op: impl Op, inputs: &[ValueId]) -> Result<Vec<ValueId>, OpError> {
        add_op(self.world, name, None, Arc::new(op), inputs, Role::Activation, Phase::Update)
    }

    /// Lets the host read a value.
    pub fn report(&mut self, name: &str, value: ValueId) {
        if let Some(outputs) = self.world.resource_mut::<Outputs>() {
            outputs.0.insert(name.to_string(), value);
        }
    }
}
