//! `expand`: rows, blocks and repeats become nodes.
//!
//! Reads the resources `Arc<ModelFile>`, `Arc<Registry>`, `Scope`, `Options`, `Objectives`.
//! Writes the topology; `Name`, `Place`, `OpRef`, `Phase`, `RowNames` of nodes; `Name`, `Role` of values; the
//! resources `Inputs` and `Outputs`.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use serde::Deserialize;

use super::infer::{POSITIONS, SEQUENCES, shapes};
use super::push_once;
use crate::build::add_source;
use crate::components::{Inputs, Name, Objectives, OpRef, Options, Outputs, Phase, Place, Role};
use crate::diagnostic::{Diagnostic, Errors};
use crate::format::formula::Number;
use crate::format::model::ModelFile;
use crate::format::number::{FOLLOWS, Scope, Size, with_scope};
use crate::format::rows::{Row, order_rows};
use crate::op::Op;
use crate::registry::Registry;
use crate::types::TensorType;
use crate::world::{ValueId, World};

/// Of nodes: the names that the row gives to the outputs.
#[derive(Clone, Debug)]
pub struct RowNames(pub Vec<String>);

/// The attributes of `Repeat`, the one row that is no op: `times` copies of a block, each fed with the result
/// of the one before as its first input. In the block, `index` counts the copies from 0.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Repeat {
    block: String,
    times: Size,
    #[serde(default = "layer")]
    index: String,
}

fn layer() -> String {
    "layer".into()
}

/// Blocks within blocks beyond this are an error rather than a stack overflow.
const MAX_DEPTH: usize = 16;
/// Nodes beyond this are an error rather than all of the memory.
const MAX_NODES: usize = 200_000;

/// See the [module](self).
///
/// # Errors
/// Unknown ops, attributes, inputs and blocks, duplicate names, cycles: all of them at once.
pub fn expand(world: &mut World) -> Result<(), Errors> {
    let model = world.resource::<Arc<ModelFile>>().expect("set before compiling").clone();
    let registry = world.resource::<Arc<Registry>>().expect("set before compiling").clone();
    let scope = world.resource::<Scope>().expect("set before compiling").clone();
    let options = world.resource::<Options>().expect("set before compiling").clone();
    let objectives = world.resource::<Objectives>().cloned().unwrap_or_default();

    let shape = [options.batch, options.block];
    let tokens = add_source(world, "tokens", TensorType::i32(shape), Role::Input);
    let mut inputs = Inputs(BTreeMap::from([("tokens".to_string(), tokens)]));
    if options.recurrent.is_some() {
        for name in SEQUENCES {
            let value = add_source(world, name, TensorType::i32([options.batch]), Role::Input);
            inputs.0.insert(name.into(), value);
        }
    }

    if options.packed {
        inputs.0.insert(POSITIONS.into(), add_source(world, POSITIONS, TensorType::i32(shape), Role::Input));
    }

    let mut expander = Expander {
        world,
        model: &model,
        registry: &registry,
        training: options.training,
        errors: Errors::default(),
        nodes: 0,
        follows: false,
    };
    let names = HashMap::from([("tokens".to_string(), Some(tokens))]);
    let made = expander.rows(&model.rows, names, &model.prefix, &scope, 0);
    let (mut errors, follows) = (expander.errors, expander.follows);
    if follows || !errors.0.is_empty() {
        // also what is wrong with the shapes of the rows that could be expanded: all errors at once
        errors.extend(shapes(world, true));
        return Err(errors.sorted());
    }

    let logits = made.get(&model.output).copied().flatten().expect("checked when the file was parsed");
    let mut outputs = Outputs(BTreeMap::from([("logits".to_string(), logits)]));
    if !objectives.0.is_empty() {
        let targets = add_source(world, "targets", TensorType::i32(shape), Role::Input);
        inputs.0.insert("targets".into(), targets);
        for (name, op) in objectives.0 {
            let node = world.add_node();
            world.set(node, Name(name.clone()));
            world.set(node, Phase::Step);
            world.set(node, OpRef(op));
            world.set(node, RowNames(vec![name.clone()]));
            [logits, targets].into_iter().for_each(|v| world.push_input(node, v));
            outputs.0.insert(name, world.add_output(node, 0));
        }
        // a loss makes the logits an intermediate value that need not be kept for the host
        outputs.0.remove("logits");
    }
    if options.recurrent.is_some_and(|recurrence| !recurrence.logits) {
        outputs.0.remove("logits");
    }
    world.set_resource(inputs);
    world.set_resource(outputs);
    Ok(())
}

/// Values by name; `None` where the row that makes one is wrong.
type Names = HashMap<String, Option<ValueId>>;

struct Expander<'a> {
    world: &'a mut World,
    model: &'a Arc<ModelFile>,
    registry: &'a Registry,
    training: bool,
    errors: Errors,
    nodes: usize,
    /// A row is missing because of an error in the config.
    follows: bool,
}

impl Expander<'_> {
    fn report(&mut self, diagnostic: Diagnostic) {
        if diagnostic.message.contains(FOLLOWS) {
            self.follows = true; // the config's own error is with the caller
            return;
        }
        push_once(&mut self.errors, diagnostic);
    }

    /// Instantiates a list of rows; returns `names` with what they make.
    fn rows(&mut self, rows: &[Row], mut names: Names, path: &str, scope: &Scope, depth: usize) -> Names {
        let outer: Vec<&str> = names.keys().map(String::as_str).collect();
        let (order, errors) = order_rows(&self.model.source, rows, &outer);
        for mut error in errors.0 {
            error.row = error.row.map(|row| join(path, &row));
            self.report(error);
        }
        for i in order {
            let row = &rows[i];
            let made = if row.op.text == "Repeat" {
                self.repeat(row, &names, path, scope, depth).map(|v| vec![v])
            } else {
                self.node(row, &names, path, scope)
            };
            for (k, name) in row.names.iter().enumerate() {
                names.insert(name.text.clone(), made.as_ref().and_then(|m| m.get(k).copied()));
            }
        }
        names
    }

    fn node(&mut self, row: &Row, names: &Names, path: &str, scope: &Scope) -> Option<Vec<ValueId>> {
        let path = join(path, row.name());
        let parsed = with_scope(scope, || row.parse::<dyn Op>(&self.model.source, self.registry.ops(), "op"));
        let op = match parsed {
            Ok(op) => op,
            Err(mut diagnostic) => {
                if diagnostic.help.is_none() && self.registry.ops().is_none_or(|t| t.get(&row.op.text).is_none()) {
                    diagnostic.help = Some("`dataflow ops` lists the ops".into());
                }
                self.report(diagnostic.row(path));
                return None;
            }
        };
        let op = op.placed(&path).unwrap_or(op);
        let op = if self.training { op } else { op.evaluation().unwrap_or(op) };
        let inputs: Option<Vec<ValueId>> = row.inputs.iter().map(|i| value_of(names, &i.text)).collect();
        let inputs = inputs?;
        self.nodes += 1;
        if self.nodes > MAX_NODES {
            self.too_many(row, &path);
            return None;
        }
        let node = self.world.add_node();
        self.world.set(node, Place(row.span(&self.model.source)));
        self.world.set(node, Phase::Step);
        self.world.set(node, OpRef(op));
        self.world.set(node, RowNames(row.names.iter().map(|n| n.text.clone()).collect()));
        inputs.into_iter().for_each(|v| self.world.push_input(node, v));
        let prefix = path.strip_suffix(row.name()).unwrap_or("").to_string();
        let outputs = row.names.iter().enumerate().map(|(port, name)| {
            let value = self.world.add_output(node, port);
            self.world.set(value, Name(format!("{prefix}{}", name.text)));
            value
        });
        let outputs = outputs.collect();
        self.world.set(node, Name(path));
        Some(outputs)
    }

    /// Says so once.
    fn too_many(&mut self, row: &Row, path: &str) {
        if self.nodes == MAX_NODES + 1 {
            let message = format!("the model has more than {MAX_NODES} nodes");
            self.report(Diagnostic::new(message).at(row.span(&self.model.source)).row(path).help("repeat fewer times"));
        }
    }

    fn repeat(&mut self, row: &Row, names: &Names, path: &str, scope: &Scope, depth: usize) -> Option<ValueId> {
        let source = &self.model.source;
        let path = join(path, row.name());
        let repeat: Repeat = match with_scope(scope, || row.parse_as(source)) {
            Ok(repeat) => repeat,
            Err(e) => {
                self.report(e.row(path));
                return None;
            }
        };
        let Some(block) = self.model.blocks.get(&repeat.block) else {
            let message = format!("there is no block `{}`", repeat.block);
            let known = self.model.blocks.keys().map(String::as_str);
            let diagnostic = Diagnostic::new(message).at(row.span(source)).row(path).nearest(&repeat.block, known);
            self.report(diagnostic);
            return None;
        };
        let wrong = |message: String| Diagnostic::new(message).at(row.span(source)).row(&path);
        if depth >= MAX_DEPTH {
            self.report(wrong(format!("blocks are nested more than {MAX_DEPTH} deep")));
            return None;
        }
        if row.inputs.len() != block.inputs.len() || block.inputs.is_empty() || row.names.len() != 1 {
            self.report(wrong(format!(
                "block `{}` takes {} input(s) and gives one output, but the row has {} and {}",
                repeat.block,
                block.inputs.len(),
                row.inputs.len(),
                row.names.len()
            )));
            return None;
        }
        let block_makes = block.rows.iter().flat_map(|r| &r.names).map(|n| n.text.as_str());
        if !block_makes.clone().any(|n| n == block.output) && !block.inputs.contains(&block.output) {
            let message = format!("block `{}` has no row named `{}`, its output", repeat.block, block.output);
            self.report(wrong(message).nearest(&block.output, block_makes));
            return None;
        }
        let mut carried = value_of(names, &row.inputs[0].text);
        for i in 0..*repeat.times {
            let scope = scope.with(&repeat.index, Number::Int(i as i64));
            let mut inner: Names = HashMap::new();
            for (name, input) in block.inputs.iter().zip(&row.inputs) {
                inner.insert(name.clone(), value_of(names, &input.text));
            }
            inner.insert(block.inputs[0].clone(), carried);
            let made = self.rows(&block.rows, inner, &join(&path, &i.to_string()), &scope, depth + 1);
            carried = value_of(&made, &block.output);
            // a block may be empty
            self.nodes += 1;
            if self.nodes > MAX_NODES {
                self.too_many(row, &path);
            }
            if carried.is_none() || self.nodes > MAX_NODES {
                return None;
            }
        }
        carried
    }
}

fn join(path: &str, name: &str) -> String {
    if path.is_empty() { name.to_string() } else { format!("{path}.{name}") }
}

/// The value of this name, if its row is there and right.
fn value_of(names: &Names, name: &str) -> Option<ValueId> {
    names.get(name).copied().flatten()
}
