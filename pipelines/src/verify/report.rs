//! Comparisons for people.

use super::Comparison;

/// A table with a row for every tensor, under a line for each file.
pub fn table(comparisons: &[Comparison]) -> String {
    let width = comparisons.iter().map(|c| c.tensor.chars().count()).max().unwrap_or(0).max("tensor".len());
    let mut text = String::new();
    let mut file = None;
    for c in comparisons {
        if file != Some(&c.file) {
            file = Some(&c.file);
            text += &format!("{}\n  {:width$}  error    allowed\n", c.file, "tensor");
        }
        let mark = if c.ok { "" } else { "   too far" };
        text += &format!("  {:width$}  {:<7}  {}{mark}\n", c.tensor, short(c.relative_error), short(c.tolerance));
    }
    text
}

/// One line: how many agree, and the one that is farthest off.
pub fn summary(comparisons: &[Comparison]) -> String {
    let ratio = |c: &Comparison| c.relative_error / c.tolerance;
    let Some(worst) = comparisons.iter().max_by(|a, b| ratio(a).total_cmp(&ratio(b))) else {
        return "nothing was compared".into();
    };
    let far = comparisons.iter().filter(|c| !c.ok).count();
    let count = comparisons.len();
    let verdict = match far {
        0 => format!("{count} tensors agree"),
        _ => format!("{far} of {count} tensors are too far off"),
    };
    format!(
        "{verdict}; nearest to its limit: {} of {} with {} of {}",
        worst.tensor,
        worst.file,
        short(worst.relative_error),
        short(worst.tolerance)
    )
}

/// A number of two digits: `3.1e-6`.
fn short(x: f64) -> String {
    if x == 0.0 || x.is_infinite() { format!("{x}") } else { format!("{x:.1e}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_farthest_tensor_is_named() {
        let one = |tensor: &str, relative_error: f64, tolerance: f64| Comparison {
            file: "a.safetensors".into(),
            tensor: tensor.into(),
            relative_error,
            tolerance,
            ok: relative_error <= tolerance,
        };
        let mut all = vec![one("out/y", 3.14e-6, 1e-4), one("norm", 9e-6, 1e-3), one("grad/x", 0.0, 1e-4)];
        assert_eq!(
            summary(&all),
            "3 tensors agree; nearest to its limit: out/y of a.safetensors with 3.1e-6 of 1.0e-4"
        );
        all.push(one("grad/weight", f64::INFINITY, 1e-4));
        assert!(summary(&all).starts_with("1 of 4 tensors are too far off; nearest to its limit: grad/weight"));
        let table = table(&all);
        assert_eq!(table.lines().count(), 6);
        assert!(table.lines().last().unwrap().ends_with("inf      1.0e-4   too far"), "{table}");
        assert_eq!(summary(&[]), "nothing was compared");
    }
}
