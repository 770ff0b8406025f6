//! `dataflow ops [NAME]`

use std::sync::Arc;

use clap::Args;
use dataflow_graph::diagnostic::{Diagnostic, Errors};
use dataflow_graph::registry::{Entry, Info, Registry, Table};
use serde_json::json;

use super::{print, print_json};
use crate::stages::Stage;

#[derive(Args)]
pub(super) struct Ops {
    /// An op or stage to describe
    name: Option<String>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// An entry of any kind.
struct Shown<'a> {
    kind: &'static str,
    info: Info,
    attributes: &'a [&'static str],
    sample: &'a str,
}

fn shown<'a, K: ?Sized>(kind: &'static str, table: Option<&'a Table<K>>) -> Vec<Shown<'a>> {
    let show = |e: &'a Entry<K>| Shown { kind, info: e.info, attributes: e.attributes, sample: &e.shown };
    table.iter().flat_map(|t| t.entries()).map(show).collect()
}

impl Ops {
    pub(super) fn run(self, registry: &Arc<Registry>) -> Result<(), Errors> {
        let mut all = shown("op", registry.ops());
        all.extend(shown("stage", registry.table::<dyn Stage>()));
        if let Some(name) = &self.name {
            if !all.iter().any(|s| s.info.name == name) {
                let known: Vec<&str> = all.iter().map(|s| s.info.name).collect();
                let message = format!("there is no op or stage `{name}`");
                let diagnostic = Diagnostic::new(message).help("`dataflow ops` lists them");
                return Err(diagnostic.nearest(name, known).into());
            }
            all.retain(|s| s.info.name == name);
        }
        if self.json {
            let list: Vec<_> = all
                .iter()
                .map(|s| {
                    json!({
                        "name": s.info.name, "kind": s.kind, "about": s.info.about, "inputs": s.info.inputs,
                        "attributes": s.attributes, "sample": s.sample, "required": s.info.example,
                        "formula": s.info.formula, "source": s.info.source,
                    })
                })
                .collect();
            print_json(&json!({ "ops": list }));
        } else if self.name.is_some() {
            all.iter().for_each(|s| print(&describe(s)));
        } else {
            let width = all.iter().map(|s| s.info.name.len()).max().unwrap_or(0);
            let mut kind = "";
            for s in &all {
                if s.kind != kind {
                    print(&format!("{}s:\n", s.kind));
                    kind = s.kind;
                }
                print(&format!("  {:width$}  {}\n", s.info.name, s.info.about));
            }
            print("\n`dataflow ops NAME` shows inputs, attributes, formula and source of one of them\n");
        }
        Ok(())
    }
}

fn describe(s: &Shown<'_>) -> String {
    let mut text = format!("{} ({})\n  {}\n", s.info.name, s.kind, s.info.about);
    let mut line = |name: &str, value: &str| {
        if !value.is_empty() {
            text += &format!("  {name:<12} {}\n", value.replace('\n', "\n               "));
        }
    };
    line("inputs:", &s.info.inputs.join(", "));
    line("formula:", s.info.formula);
    line("source:", s.info.source);
    line("attributes:", &s.attributes.join(", "));
    let example = s.info.example;
    line("must be set:", example.strip_prefix('(').and_then(|e| e.strip_suffix(')')).unwrap_or(example));
    // with the defaults of all attributes that need not be set
    if !s.attributes.is_empty() {
        line("in full:", &format!("{}{}", s.info.name, s.sample));
    }
    text
}
