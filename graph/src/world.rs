//! Entities with typed component columns over a petgraph topology.
//!
//! The same world holds a model (nodes are ops, values are tensors) and a pipeline (nodes are stages, values
//! are what flows between them). Nodes and values are entities; an edge runs from a node to each value it
//! produces and from a value to each node that reads it, labelled with the port.

use std::any::{Any, TypeId, type_name};
use std::collections::HashMap;

use petgraph::Direction::{Incoming, Outgoing};
use petgraph::stable_graph::{NodeIndex, StableDiGraph};
use petgraph::visit::EdgeRef;

/// Anything that has components: a node or a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Entity(NodeIndex);

/// One use of an op or stage.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NodeId(NodeIndex);

/// What a node produces, or an input of the whole graph.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ValueId(NodeIndex);

impl From<NodeId> for Entity {
    fn from(id: NodeId) -> Self {
        Entity(id.0)
    }
}

impl From<ValueId> for Entity {
    fn from(id: ValueId) -> Self {
        Entity(id.0)
    }
}

impl NodeId {
    /// Position in creation order.
    pub fn index(self) -> usize {
        self.0.index()
    }
}

impl ValueId {
    /// Position in creation order.
    pub fn index(self) -> usize {
        self.0.index()
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Node,
    Value,
}

trait AnyColumn: Send + Sync {
    fn as_any(&self) -> &dyn Any;
    fn as_any_mut(&mut self) -> &mut dyn Any;
    fn clear(&mut self, index: usize);
}

struct Column<T>(Vec<Option<T>>);

impl<T: Send + Sync + 'static> AnyColumn for Column<T> {
    fn as_any(&self) -> &dyn Any {
        self
    }
    fn as_any_mut(&mut self) -> &mut dyn Any {
        self
    }
    fn clear(&mut self, index: usize) {
        if let Some(slot) = self.0.get_mut(index) {
            *slot = None;
        }
    }
}

/// Topology, component columns, and resources (facts about the whole graph).
#[derive(Default)]
pub struct World {
    topology: StableDiGraph<Kind, usize>,
    columns: HashMap<TypeId, Box<dyn AnyColumn>>,
    resources: HashMap<TypeId, Box<dyn Any + Send + Sync>>,
}

impl World {
    /// An empty world.
    pub fn new() -> Self {
        Self::default()
    }

    /// A new node without inputs or outputs.
    pub fn add_node(&mut self) -> NodeId {
        NodeId(self.topology.add_node(Kind::Node))
    }

    /// A value that no node produces: an input of the graph, a parameter, a state.
    pub fn add_source(&mut self) -> ValueId {
        ValueId(self.topology.add_node(Kind::Value))
    }

    /// The value that `node` produces at output `port`.
    pub fn add_output(&mut self, node: NodeId, port: usize) -> ValueId {
        let value = self.add_source();
        self.topology.add_edge(node.0, value.0, port);
        value
    }

    /// Makes `value` input `port` of `node`.
    pub fn connect(&mut self, value: ValueId, node: NodeId, port: usize) {
        self.topology.add_edge(value.0, node.0, port);
    }

    /// Makes `value` the next input of `node`.
    pub fn push_input(&mut self, node: NodeId, value: ValueId) {
        let port = self.topology.edges_directed(node.0, Incoming).count();
        self.connect(value, node, port);
    }

    /// The inputs of a node, by port.
    pub fn inputs(&self, node: NodeId) -> Vec<ValueId> {
        self.sorted(self.topology.edges_directed(node.0, Incoming).map(|e| (*e.weight(), e.source())))
    }

    /// The outputs of a node, by port.
    pub fn outputs(&self, node: NodeId) -> Vec<ValueId> {
        self.sorted(self.topology.edges_directed(node.0, Outgoing).map(|e| (*e.weight(), e.target())))
    }

    fn sorted(&self, ports: impl Iterator<Item = (usize, NodeIndex)>) -> Vec<ValueId> {
        let mut ports: Vec<_> = ports.collect();
        ports.sort_unstable_by_key(|p| p.0);
        ports.into_iter().map(|p| ValueId(p.1)).collect()
    }

    /// The node that produces a value and its output port; `None` for a source.
    pub fn producer(&self, value: ValueId) -> Option<(NodeId, usize)> {
        self.topology.edges_directed(value.0, Incoming).next().map(|e| (NodeId(e.source()), *e.weight()))
    }

    /// The nodes that read a value and the input port of each, in order of creation.
    pub fn consumers(&self, value: ValueId) -> Vec<(NodeId, usize)> {
        let mut consumers: Vec<_> =
            self.topology.edges_directed(value.0, Outgoing).map(|e| (NodeId(e.target()), *e.weight())).collect();
        consumers.sort_unstable();
        consumers
    }

    /// Lets every reader of `old` read `new` instead.
    pub fn replace_uses(&mut self, old: ValueId, new: ValueId) {
        let edges: Vec<_> =
            self.topology.edges_directed(old.0, Outgoing).map(|e| (e.id(), e.target(), *e.weight())).collect();
        for (edge, node, port) in edges {
            self.topology.remove_edge(edge);
            self.topology.add_edge(new.0, node, port);
        }
    }

    /// Lets input `port` of `node` read `new`.
    pub fn replace_input(&mut self, node: NodeId, port: usize, new: ValueId) {
        let edge = self.topology.edges_directed(node.0, Incoming).find(|e| *e.weight() == port).map(|e| e.id());
        if let Some(edge) = edge {
            self.topology.remove_edge(edge);
        }
        self.connect(new, node, port);
    }

    /// Gives a node other inputs.
    pub fn set_inputs(&mut self, node: NodeId, inputs: &[ValueId]) {
        let edges: Vec<_> = self.topology.edges_directed(node.0, Incoming).map(|e| e.id()).collect();
        edges.into_iter().for_each(|e| {
            self.topology.remove_edge(e);
        });
        inputs.iter().enumerate().for_each(|(port, &value)| self.connect(value, node, port));
    }

    /// Gives a node other outputs, which may be those of other nodes now. An output that it does not keep and that
    /// no other node takes over goes.
    pub fn set_outputs(&mut self, node: NodeId, outputs: &[ValueId]) {
        for old in self.outputs(node) {
            match outputs.contains(&old) {
                true => self.detach(old),
                false => self.remove(old.0),
            }
        }
        for (port, &value) in outputs.iter().enumerate() {
            self.detach(value);
            self.topology.add_edge(node.0, value.0, port);
        }
    }

    /// Takes a value from its producer.
    fn detach(&mut self, value: ValueId) {
        if let Some(edge) = self.topology.edges_directed(value.0, Incoming).next().map(|e| e.id()) {
            self.topology.remove_edge(edge);
        }
    }

    /// Removes a node and its outputs, with all their components.
    pub fn remove_node(&mut self, node: NodeId) {
        for value in self.outputs(node) {
            self.remove(value.0);
        }
        self.remove(node.0);
    }

    /// Removes a source value.
    pub fn remove_source(&mut self, value: ValueId) {
        self.remove(value.0);
    }

    fn remove(&mut self, index: NodeIndex) {
        self.topology.remove_node(index);
        self.columns.values_mut().for_each(|c| c.clear(index.index()));
    }

    /// All nodes, in order of creation.
    pub fn nodes(&self) -> Vec<NodeId> {
        self.topology.node_indices().filter(|&i| self.topology[i] == Kind::Node).map(NodeId).collect()
    }

    /// All values, in order of creation.
    pub fn values(&self) -> Vec<ValueId> {
        self.topology.node_indices().filter(|&i| self.topology[i] == Kind::Value).map(ValueId).collect()
    }

    /// Nodes so that each comes after the producers of its inputs, otherwise in order of creation.
    ///
    /// # Errors
    /// The nodes that lie on or behind a cycle.
    pub fn topological(&self) -> Result<Vec<NodeId>, Vec<NodeId>> {
        let nodes = self.nodes();
        let mut waiting: HashMap<NodeId, usize> = HashMap::with_capacity(nodes.len());
        let mut ready = std::collections::BinaryHeap::new();
        for &node in &nodes {
            let count = self.inputs(node).iter().filter(|v| self.producer(**v).is_some()).count();
            waiting.insert(node, count);
            if count == 0 {
                ready.push(std::cmp::Reverse(node));
            }
        }
        let mut order = Vec::with_capacity(nodes.len());
        while let Some(std::cmp::Reverse(node)) = ready.pop() {
            order.push(node);
            for value in self.outputs(node) {
                for (consumer, _) in self.consumers(value) {
                    let count = waiting.get_mut(&consumer).expect("every node was counted");
                    *count -= 1;
                    if *count == 0 {
                        ready.push(std::cmp::Reverse(consumer));
                    }
                }
            }
        }
        if order.len() == nodes.len() {
            return Ok(order);
        }
        let done: std::collections::HashSet<_> = order.into_iter().collect();
        Err(nodes.into_iter().filter(|n| !done.contains(n)).collect())
    }

    /// Sets a component.
    pub fn set<T: Send + Sync + 'static>(&mut self, entity: impl Into<Entity>, component: T) {
        let index = entity.into().0.index();
        let column = self.columns.entry(TypeId::of::<T>()).or_insert_with(|| Box::new(Column::<T>(Vec::new())));
        let column: &mut Column<T> = column.as_any_mut().downcast_mut().expect("keyed by type");
        if column.0.len() <= index {
            column.0.resize_with(index + 1, || None);
        }
        column.0[index] = Some(component);
    }

    /// A component, if the entity has it.
    pub fn get<T: Send + Sync + 'static>(&self, entity: impl Into<Entity>) -> Option<&T> {
        let column: &Column<T> = self.columns.get(&TypeId::of::<T>())?.as_any().downcast_ref()?;
        column.0.get(entity.into().0.index())?.as_ref()
    }

    /// A component that an earlier system must have set.
    ///
    /// # Panics
    /// If the entity does not have it, which is a bug in the order of systems.
    #[track_caller]
    pub fn expect<T: Send + Sync + 'static>(&self, entity: impl Into<Entity>) -> &T {
        self.get(entity).unwrap_or_else(|| panic!("an earlier system sets {}", type_name::<T>()))
    }

    /// Takes a component away.
    pub fn take<T: Send + Sync + 'static>(&mut self, entity: impl Into<Entity>) -> Option<T> {
        let column: &mut Column<T> = self.columns.get_mut(&TypeId::of::<T>())?.as_any_mut().downcast_mut()?;
        column.0.get_mut(entity.into().0.index())?.take()
    }

    /// Sets a fact about the whole graph.
    pub fn set_resource<T: Send + Sync + 'static>(&mut self, resource: T) {
        self.resources.insert(TypeId::of::<T>(), Box::new(resource));
    }

    /// A fact about the whole graph, if known.
    pub fn resource<T: Send + Sync + 'static>(&self) -> Option<&T> {
        self.resources.get(&TypeId::of::<T>())?.downcast_ref()
    }

    /// A fact about the whole graph, for changing.
    pub fn resource_mut<T: Send + Sync + 'static>(&mut self) -> Option<&mut T> {
        self.resources.get_mut(&TypeId::of::<T>())?.downcast_mut()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_keep_their_order_and_components_their_entity() {
        let mut world = World::new();
        let (x, n) = (world.add_source(), world.add_node());
        let y = world.add_output(n, 0);
        let z = world.add_output(n, 1);
        let m = world.add_node();
        for v in [z, x, z] {
            world.push_input(m, v);
        }
        world.connect(x, n, 0);
        assert_eq!(world.inputs(m), [z, x, z]);
        assert_eq!(world.outputs(n), [y, z]);
        assert_eq!(world.producer(z), Some((n, 1)));
        assert_eq!(world.consumers(z), [(m, 0), (m, 2)]);
        assert_eq!(world.topological().unwrap(), [n, m]);
        world.set(y, "y");
        assert_eq!(world.get::<&str>(y), Some(&"y"));
        assert_eq!(world.get::<&str>(z), None);
        world.replace_uses(z, x);
        assert_eq!(world.inputs(m), [x, x, x]);
        world.remove_node(n);
        assert_eq!(world.get::<&str>(y), None);
    }

    #[test]
    fn a_cycle_is_reported() {
        let mut world = World::new();
        let (a, b, c) = (world.add_node(), world.add_node(), world.add_node());
        let (x, y) = (world.add_output(a, 0), world.add_output(b, 0));
        world.connect(x, b, 0);
        world.connect(y, a, 0);
        world.push_input(c, x);
        assert_eq!(world.topological().unwrap_err(), [a, b, c]);
    }
}
