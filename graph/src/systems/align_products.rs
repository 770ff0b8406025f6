//! `align_products`, a part of `mixed_precision` for CUDA devices: matrix products of sizes that tensor cores take at full
//! speed.
//!
//! Reads the topology, `OpRef`, `Phase`, `Precision`, `TensorType`, `Alias`, `NoLaunch`; the resource `Outputs`. Writes the
//! topology, `TensorType` of results, `Alias`, `NoLaunch`.
//!
//! Rows of `bf16` that do not start at multiples of 16 bytes, and sizes that are no multiples of 8, make a product two to
//! three times slower. Zeros behind the rows and columns of weights, and behind the columns of activations, change no sum:
//! a weight gets them when it is rounded, a result is made with them and read without them, and what enters a product from
//! elsewhere is made beside some columns of zeros. The gradient of a weight gets rows of zeros below.

use std::collections::HashMap;
use std::sync::Arc;

use crate::build::{add_op, replace_everywhere};
use crate::builtin::{Beside, Cast, Corner, Fill, Pad};
use crate::components::{Name, OpRef, Phase, Precision, Role};
use crate::op::{Axes, OpError};
use crate::types::{DType, TensorType};
use crate::world::{NodeId, ValueId, World};

use super::simplify::{Alias, NoLaunch, is_output, is_updated, may_have_gaps, remove_dead};

/// What sizes shall be multiples of.
const WIDTH: usize = 8;

/// See the [module](self).
///
/// # Errors
/// None for ops that keep their contracts.
pub fn align_products(world: &mut World) -> Result<(), OpError> {
    let mut wide = Wide::default();
    for node in world.topological().unwrap_or_default() {
        let narrow = world.get::<Precision>(node) == Some(&Precision::Bf16);
        let axes = world.expect::<OpRef>(node).0.axes(world.inputs(node).len());
        if let Some(axes) = axes.filter(|_| narrow && *world.expect::<Phase>(node) == Phase::Step) {
            wide.align(world, node, &axes)?;
        }
    }
    // weights that all readers take with zeros need no other copy
    remove_dead(world);
    Ok(())
}

/// The same values with zeros behind.
#[derive(Default)]
struct Wide(HashMap<ValueId, ValueId>);

impl Wide {
    fn align(&mut self, world: &mut World, node: NodeId, axes: &Axes) -> Result<(), OpError> {
        let (inputs, outputs) = (world.inputs(node), world.outputs(node));
        let odd = |world: &World, value: ValueId, [rows, cols]: [char; 2]| {
            let tensor = world.expect::<TensorType>(value);
            let odd = |axis, size: usize| matches!(axis, 'n' | 'k') && !size.is_multiple_of(WIDTH);
            [odd(rows, tensor.rows()), odd(cols, tensor.cols())]
        };
        let inputs: Vec<(usize, ValueId, [bool; 2])> =
            inputs.iter().zip(&axes.inputs).enumerate().map(|(i, (v, a))| (i, *v, odd(world, *v, *a))).collect();
        let outputs: Vec<(ValueId, [bool; 2])> =
            outputs.iter().zip(&axes.outputs).map(|(v, a)| (*v, odd(world, *v, *a))).collect();
        let any = |odd: &[bool; 2]| odd.contains(&true);
        let possible = inputs.iter().filter(|(.., odd)| any(odd)).all(|(_, v, odd)| self.can_be(world, *v, *odd))
            && outputs.iter().filter(|(_, odd)| any(odd)).all(|(v, odd)| can_be_made(world, *v, *odd));
        if !possible || !inputs.iter().any(|(.., odd)| any(odd)) {
            return Ok(());
        }
        for (port, value, _) in inputs.into_iter().filter(|(.., odd)| any(odd)) {
            let wide = self.of(world, value)?;
            world.replace_input(node, port, wide);
        }
        for (value, odd) in outputs.into_iter().filter(|(_, odd)| any(odd)) {
            self.widen(world, value, odd)?;
        }
        Ok(())
    }

    /// Whether zeros can stand behind a value.
    fn can_be(&self, world: &World, value: ValueId, [rows, _]: [bool; 2]) -> bool {
        let own = || {
            !rows
                && world.producer(value).is_some_and(|(node, _)| world.get::<NoLaunch>(node).is_none())
                && world.get::<Alias>(value).is_none()
                && !is_output(world, value)
                && !is_updated(world, value)
                && may_have_gaps(world, value)
        };
        self.0.contains_key(&value) || weight(world, value).is_some() || own()
    }

    /// The value with zeros behind.
    fn of(&mut self, world: &mut World, value: ValueId) -> Result<ValueId, OpError> {
        if let Some(&wide) = self.0.get(&value) {
            return Ok(wide);
        }
        let name = format!("{}.aligned", world.expect::<Name>(value).0);
        let (tensor, role) = (world.expect::<TensorType>(value).clone(), *world.expect::<Role>(value));
        let wide = match weight(world, value) {
            Some(parameter) => {
                let shape = tensor.shape.iter().map(|n| n.next_multiple_of(WIDTH)).collect();
                let pad = Arc::new(Pad { to: DType::Bf16, shape });
                add_op(world, &name, None, pad, &[parameter], role, Phase::Step)?[0]
            }
            None => {
                let cols = tensor.cols();
                let zeros = tensor.with_cols(cols.next_multiple_of(WIDTH) - cols);
                let fill = Arc::new(Fill { value: 0.0, shape: zeros.shape.clone() });
                let made = add_op(world, &name, None, fill, &[], role, Phase::Step)?[0];
                world.set(made, zeros);
                let wide = add_op(world, &name, None, Arc::new(Beside), &[value, made], role, Phase::Step)?[0];
                let (node, _) = world.producer(wide).expect("it was made by a node");
                world.set(node, NoLaunch);
                world.set(value, Alias { of: wide, column: 0 });
                world.set(made, Alias { of: wide, column: cols });
                wide
            }
        };
        self.0.insert(value, wide);
        Ok(wide)
    }

    /// Makes a result with zeros behind or below; its readers see it without.
    fn widen(&mut self, world: &mut World, value: ValueId, [rows, _]: [bool; 2]) -> Result<(), OpError> {
        let name = world.expect::<Name>(value).0.clone();
        let (tensor, role) = (world.expect::<TensorType>(value).clone(), *world.expect::<Role>(value));
        let wide = match rows {
            true => TensorType { shape: vec![tensor.rows().next_multiple_of(WIDTH), tensor.cols()], ..tensor.clone() },
            false => tensor.with_cols(tensor.cols().next_multiple_of(WIDTH)),
        };
        world.set(value, wide);
        let corner = Arc::new(Corner { shape: tensor.shape });
        let narrow = add_op(world, &name, None, corner, &[value], role, Phase::Step)?[0];
        let (node, _) = world.producer(narrow).expect("it was made by a node");
        world.set(node, NoLaunch);
        world.set(narrow, Alias { of: value, column: 0 });
        replace_everywhere(world, value, narrow);
        world.replace_input(node, 0, value);
        self.0.insert(narrow, value);
        Ok(())
    }
}

/// Whether a product may make the value with zeros below (a gradient of a weight, whose rows stay without gaps) or behind.
fn can_be_made(world: &World, value: ValueId, odd: [bool; 2]) -> bool {
    let free = world.get::<Alias>(value).is_none() && !is_output(world, value) && !is_updated(world, value);
    free && match odd {
        [true, columns] => !columns && world.expect::<TensorType>(value).shape.len() == 2,
        [false, _] => world.expect::<TensorType>(value).dtype == DType::Bf16 && may_have_gaps(world, value),
    }
}

/// The parameter that the value is, rounded.
fn weight(world: &World, value: ValueId) -> Option<ValueId> {
    let (node, _) = world.producer(value)?;
    world.expect::<OpRef>(node).0.downcast::<Cast>()?;
    let parameter = world.inputs(node)[0];
    (*world.expect::<Role>(parameter) == Role::Parameter).then_some(parameter)
}
