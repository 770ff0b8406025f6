//! What the systems leave behind: an ordered list of launches and the layout of memory.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;

use dataflow_kernels::device::{Launch, Operand, Region, Target};

use crate::build::types_of;
use crate::components::{
    Inputs, Name, OpRef, Options, Outputs, ParameterOf, Parameters, Phase, Place, Precision, States, TokenLimit,
};
use crate::diagnostic::{Diagnostic, Errors, Span};
use crate::op::{Cost, NodeView, Parameter};
use crate::systems::allocate::{Layout, Located};
use crate::systems::in_place::InPlace;
use crate::systems::order::Order;
use crate::systems::rematerialize::Rematerialized;
use crate::systems::simplify::NoLaunch;
use crate::types::TensorType;
use crate::world::{NodeId, ValueId, World};

/// One launch of a plan, for people and for the device.
#[derive(Clone, Debug)]
pub struct PlannedLaunch {
    /// The node.
    pub node: NodeId,
    /// The path of row names.
    pub name: String,
    /// The op and its attributes.
    pub op: String,
    /// When it runs.
    pub phase: Phase,
    /// What it reads.
    pub inputs: Vec<Operand>,
    /// What it writes.
    pub outputs: Vec<Operand>,
    /// For each input, the launches that made its contents; none if they are there before the first launch.
    pub sources: Vec<Vec<usize>>,
    /// Pairs (output, input) that are the same memory.
    pub in_place: Vec<(usize, usize)>,
    /// Its work.
    pub cost: Cost,
}

/// A tensor that the host can reach.
#[derive(Clone, Debug)]
pub struct Port {
    /// Its type.
    pub tensor: TensorType,
    /// Where it lies.
    pub operand: Operand,
}

/// A trained tensor.
#[derive(Clone, Debug)]
pub struct PlannedParameter {
    /// Full name, shape, initialiser.
    pub parameter: Parameter,
    /// Where it lies.
    pub port: Port,
    /// Whether weight decay applies.
    pub decays: bool,
    /// The row that asks for it.
    pub place: Option<Span>,
}

/// Launches and memory of a compiled model.
#[derive(Clone, Debug)]
pub struct Plan {
    /// In order; those of the phase `Step` come first.
    pub launches: Vec<PlannedLaunch>,
    /// Memory.
    pub layout: Layout,
    /// What the host writes.
    pub inputs: BTreeMap<String, Port>,
    /// What the host reads.
    pub outputs: BTreeMap<String, Port>,
    /// What is kept from step to step.
    pub states: BTreeMap<String, Port>,
    /// All parameters, in the order of the model file.
    pub parameters: Vec<PlannedParameter>,
    /// What recomputation bought, where there was a memory budget.
    pub rematerialized: Option<Rematerialized>,
    /// The most tokens that a sequence can have in a recurrent program, if there is such a limit.
    pub token_limit: Option<usize>,
}

impl Plan {
    /// The plan of a world whose systems have run.
    pub(crate) fn new(world: &World) -> Self {
        let seed = world.resource::<Options>().map_or(0, |o| o.seed);
        let order = &world.resource::<Order>().expect("`order` ran").0;
        let operands =
            |values: &[ValueId]| values.iter().map(|v| world.expect::<Located>(*v).0.clone()).collect::<Vec<_>>();
        let launched = order.iter().copied().filter(|n| world.get::<NoLaunch>(*n).is_none());
        let number: HashMap<NodeId, usize> = launched.clone().enumerate().map(|(at, node)| (node, at)).collect();
        let launches = launched.map(|node| {
            let (inputs, outputs) = (world.inputs(node), world.outputs(node));
            let op = &world.expect::<OpRef>(node).0;
            let mut in_place = op.updates();
            in_place.extend(world.get::<InPlace>(node).iter().flat_map(|p| p.0.iter().copied()));
            let name = world.expect::<Name>(node).0.clone();
            let (input_types, output_types) = (types_of(world, &inputs), types_of(world, &outputs));
            let view = NodeView {
                name: &name,
                inputs: &input_types,
                outputs: &output_types,
                seed,
                precision: precision_of(world, node),
            };
            PlannedLaunch {
                node,
                op: format!("{op:?}"),
                phase: *world.expect::<Phase>(node),
                inputs: operands(&inputs),
                outputs: operands(&outputs),
                sources: inputs.iter().map(|v| sources(world, &number, *v)).collect(),
                in_place,
                cost: op.cost(&view),
                name,
            }
        });
        let launches = launches.collect();
        let port = |value: ValueId| Port {
            tensor: world.expect::<TensorType>(value).clone(),
            operand: world.expect::<Located>(value).0.clone(),
        };
        let ports = |names: &BTreeMap<String, ValueId>| names.iter().map(|(n, v)| (n.clone(), port(*v))).collect();
        let parameters = world.resource::<Parameters>().cloned().unwrap_or_default().0;
        Self {
            launches,
            layout: world.resource::<Layout>().expect("`allocate` ran").clone(),
            inputs: ports(&world.resource::<Inputs>().cloned().unwrap_or_default().0),
            outputs: ports(&world.resource::<Outputs>().cloned().unwrap_or_default().0),
            states: ports(&world.resource::<States>().cloned().unwrap_or_default().0),
            rematerialized: world.resource::<Rematerialized>().copied(),
            token_limit: world.resource::<TokenLimit>().and_then(|limit| limit.0),
            parameters: parameters
                .into_iter()
                .map(|value| PlannedParameter {
                    parameter: world.expect::<ParameterOf>(value).0.clone(),
                    port: port(value),
                    decays: world.get::<crate::components::Decays>(value).is_some_and(|d| d.0),
                    place: world.get::<Place>(value).map(|p| p.0.clone()),
                })
                .collect(),
        }
    }

    /// The launches that run once for every micro-batch.
    pub fn step_range(&self) -> Range<usize> {
        0..self.launches.partition_point(|l| l.phase == Phase::Step)
    }

    /// The launches that run once for every update.
    pub fn update_range(&self) -> Range<usize> {
        self.step_range().end..self.launches.len()
    }

    /// Bytes of a region.
    pub fn bytes(&self, region: Region) -> usize {
        self.layout.bytes[Region::ALL.iter().position(|r| *r == region).expect("every region is listed")]
    }

    /// Whether a program of another plan finds its tensors in this plan's parameters or states.
    pub fn shares(&self, other: &Plan, region: Region) -> bool {
        let parameters = |plan: &Plan| -> Vec<(String, Operand)> {
            plan.parameters.iter().map(|p| (p.parameter.name.clone(), p.port.operand.clone())).collect()
        };
        let states = |plan: &Plan| -> Vec<(String, Operand)> {
            plan.states.iter().map(|(name, port)| (name.clone(), port.operand.clone())).collect()
        };
        self.bytes(region) == other.bytes(region)
            && match region {
                Region::Parameters => parameters(self) == parameters(other),
                Region::State => states(self) == states(other),
                _ => false,
            }
    }

    /// Number of trained numbers, tied ones once.
    pub fn parameter_count(&self) -> usize {
        self.parameters.iter().map(|p| p.port.tensor.elements()).sum()
    }

    /// The floating-point operations of an update with so many micro-batches, without what is computed a second time to
    /// save memory.
    pub fn update_flops(&self, micro_batches: usize) -> f64 {
        let sum = |range: Range<usize>| self.launches[range].iter().map(|l| l.cost.flops).sum::<f64>();
        let again = self.rematerialized.map_or(0.0, |r| r.flops);
        micro_batches as f64 * (sum(self.step_range()) - again) + sum(self.update_range())
    }

    /// The work of a step with one micro-batch.
    pub fn cost(&self) -> Cost {
        self.launches
            .iter()
            .fold(Cost::default(), |sum, l| Cost { flops: sum.flops + l.cost.flops, bytes: sum.bytes + l.cost.bytes })
    }
}

fn precision_of(world: &World, node: NodeId) -> Precision {
    world.get::<Precision>(node).copied().unwrap_or_default()
}

/// The launches that write a value; those that write its parts where it is a view.
fn sources(world: &World, number: &HashMap<NodeId, usize>, value: ValueId) -> Vec<usize> {
    let Some((node, _)) = world.producer(value) else { return Vec::new() };
    if let Some(&launch) = number.get(&node) {
        return vec![launch];
    }
    let mut all: Vec<usize> = world.inputs(node).into_iter().flat_map(|v| sources(world, number, v)).collect();
    all.sort_unstable();
    all.dedup();
    all
}

/// The plan's launches with their kernels.
///
/// # Errors
/// Every node without a kernel for the device.
pub fn lower(world: &World, plan: &Plan, target: Target) -> Result<Vec<Launch>, Errors> {
    let seed = world.resource::<Options>().map_or(0, |o| o.seed);
    let mut errors = Errors::default();
    let mut launches = Vec::with_capacity(plan.launches.len());
    for planned in &plan.launches {
        let inputs = types_of(world, &world.inputs(planned.node));
        let outputs = types_of(world, &world.outputs(planned.node));
        let precision = precision_of(world, planned.node);
        let view = NodeView { name: &planned.name, inputs: &inputs, outputs: &outputs, seed, precision };
        match world.expect::<OpRef>(planned.node).0.lower(&view, target) {
            Ok(kernel) => launches.push(Launch {
                name: planned.name.clone(),
                kernel,
                inputs: planned.inputs.clone(),
                outputs: planned.outputs.clone(),
                in_place: planned.in_place.clone(),
            }),
            Err(e) => {
                let mut diagnostic = Diagnostic::new(e.0).row(planned.name.clone());
                diagnostic.span = world.get::<Place>(planned.node).map(|p| p.0.clone());
                errors.push(diagnostic);
            }
        }
    }
    errors.into_result()?;
    Ok(launches)
}
