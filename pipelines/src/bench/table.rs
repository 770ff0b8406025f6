//! The tables of a measurement, for people.

use super::launches::Measured;

/// One line for each measurement.
pub fn table(title: &str, rows: &[&Measured]) -> String {
    let columns = ["ms", "share", "GFLOP/s", "GB/s", "floor ms", "roofline"].map(|c| format!("{c:>9}")).concat();
    let width = rows.iter().map(|m| label(m).chars().count()).max().unwrap_or(0).max(title.len()).min(72);
    let mut out = format!("{title:width$}{columns}\n");
    for m in rows {
        let label = label(m);
        out += &format!(
            "{label:width$}{:9.2}{:8.1}%{:9.1}{:9.1}{:9.2}{:8.0}%\n",
            m.ms,
            100.0 * m.share,
            m.gflops_per_s,
            m.gb_per_s,
            m.floor_ms,
            100.0 * m.roofline_fraction
        );
    }
    out
}

fn label(m: &Measured) -> String {
    format!("{} {}", m.op, m.name)
}
