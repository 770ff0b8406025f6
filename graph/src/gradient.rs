//! What an op sees while it writes its gradient.

use std::sync::Arc;

use crate::build::add_op;
use crate::builtin::Fill;
use crate::components::{Name, OpRef, Phase, Place, Role};
use crate::op::{Op, OpError};
use crate::types::TensorType;
use crate::world::{NodeId, ValueId, World};

/// The node that is differentiated, the gradients that reach its outputs, and a place for those of its inputs.
pub struct Gradient<'w> {
    world: &'w mut World,
    node: NodeId,
    inputs: Vec<ValueId>,
    outputs: Vec<ValueId>,
    output_gradients: Vec<Option<ValueId>>,
    wanted: Vec<bool>,
    input_gradients: Vec<Option<ValueId>>,
}

impl<'w> Gradient<'w> {
    /// The gradient of `node`, of whose inputs some are wanted.
    pub(crate) fn new(
        world: &'w mut World,
        node: NodeId,
        output_gradients: Vec<Option<ValueId>>,
        wanted: Vec<bool>,
    ) -> Self {
        let (inputs, outputs) = (world.inputs(node), world.outputs(node));
        let input_gradients = vec![None; inputs.len()];
        Self { world, node, inputs, outputs, output_gradients, wanted, input_gradients }
    }

    pub(crate) fn finish(self) -> Vec<Option<ValueId>> {
        self.input_gradients
    }

    /// Number of inputs, parameters included.
    pub fn inputs(&self) -> usize {
        self.inputs.len()
    }

    /// Input `i`.
    pub fn input(&self, i: usize) -> ValueId {
        self.inputs[i]
    }

    /// All inputs.
    pub fn all_inputs(&self) -> &[ValueId] {
        &self.inputs
    }

    /// Output `o`.
    pub fn output(&self, o: usize) -> ValueId {
        self.outputs[o]
    }

    /// The type of a value.
    pub fn type_of(&self, value: ValueId) -> TensorType {
        self.world.expect::<TensorType>(value).clone()
    }

    /// The gradient that reaches output `o`; `None` where nothing depends on it.
    pub fn output_gradient(&self, o: usize) -> Option<ValueId> {
        self.output_gradients[o]
    }

    /// The gradient that reaches output `o`, zeros where nothing depends on it.
    ///
    /// # Errors
    /// As [`emit`](Self::emit).
    pub fn output_gradient_or_zeros(&mut self, o: usize) -> Result<ValueId, OpError> {
        match self.output_gradients[o] {
            Some(value) => Ok(value),
            None => {
                let tensor = self.type_of(self.outputs[o]);
                Ok(self.emit(Fill { value: 0.0, shape: tensor.shape }, &[])?[0])
            }
        }
    }

    /// The number that a value is everywhere, where that is known: the gradient of the loss.
    pub fn constant(&self, value: ValueId) -> Option<f32> {
        let (node, _) = self.world.producer(value)?;
        Some(self.world.expect::<OpRef>(node).0.downcast::<Fill>()?.value)
    }

    /// Whether input `i` needs a gradient.
    pub fn wants(&self, i: usize) -> bool {
        self.wanted[i]
    }

    /// Adds a node; returns its outputs.
    ///
    /// # Errors
    /// What its shape rule says.
    pub fn emit(&mut self, op: impl Op, inputs: &[ValueId]) -> Result<Vec<ValueId>, OpError> {
        let name = format!("{}.gradient", self.world.expect::<Name>(self.node).0);
        let place = self.world.get::<Place>(self.node).cloned();
        add_op(self.world, &name, place, Arc::new(op), inputs, Role::Gradient, Phase::Step)
    }

    /// Sets the gradient of input `i`, which must have that input's shape.
    ///
    /// # Errors
    /// If the shapes differ: a bug of the op, but one that a plugin's author should read about.
    pub fn set(&mut self, i: usize, gradient: ValueId) -> Result<(), OpError> {
        let (wanted, found) = (self.type_of(self.inputs[i]), self.type_of(gradient));
        if wanted.shape != found.shape {
            return Err(format!("the gradient of input {i} is {found}, but the input is {wanted}").into());
        }
        self.input_gradients[i] = Some(gradient);
        Ok(())
    }
}
