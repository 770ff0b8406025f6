//! A pipeline file: rows that name stages, made a graph, checked, and run.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use dataflow_graph::components::{Name, Place};
use dataflow_graph::diagnostic::{Diagnostic, Errors, Source};
use dataflow_graph::format::number::Size;
use dataflow_graph::format::rows::{Row, order_rows, parse_file, parse_rows, read_source};
use dataflow_graph::format::set::set;
use dataflow_graph::registry::Registry;
use dataflow_graph::world::{NodeId, ValueId, World};
use ron::value::RawValue;
use serde::Deserialize;

use crate::data::BatchSource;
use crate::signals;
use crate::stages::{Kind, Product, Run, RunFolderChoice, Stage, StageError};
use crate::trainer::Summary;

#[derive(Deserialize)]
#[serde(rename = "Pipeline", deny_unknown_fields)]
struct RawPipeline<'a> {
    #[serde(default)]
    about: String,
    #[serde(default)]
    seed: Size,
    #[serde(borrow)]
    stages: Vec<&'a RawValue>,
}

/// A parsed pipeline file.
#[derive(Clone, Debug)]
pub struct PipelineFile {
    /// The file's text, with what was set.
    pub source: Arc<Source>,
    /// What the pipeline does, in a line or two.
    pub about: String,
    /// The seed of everything random.
    pub seed: u64,
    /// Its rows.
    pub rows: Vec<Row>,
}

impl PipelineFile {
    /// Reads a file and applies `--set row.attribute=value`.
    ///
    /// # Errors
    /// Everything that is wrong with the file, or a setting that fits no row.
    pub fn read(path: &Path, settings: &[String]) -> Result<Self, Errors> {
        Self::with(read_source(path)?, settings)
    }

    /// Parses a text and applies settings.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub fn with(source: Arc<Source>, settings: &[String]) -> Result<Self, Errors> {
        let mut file = Self::parse(source)?;
        for setting in settings {
            let (name, value) = setting.split_once('=').ok_or_else(|| {
                Diagnostic::new(format!("--set {setting}: there is no `=`")).help("write --set row.attribute=value")
            })?;
            file = Self::parse(set(&file.source, &file.rows, name.trim(), value)?)?;
        }
        Ok(file)
    }

    /// Parses a text.
    ///
    /// # Errors
    /// Everything that is wrong with its rows.
    pub fn parse(source: Arc<Source>) -> Result<Self, Errors> {
        let raw: RawPipeline<'_> = parse_file(&source, "Pipeline(stages: [rows])")?;
        let mut errors = Errors::default();
        let rows = parse_rows(&source, &raw.stages, &mut errors);
        let (about, seed) = (raw.about, *raw.seed as u64);
        errors.into_result()?;
        Ok(Self { source, about, seed, rows })
    }
}

/// Of nodes: the stage.
struct StageRef(Arc<dyn Stage>);

/// Of values: what a started stage made.
struct Made(Arc<Product>);

/// A pipeline as a graph of stages.
pub struct Pipeline {
    world: World,
}

impl Pipeline {
    /// Finds the stages of all rows and checks that they fit together.
    ///
    /// # Errors
    /// Unknown stages, wrong attributes, missing inputs, cycles, inputs of the wrong kind: all at once.
    pub fn new(file: &PipelineFile, registry: &Registry) -> Result<Self, Errors> {
        let (order, mut errors) = order_rows(&file.source, &file.rows, &[]);
        let mut world = World::new();
        let mut made: HashMap<&str, (ValueId, Kind)> = HashMap::new();
        for i in order {
            let row = &file.rows[i];
            let stage = match row.parse::<dyn Stage>(&file.source, registry.table(), "stage") {
                Ok(stage) => stage,
                Err(mut error) => {
                    error.help.get_or_insert_with(|| "`dataflow ops` lists the stages".into());
                    errors.push(error);
                    continue;
                }
            };
            let inputs: Option<Vec<_>> = row.inputs.iter().map(|n| made.get(n.text.as_str()).copied()).collect();
            let output = stage.output();
            let node = world.add_node();
            if let Some(inputs) = inputs {
                let found: Vec<Kind> = inputs.iter().map(|i| i.1).collect();
                if found != stage.inputs() {
                    errors.push(misfit(file, row, stage.inputs(), &found));
                }
                inputs.into_iter().for_each(|(value, _)| world.push_input(node, value));
            }
            world.set(node, Name(row.name().to_string()));
            world.set(node, Place(row.span(&file.source)));
            world.set(node, StageRef(stage));
            made.insert(row.name(), (world.add_output(node, 0), output));
        }
        errors.into_result()?;
        Ok(Self { world })
    }

    /// Every stage with its row's name.
    pub fn stages(&self) -> Vec<(String, Arc<dyn Stage>)> {
        let nodes = self.world.nodes();
        nodes.iter().map(|n| (self.name(*n), self.world.expect::<StageRef>(*n).0.clone())).collect()
    }

    fn name(&self, node: NodeId) -> String {
        self.world.expect::<Name>(node).0.clone()
    }

    /// Starts the stages in order and trains; stops behind the stage `until`, if one is given.
    ///
    /// # Errors
    /// What the first failing stage says, with its row.
    pub fn run(&mut self, run: &mut Run, until: Option<&str>) -> Result<Option<Summary>, Errors> {
        let mut nodes = self.world.topological().expect("rows are ordered");
        if let Some(until) = until {
            let Some(last) = nodes.iter().copied().find(|n| self.name(*n) == until) else {
                let names: Vec<String> = nodes.iter().map(|n| self.name(*n)).collect();
                let message = format!("--until {until}: there is no such row (rows: {})", names.join(", "));
                return Err(Diagnostic::new(message).nearest(until, names.iter().map(String::as_str)).into());
            };
            let needed = self.ancestors(last);
            nodes.retain(|n| needed.contains(n));
        }
        for node in nodes {
            let stage = self.world.expect::<StageRef>(node).0.clone();
            let inputs: Vec<Arc<Product>> =
                self.world.inputs(node).iter().map(|v| self.world.expect::<Made>(*v).0.clone()).collect();
            let inputs: Vec<&Product> = inputs.iter().map(|p| &**p).collect();
            let product = stage.start(run, &inputs).map_err(|e| self.stage_error(node, e))?;
            let output = self.world.outputs(node)[0];
            self.world.set(output, Made(Arc::new(product)));
        }
        if until.is_some() {
            return Ok(None);
        }
        let (Some(trainer), RunFolderChoice::Made(folder)) = (&mut run.trainer, &run.folder) else { return Ok(None) };
        // before this a signal ends the program, which has nothing to lose yet
        signals::listen().map_err(|e| Diagnostic::new(format!("cannot listen to signals: {e}")))?;
        let summary = trainer.run(folder, &mut run.hooks).map_err(|e| match e {
            StageError::File(errors) => errors,
            StageError::Message(message) => Diagnostic::new(message).into(),
        })?;
        Ok(Some(summary))
    }

    /// Where the batches of the pipeline come from, if it has some: starts what they need, and nothing else.
    ///
    /// # Errors
    /// What the first failing stage says, with its row.
    pub fn batches(&mut self, run: &mut Run) -> Result<Option<Box<dyn BatchSource>>, Errors> {
        let makes = |n: &NodeId| self.world.expect::<StageRef>(*n).0.output() == Kind::Batches;
        let Some(node) = self.world.nodes().into_iter().find(makes) else { return Ok(None) };
        let name = self.name(node);
        self.run(run, Some(&name))?;
        match &*self.world.expect::<Made>(self.world.outputs(node)[0]).0 {
            Product::Batches(source) => Ok(Some(source.duplicate())),
            _ => Ok(None),
        }
    }

    fn ancestors(&self, node: NodeId) -> Vec<NodeId> {
        let mut found = vec![node];
        let mut at = 0;
        while at < found.len() {
            let producers = self.world.inputs(found[at]).into_iter().filter_map(|v| self.world.producer(v));
            for (producer, _) in producers.collect::<Vec<_>>() {
                if !found.contains(&producer) {
                    found.push(producer);
                }
            }
            at += 1;
        }
        found
    }

    fn stage_error(&self, node: NodeId, error: StageError) -> Errors {
        match error {
            // what has no place in a file of its own has one here
            StageError::File(mut errors) => {
                for error in errors.0.iter_mut().filter(|e| e.span.is_none()) {
                    error.row.get_or_insert_with(|| self.name(node));
                    error.span = self.world.get::<Place>(node).map(|p| p.0.clone());
                }
                errors
            }
            StageError::Message(message) => {
                let mut diagnostic = Diagnostic::new(message).row(self.name(node));
                diagnostic.span = self.world.get::<Place>(node).map(|p| p.0.clone());
                diagnostic.into()
            }
        }
    }
}

fn misfit(file: &PipelineFile, row: &Row, wanted: &[Kind], found: &[Kind]) -> Diagnostic {
    let list = |kinds: &[Kind]| match kinds {
        [] => "nothing".to_string(),
        kinds => kinds.iter().map(Kind::to_string).collect::<Vec<_>>().join(" and "),
    };
    Diagnostic::new(format!("`{}` takes {}, but the row gives {}", row.op.text, list(wanted), list(found)))
        .at(row.span(&file.source))
        .row(row.name())
}
