//! A measurement against an earlier one, which was written with `--json`.

use std::path::Path;

use dataflow_graph::diagnostic::{Diagnostic, Errors};
use serde::Deserialize;

use super::launches::Measured;
use crate::files::FileError;

/// What is compared of an earlier measurement.
#[derive(Clone, Debug, Deserialize)]
pub struct Earlier {
    /// Median time of a step, in milliseconds.
    pub step_ms_median: f64,
    /// Time and work by kind of op.
    pub ops: Vec<Measured>,
}

impl Earlier {
    /// Reads what `bench --json` has printed into a file.
    ///
    /// # Errors
    /// If it cannot be read or holds something else.
    pub fn read(path: &Path) -> Result<Self, Errors> {
        let text = std::fs::read_to_string(path).map_err(FileError::on("read", path));
        let text = text.map_err(|e| Diagnostic::new(e.to_string()))?;
        Ok(serde_json::from_str(&text).map_err(|e| {
            Diagnostic::new(format!("{} is no result of `dataflow bench`: {e}", path.display()))
                .help("write one with `dataflow bench MODEL … --json > FILE`")
        })?)
    }

    /// For each kind of op: its name, milliseconds then and now. The largest differences come first.
    pub fn differences<'a>(&'a self, now: &'a [Measured]) -> Vec<(&'a str, f64, f64)> {
        let ms = |list: &[Measured], op: &str| list.iter().find(|m| m.op == op).map_or(0.0, |m| m.ms);
        let mut all: Vec<_> = self.ops.iter().map(|m| (m.op.as_str(), m.ms, ms(now, &m.op))).collect();
        let new = now.iter().filter(|m| self.ops.iter().all(|e| e.op != m.op));
        all.extend(new.map(|m| (m.op.as_str(), 0.0, m.ms)));
        all.sort_by(|a, b| (b.2 - b.1).abs().total_cmp(&(a.2 - a.1).abs()));
        all
    }

    /// The differences as a table.
    pub fn table(&self, step_ms: f64, now: &[Measured]) -> String {
        let mut out = format!("{:28}{:>9}{:>9}{:>9}{:>7}\n", "compared", "then ms", "now ms", "change", "ratio");
        let mut line = |name: &str, then: f64, now: f64| {
            let ratio = if now > 0.0 { format!("{:.2}", then / now) } else { "-".into() };
            out += &format!("{name:28}{then:9.2}{now:9.2}{:+9.2}{ratio:>7}\n", now - then);
        };
        line("step", self.step_ms_median, step_ms);
        self.differences(now).into_iter().for_each(|(op, then, now)| line(op, then, now));
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn measured(op: &str, ms: f64) -> Measured {
        Measured {
            name: "1".into(),
            op: op.into(),
            ms,
            share: 0.0,
            gflops_per_s: 0.0,
            gb_per_s: 0.0,
            roofline_fraction: 0.0,
            floor_ms: 0.0,
        }
    }

    #[test]
    fn the_largest_difference_comes_first() {
        let earlier =
            Earlier { step_ms_median: 10.0, ops: vec![measured("A", 4.0), measured("B", 6.0), measured("Gone", 3.0)] };
        let now = [measured("A", 3.5), measured("B", 2.0), measured("New", 1.0)];
        let expected = [("B", 6.0, 2.0), ("Gone", 3.0, 0.0), ("New", 0.0, 1.0), ("A", 4.0, 3.5)];
        assert_eq!(earlier.differences(&now), expected);
        let table = earlier.table(5.0, &now);
        assert!(table.lines().nth(1).unwrap().ends_with("2.00"), "{table}");
    }

    #[test]
    fn another_file_is_an_error_with_words() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("other.json");
        std::fs::write(&path, "{}").unwrap();
        let error = Earlier::read(&path).unwrap_err();
        assert!(error.0[0].to_string().contains("no result of `dataflow bench`"), "{error:?}");
        assert!(Earlier::read(&folder.path().join("absent")).is_err());
    }
}
