//! A model file: `config`, rows, and blocks of rows.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;

use ron::value::RawValue;
use serde::Deserialize;

use super::formula::{Formula, Number};
use super::number::{FOLLOWS, Scope};
use super::rows::{Row, parse_file, parse_rows, read_source};
use crate::diagnostic::{Diagnostic, Errors, Source, Span, nearest};

/// Config names that every pipeline may set, whether a model uses them or not: vocabulary size, width, depth,
/// heads, context length, dropout rate.
pub const COMMON_CONFIG: [&str; 6] = ["vocab", "d_model", "n_layer", "n_head", "block", "dropout"];

#[derive(Deserialize)]
#[serde(rename = "Model", deny_unknown_fields)]
struct RawModel<'a> {
    #[serde(default)]
    about: String,
    #[serde(default)]
    prefix: String,
    #[serde(default)]
    config: BTreeMap<String, RawConfig>,
    #[serde(borrow)]
    nodes: Vec<&'a RawValue>,
    #[serde(default, borrow)]
    blocks: BTreeMap<String, RawBlock<'a>>,
    #[serde(default)]
    output: Option<String>,
}

#[derive(Deserialize)]
#[serde(rename = "Block", deny_unknown_fields)]
struct RawBlock<'a> {
    inputs: Vec<String>,
    output: String,
    #[serde(borrow)]
    nodes: Vec<&'a RawValue>,
}

/// A number or the text of an expression.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(untagged)]
enum RawConfig {
    Flag(bool),
    Int(i64),
    Real(f64),
    Formula(String),
}

/// A sub-graph that `Repeat` instantiates.
#[derive(Clone, Debug)]
pub struct Block {
    /// Names that its rows may use for its inputs.
    pub inputs: Vec<String>,
    /// The name of its result.
    pub output: String,
    /// Its rows.
    pub rows: Vec<Row>,
}

/// A parsed model file.
#[derive(Clone, Debug)]
pub struct ModelFile {
    /// The file's text.
    pub source: Arc<Source>,
    /// What the model is, in a line or two.
    pub about: String,
    /// Put before every parameter name.
    pub prefix: String,
    /// Its rows.
    pub rows: Vec<Row>,
    /// Its blocks.
    pub blocks: BTreeMap<String, Block>,
    /// The row whose output is the model's: `logits` unless the file says otherwise.
    pub output: String,
    config: BTreeMap<String, RawConfig>,
}

impl ModelFile {
    /// Reads and parses a file.
    ///
    /// # Errors
    /// Everything that is wrong with its rows.
    pub fn read(path: &Path) -> Result<Self, Errors> {
        Self::parse(read_source(path)?)
    }

    /// Parses a text.
    ///
    /// # Errors
    /// Everything that is wrong with its rows.
    pub fn parse(source: Arc<Source>) -> Result<Self, Errors> {
        let raw: RawModel<'_> =
            parse_file(&source, "Model(config: {\"name\": number}, nodes: [rows], blocks: {\"name\": Block(…)})")?;
        let mut errors = Errors::default();
        let rows = parse_rows(&source, &raw.nodes, &mut errors);
        let mut blocks = BTreeMap::new();
        for (name, block) in &raw.blocks {
            let rows = parse_rows(&source, &block.nodes, &mut errors);
            blocks.insert(name.clone(), Block { inputs: block.inputs.clone(), output: block.output.clone(), rows });
        }
        let output = raw.output.unwrap_or_else(|| "logits".into());
        if errors.0.is_empty() && rows.iter().all(|r| r.names.iter().all(|n| n.text != output)) {
            let mut diagnostic = Diagnostic::new(format!("no row is named `{output}`, the model's output"))
                .help("name the last row \"logits\", or say `output: \"name\"`");
            let last = rows.last().map(|r| r.names[0].bytes.clone());
            diagnostic.span = Some(Span { source: source.clone(), bytes: last.unwrap_or(0..0) });
            errors.push(diagnostic);
        }
        let (about, prefix, config) = (raw.about, raw.prefix, raw.config);
        errors.into_result()?;
        Ok(Self { source, about, prefix, rows, blocks, output, config })
    }

    /// The value of every config name, with some of them replaced.
    ///
    /// # Errors
    /// An undeclared name in `set`, an expression without a value, or names that depend on each other.
    pub fn config(&self, set: &BTreeMap<String, Number>) -> Result<Scope, Errors> {
        let (scope, errors) = self.config_with_errors(set);
        errors.into_result()?;
        Ok(scope)
    }

    /// As [`config`](Self::config), with the names that do have a value in spite of errors: to find those of the rows
    /// as well.
    pub fn config_with_errors(&self, set: &BTreeMap<String, Number>) -> (Scope, Errors) {
        let mut wrong = BTreeSet::new();
        let mut errors = Errors::default();
        for name in set.keys().filter(|n| !self.config.contains_key(*n) && !COMMON_CONFIG.contains(&n.as_str())) {
            let known: Vec<&str> = self.config.keys().map(String::as_str).collect();
            let help = match nearest(name, known.iter().copied()) {
                Some(best) => format!("did you mean `{best}`?"),
                None => format!("there are: {}", known.join(", ")),
            };
            errors.push(Diagnostic::new(format!("`{}` has no config name `{name}`", self.source.name)).help(help));
        }
        let mut values: BTreeMap<String, Number> = set.clone();
        let mut formulas = BTreeMap::new();
        for (name, raw) in self.config.iter().filter(|(name, _)| !set.contains_key(*name)) {
            match raw {
                RawConfig::Flag(flag) => drop(values.insert(name.clone(), Number::Int((*flag).into()))),
                RawConfig::Int(i) => drop(values.insert(name.clone(), Number::Int(*i))),
                RawConfig::Real(x) => drop(values.insert(name.clone(), Number::Real(*x))),
                RawConfig::Formula(text) => match Formula::parse(text) {
                    Ok(formula) => drop(formulas.insert(name.clone(), formula)),
                    Err(e) => {
                        errors.push(self.config_error(name, e.to_string()));
                        wrong.insert(name.clone());
                    }
                },
            }
        }
        // evaluate what depends on known names only, until nothing more can be
        while !formulas.is_empty() {
            let ready: Vec<String> = formulas
                .iter()
                .filter(|(_, f)| f.names().iter().all(|n| !formulas.contains_key(*n)))
                .map(|(name, _)| name.clone())
                .collect();
            if ready.is_empty() {
                let names: Vec<_> = formulas.keys().cloned().collect();
                errors.push(self.config_error(&names[0], format!("these depend on each other: {}", names.join(", "))));
                wrong.extend(names);
                break;
            }
            let scope = Scope::new(values.clone()).without(wrong.clone());
            for name in ready {
                let formula = formulas.remove(&name).expect("just listed");
                match scope.evaluate(&formula.to_string()) {
                    Ok(value) => drop(values.insert(name, value)),
                    Err(e) => {
                        if e != FOLLOWS {
                            errors.push(self.config_error(&name, e));
                        }
                        wrong.insert(name);
                    }
                }
            }
        }
        (Scope::new(values).without(wrong), errors)
    }

    fn config_error(&self, name: &str, message: String) -> Diagnostic {
        let key = format!("\"{name}\"");
        let start = self.source.text.find("config").and_then(|c| self.source.text[c..].find(&key).map(|k| c + k));
        let diagnostic = Diagnostic::new(format!("config `{name}`: {message}"));
        match start {
            Some(start) => diagnostic.at(Span { source: self.source.clone(), bytes: start..start + key.len() }),
            None => diagnostic,
        }
    }
}
