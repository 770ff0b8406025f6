//! Mapping files: how other programs name the tensors of a model.
//!
//! ```ron
//! Mapping(
//!     about: "whose names these are",
//!     rows: [
//!         // `*` is any text, and the same text on the right
//!         Rename(from: "backbone.*", to: "transformer.backbone.*"),
//!         // rows of several matrices one below the other
//!         Stack(from: ["layers.*.q.weight", "layers.*.k.weight"], to: "h.*.qk.weight"),
//!         Ignore("*.inv_freq"),
//!     ],
//! )
//! ```

use std::path::Path;

use dataflow_graph::diagnostic::{Diagnostic, Errors};
use serde::Deserialize;

use crate::checkpoint::{Numbers, Tensor, Tensors};
use crate::files::FileError;

/// A mapping file.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename = "Mapping", deny_unknown_fields)]
pub struct Mapping {
    /// Whose names these are.
    #[serde(default)]
    pub about: String,
    rows: Vec<Row>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
enum Row {
    /// Another name.
    Rename { from: String, to: String },
    /// Several tensors in one, along the first dimension.
    Stack { from: Vec<String>, to: String },
    /// No tensor of the model.
    Ignore(String),
}

impl Mapping {
    /// Reads a file.
    ///
    /// # Errors
    /// What is wrong with it, with line and column.
    pub fn read(path: &Path) -> Result<Self, Errors> {
        let text = std::fs::read_to_string(path).map_err(FileError::on("read", path));
        let text = text.map_err(|e| Diagnostic::new(e.to_string()))?;
        Self::parse(&text).map_err(|e| Diagnostic::new(format!("{}:{e}", path.display())).into())
    }

    fn parse(text: &str) -> Result<Self, String> {
        let mapping: Self = ron::from_str(text).map_err(|e| e.to_string())?;
        for row in &mapping.rows {
            let stars = |text: &str| text.matches('*').count();
            let (from, to) = match row {
                Row::Rename { from, to } => (vec![from], Some(to)),
                Row::Stack { from, to } => (from.iter().collect(), Some(to)),
                Row::Ignore(from) => (vec![from], None),
            };
            if from.is_empty() || from.iter().any(|f| stars(f) > 1 || to.is_some_and(|to| stars(to) != stars(f))) {
                return Err(format!(" {row:?}: a name has one `*` at most, and then those on both sides have"));
            }
        }
        Ok(mapping)
    }

    /// The tensors under the model's names. The first row that fits a name counts; tensors of no row keep their names.
    ///
    /// # Errors
    /// A part of a stack that is missing or has another shape than the others.
    pub fn apply(&self, mut tensors: Tensors) -> Result<Tensors, String> {
        let mut mapped = Tensors::new();
        for row in &self.rows {
            match row {
                Row::Ignore(from) => tensors.retain(|name, _| matched(from, name).is_none()),
                Row::Rename { from, to } => {
                    for (name, star) in all(from, &tensors) {
                        let tensor = tensors.remove(&name).expect("just listed");
                        mapped.insert(to.replace('*', &star), tensor);
                    }
                }
                Row::Stack { from, to } => {
                    for (_, star) in all(&from[0], &tensors) {
                        let names: Vec<String> = from.iter().map(|f| f.replace('*', &star)).collect();
                        let part = |name: &String| {
                            tensors.remove(name).ok_or_else(|| format!("`{name}` is missing, a part of `{to}`"))
                        };
                        let parts = names.iter().map(part).collect::<Result<Vec<_>, _>>()?;
                        let tensor = stack(parts).map_err(|e| format!("{}: {e}", names.join(", ")))?;
                        mapped.insert(to.replace('*', &star), tensor);
                    }
                }
            }
        }
        // what no row knows is reported as extra, under its own name
        mapped.extend(tensors);
        Ok(mapped)
    }
}

/// The names that fit, each with what `*` stands for.
fn all(pattern: &str, tensors: &Tensors) -> Vec<(String, String)> {
    let fits = |name: &String| matched(pattern, name).map(|star| (name.clone(), star.to_string()));
    tensors.keys().filter_map(fits).collect()
}

/// What `*` stands for if the name fits.
fn matched<'n>(pattern: &str, name: &'n str) -> Option<&'n str> {
    match pattern.split_once('*') {
        None => (pattern == name).then_some(""),
        Some((before, after)) => name.strip_prefix(before)?.strip_suffix(after),
    }
}

fn stack(parts: Vec<Tensor>) -> Result<Tensor, String> {
    let rest = |t: &Tensor| t.shape.get(1..).map(<[usize]>::to_vec);
    let first = rest(&parts[0]);
    if first.is_none() || parts.iter().any(|p| rest(p) != first) {
        let shapes: Vec<_> = parts.iter().map(|p| format!("{:?}", p.shape)).collect();
        return Err(format!("shapes {} do not stack", shapes.join(", ")));
    }
    let mut shape = parts[0].shape.clone();
    shape[0] = parts.iter().map(|p| p.shape[0]).sum();
    let mut numbers = Vec::with_capacity(shape.iter().product());
    for part in parts {
        match part.numbers {
            Numbers::F32(part) => numbers.extend(part),
            Numbers::I32(_) => return Err("whole numbers are no weights".into()),
        }
    }
    Ok(Tensor::f32(shape, numbers))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tensor(shape: &[usize], first: f32) -> Tensor {
        let elements = shape.iter().product::<usize>();
        Tensor::f32(shape.to_vec(), (0..elements).map(|i| first + i as f32).collect())
    }

    #[test]
    fn names_are_mapped() {
        let mapping = Mapping::parse(
            r#"Mapping(about: "x", rows: [
                Ignore("*.inv_freq"),
                Stack(from: ["l.*.q", "l.*.k"], to: "h.*.qk"),
                Rename(from: "l.*", to: "h.*"),
                Rename(from: "head", to: "logits"),
            ])"#,
        )
        .unwrap();
        let names = ["l.0.q", "l.0.k", "l.1.q", "l.1.k", "l.0.up", "head", "l.0.inv_freq", "odd"];
        let tensors: Tensors =
            names.iter().enumerate().map(|(n, name)| (name.to_string(), tensor(&[1, 2], 10.0 * n as f32))).collect();
        let mapped = mapping.apply(tensors.clone()).unwrap();
        let found: Vec<&str> = mapped.keys().map(String::as_str).collect();
        assert_eq!(found, ["h.0.qk", "h.0.up", "h.1.qk", "logits", "odd"]);
        assert_eq!(mapped["h.1.qk"], Tensor::f32(vec![2, 2], vec![20.0, 21.0, 30.0, 31.0]));
        let mut less = tensors.clone();
        less.remove("l.1.k");
        assert_eq!(mapping.apply(less).unwrap_err(), "`l.1.k` is missing, a part of `h.*.qk`");
        let mut odd = tensors;
        odd.insert("l.1.k".into(), tensor(&[1, 3], 0.0));
        assert_eq!(mapping.apply(odd).unwrap_err(), "l.1.q, l.1.k: shapes [1, 2], [1, 3] do not stack");
    }

    #[test]
    fn mistakes_are_errors() {
        for (text, expected) in [
            ("Mapping(rows: [Rename(from: \"a.*\", to: \"b\")])", "one `*` at most"),
            ("Mapping(rows: [Rename(from: \"a.*.*\", to: \"*.*\")])", "one `*` at most"),
            ("Mapping(rows: [Stack(from: [], to: \"b\")])", "one `*` at most"),
            ("Mapping(rows: [\n  Renam(from: \"a\", to: \"b\")])", "2:3"),
        ] {
            let message = Mapping::parse(text).unwrap_err();
            assert!(message.contains(expected), "{message}");
        }
    }
}
