//! Golden files of ops: values and gradients of every case.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use dataflow_graph::format::formula::Number;
use dataflow_graph::registry::Registry;
use dataflow_graph::session::Session;
use serde::Deserialize;
use serde_json::Value;

use super::file::{GoldenFile, Values, pad_rows};
use super::op_table::{GOLDEN_OPS, GoldenOp};
use super::program::{Gradients, Rows, Term, check_parameters, output};
use super::tolerance::Kind;
use super::{Backend, Judge, Problem, update};

/// A case as the metadata describes it.
#[derive(Deserialize)]
pub(super) struct Case {
    /// What its tensors' names start with.
    pub name: String,
    /// Sizes and settings.
    pub attrs: BTreeMap<String, Value>,
}

impl Case {
    /// An attribute of any type.
    pub(super) fn attribute<T: serde::de::DeserializeOwned>(&self, name: &str) -> Result<T, Problem> {
        let value = self.attrs.get(name).cloned().unwrap_or(Value::Null);
        serde_json::from_value(value).map_err(|e| Problem::Content(format!("attribute `{name}` of {}: {e}", self.name)))
    }
}

/// Longest sequence that positions of an offset may make.
const MAX_OFFSET: usize = 1 << 16;

/// Compares every case of an op's file.
pub(super) fn verify(
    file: &GoldenFile,
    op: &str,
    registry: &Arc<Registry>,
    backend: &Backend,
    judge: &mut Judge,
) -> Result<(), Problem> {
    let cases: Vec<Case> = file.json("cases")?;
    for case in &cases {
        match (op, GOLDEN_OPS.iter().find(|o| o.name == op)) {
            (_, Some(golden)) => verify_case(file, golden, case, registry, backend, judge)?,
            (update::ADAMW, None) => update::adamw(file, case, registry, backend, judge)?,
            (update::CLIP, None) => update::clip(file, case, registry, backend, judge)?,
            (_, None) => {
                let mut known: Vec<_> = GOLDEN_OPS.iter().map(|o| o.name).collect();
                known.extend([update::ADAMW, update::CLIP]);
                return Err(Problem::UnknownOp { op: op.to_string(), known: known.join(", ") });
            }
        }
    }
    if cases.is_empty() { Err(Problem::Content("the metadata lists no cases".into())) } else { Ok(()) }
}

/// Shape and numbers in this program's layout.
type Moved = (Vec<usize>, Vec<f32>);

/// The tensors of a case in this program's layout.
struct Tensors<'a> {
    file: &'a GoldenFile,
    golden: &'a GoldenOp,
    case: &'a Case,
    offset: usize,
}

impl Tensors<'_> {
    fn name(&self, kind: &str, tensor: &str) -> String {
        format!("{}/{kind}/{tensor}", self.case.name)
    }

    /// An activation. The op counts positions from 0, so row 0 at an offset is what follows as many zeros; the
    /// op makes zeros of them, with zero gradient.
    fn activation(&self, kind: &str, tensor: &str) -> Result<Moved, Problem> {
        let (shape, values) = self.file.real(&self.name(kind, tensor))?;
        let (mut shape, mut values) = self.golden.layout.apply(shape, values);
        if self.offset > 0 {
            pad_rows(&mut shape, &mut values, self.offset);
        }
        Ok((shape, values))
    }

    /// An input, or a trained tensor of the row `op`, which has this program's layout already.
    fn parameter(&self, kind: &str, parameter: &str) -> Result<Moved, Problem> {
        match parameter.strip_prefix("op.") {
            Some(own) => {
                let (shape, values) = self.file.real(&self.name(kind, own))?;
                Ok((shape.to_vec(), values.to_vec()))
            }
            None => self.activation(kind, parameter),
        }
    }
}

fn verify_case(
    file: &GoldenFile,
    golden: &GoldenOp,
    case: &Case,
    registry: &Arc<Registry>,
    backend: &Backend,
    judge: &mut Judge,
) -> Result<(), Problem> {
    let offset = if case.attrs.contains_key("offset") { case.attribute("offset")? } else { 0 };
    if offset > MAX_OFFSET {
        return Err(Problem::Content(format!("offset {offset} of {} is above {MAX_OFFSET}", case.name)));
    }
    let scope = numbers(&case.attrs)?;
    let tensors = Tensors { file, golden, case, offset };
    let what = format!("golden op {}, {}", golden.name, case.name);

    let mut text = String::new();
    for input in golden.inputs {
        let (shape, _) = tensors.activation("in", input)?;
        text += &format!("(\"{input}\", Weight(shape: {shape:?}, init: Zeros), []),\n");
    }
    let tokens = golden.tokens.map(|name| file.whole(&tensors.name("in", name))).transpose()?;
    let (shape, y) = tensors.activation("out", "y")?;
    let (weights_shape, weights) = tensors.activation("cot", "y")?;
    if shape != weights_shape {
        return Err(Problem::Content(format!("{}: `out/y` and `cot/y` have different shapes", case.name)));
    }
    let rows = Rows {
        name: what.clone(),
        text: text + golden.rows,
        output: golden.output.into(),
        scope,
        tokens: match tokens {
            None => [1, 1],
            Some((&[time], _)) => [1, time],
            Some((&[batch, time], _)) => [batch, time],
            Some((shape, _)) => return Err(Problem::Content(format!("{what}: tokens of shape {shape:?}"))),
        },
        terms: vec![Term { value: golden.output.into(), shape }],
    };
    let compiled = rows.compile(registry, backend, Arc::new(Gradients))?;

    // the op's own tensors are named as the file's with `op.` before them
    let own: HashMap<&str, &str> = compiled
        .plan
        .parameters
        .iter()
        .filter_map(|p| Some((p.parameter.name.strip_prefix("op.")?, p.parameter.name.as_str())))
        .collect();
    let mut shapes = BTreeMap::new();
    for (name, tensor) in file.below(&tensors.name("in", "")) {
        if matches!(tensor.values, Values::Real(_)) {
            let full = own.get(name).copied().unwrap_or(name);
            shapes.insert(full.to_string(), tensors.parameter("in", full)?.0);
        }
    }
    check_parameters(&what, &compiled.plan, &shapes)?;

    let mut session = Session::new(backend.device.clone(), &compiled, None)?;
    for planned in &session.plan().parameters {
        session.write(&planned.port, &tensors.parameter("in", &planned.parameter.name)?.1);
    }
    if let Some((_, tokens)) = tokens {
        session.write_input("tokens", tokens);
    }
    session.write_input(&Term::weights(golden.output), &weights);
    session.run_step()?;
    session.check()?;

    judge.compare(tensors.name("out", "y"), &output(&session, golden.output)?, &y, Kind::Values);
    for planned in &session.plan().parameters {
        let name = &planned.parameter.name;
        let (shape, gradient) = tensors.parameter("grad", name)?;
        let label = tensors.name("grad", name.strip_prefix("op.").unwrap_or(name));
        if shape != planned.port.tensor.shape {
            return Err(Problem::Content(format!("`{label}` has another shape than its input")));
        }
        judge.compare(label, &output(&session, &Gradients::output(name))?, &gradient, Kind::Values);
    }
    Ok(())
}

/// Largest number that an attribute may be: sizes of golden files are small, and products of them must be numbers
/// too.
const MAX_ATTRIBUTE: f64 = (1 << 24) as f64;

/// The numbers among attributes, by name; those of a list by name and place.
fn numbers(attributes: &BTreeMap<String, Value>) -> Result<BTreeMap<String, Number>, Problem> {
    fn number(name: &str, value: &Value) -> Result<Option<Number>, Problem> {
        let number = match value {
            Value::Bool(flag) => Some(Number::Int((*flag).into())),
            Value::Number(n) => n.as_i64().map(Number::Int).or_else(|| n.as_f64().map(Number::Real)),
            _ => None,
        };
        match number {
            Some(n) if n.real().abs() > MAX_ATTRIBUTE => {
                Err(Problem::Content(format!("attribute `{name}` is {n}, which is above {MAX_ATTRIBUTE}")))
            }
            number => Ok(number),
        }
    }
    let mut named = BTreeMap::new();
    for (name, value) in attributes {
        named.extend(number(name, value)?.map(|n| (name.clone(), n)));
        if let Value::Array(list) = value {
            for (i, item) in list.iter().enumerate() {
                named.extend(number(name, item)?.map(|n| (format!("{name}_{i}"), n)));
            }
        }
    }
    Ok(named)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_are_names_for_rows() {
        let attributes = serde_json::from_str(r#"{"H": 2, "eps": 1e-5, "bias": true, "shape": [3, 4], "x": "y"}"#);
        let named = numbers(&attributes.unwrap()).unwrap();
        let shown: Vec<String> = named.iter().map(|(k, v)| format!("{k}={v}")).collect();
        assert_eq!(shown, ["H=2", "bias=1", "eps=0.00001", "shape_0=3", "shape_1=4"]);
        let attributes = serde_json::from_str(r#"{"shape": [3, 1e30]}"#).unwrap();
        assert!(numbers(&attributes).unwrap_err().to_string().contains("which is above 16777216"));
    }
}
