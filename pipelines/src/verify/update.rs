//! Golden files of the optimizer: AdamW step by step, and clipping of the global norm.

use std::collections::BTreeMap;
use std::sync::Arc;

use dataflow_graph::registry::Registry;
use dataflow_graph::session::Session;
use dataflow_ops::optimizer::{AdamW, Schedule};

use super::file::GoldenFile;
use super::op::Case;
use super::program::{Rows, Term};
use super::tolerance::Kind;
use super::{Backend, Judge, Problem};

/// The file of AdamW.
pub(super) const ADAMW: &str = "adamw";

/// The file of clipping.
pub(super) const CLIP: &str = "clip_grad_norm";

/// AdamW's eps in all golden files.
const EPS: f64 = 1e-8;

/// Parameters `p0`, `p1` … of these shapes, whose gradients are inputs.
fn session(
    case: &Case,
    shapes: &[Vec<usize>],
    optimizer: AdamW,
    registry: &Arc<Registry>,
    backend: &Backend,
) -> Result<Session, Problem> {
    if shapes.is_empty() {
        return Err(Problem::Content(format!("{} has no tensors", case.name)));
    }
    let named = || shapes.iter().enumerate().map(|(j, shape)| (format!("p{j}"), shape));
    let rows = named().map(|(p, shape)| format!("(\"{p}\", Weight(shape: {shape:?}, init: Zeros), []),"));
    let rows = Rows {
        name: format!("golden optimizer, {}", case.name),
        text: rows.collect(),
        output: "p0".into(),
        scope: BTreeMap::new(),
        tokens: [1, 1],
        // the gradient of sum(weights * p) is the weights
        terms: named().map(|(value, shape)| Term { value, shape: shape.clone() }).collect(),
    };
    Ok(Session::new(backend.device.clone(), &rows.compile(registry, backend, Arc::new(optimizer))?, None)?)
}

/// A state of the session, such as `p0.m`.
fn state(session: &Session, name: &str) -> Result<Vec<f32>, Problem> {
    let port = session.plan().states.get(name);
    port.map(|port| session.read(port)).ok_or_else(|| Problem::Content(format!("the optimizer has no state `{name}`")))
}

/// A golden tensor whose size must be `len`.
fn sized(file: &GoldenFile, name: String, len: usize) -> Result<Vec<f32>, Problem> {
    let (shape, values) = file.real(&name)?;
    if values.len() != len {
        return Err(Problem::Content(format!("`{name}` of shape {shape:?} does not fit its parameter")));
    }
    Ok(values.to_vec())
}

/// The parameters after each step, and the moments after the last.
pub(super) fn adamw(
    file: &GoldenFile,
    case: &Case,
    registry: &Arc<Registry>,
    backend: &Backend,
    judge: &mut Judge,
) -> Result<(), Problem> {
    let name = |kind: &str, letter: char, j: usize| format!("{}/{kind}/{letter}{j}", case.name);
    let rates: Vec<f32> = case.attribute("lr")?;
    let tensors = file.below(&format!("{}/in/p", case.name)).count();
    let shapes = (0..tensors).map(|j| Ok(file.real(&name("in", 'p', j))?.0.to_vec()));
    let shapes: Vec<Vec<usize>> = shapes.collect::<Result<_, Problem>>()?;
    let steps = rates.len();
    let optimizer = AdamW {
        schedule: Schedule::Table(rates.into()),
        betas: (case.attribute("beta1")?, case.attribute("beta2")?),
        eps: EPS,
        decay: case.attribute("weight_decay")?,
        clip: None,
    };
    let mut session = session(case, &shapes, optimizer, registry, backend)?;
    let sizes: Vec<usize> = shapes.iter().map(|s| s.iter().product()).collect();
    let mut gradients = Vec::new();
    for (j, &size) in sizes.iter().enumerate() {
        gradients.push(sized(file, name("in", 'g', j), steps * size)?);
        session.write(&session.plan().parameters[j].port, file.real(&name("in", 'p', j))?.1);
    }
    let mut after = vec![Vec::new(); tensors];
    for step in 0..steps {
        for (j, &size) in sizes.iter().enumerate() {
            session.write_input(&Term::weights(&format!("p{j}")), &gradients[j][step * size..][..size]);
        }
        session.run_step()?;
        session.run_update()?;
        session.check()?;
        for (j, after) in after.iter_mut().enumerate() {
            after.extend(session.read::<f32>(&session.plan().parameters[j].port));
        }
    }
    for (j, after) in after.iter().enumerate() {
        let label = name("out", 'p', j);
        judge.compare(label.clone(), after, file.real(&label)?.1, Kind::Values);
        for moment in ['m', 'v'] {
            let label = name("out", moment, j);
            let found = state(&session, &format!("p{j}.{moment}"))?;
            judge.compare(label.clone(), &found, file.real(&label)?.1, Kind::Values);
        }
    }
    Ok(())
}

/// The norm before clipping, and the clipped gradients. The program applies the factor inside of the update, so
/// they are read from the first moment, which is the clipped gradient where the moment has no memory.
pub(super) fn clip(
    file: &GoldenFile,
    case: &Case,
    registry: &Arc<Registry>,
    backend: &Backend,
    judge: &mut Judge,
) -> Result<(), Problem> {
    let name = |kind: &str, j: usize| format!("{}/{kind}/g{j}", case.name);
    let tensors = file.below(&format!("{}/in/g", case.name)).count();
    let shapes = (0..tensors).map(|j| Ok(file.real(&name("in", j))?.0.to_vec()));
    let shapes: Vec<Vec<usize>> = shapes.collect::<Result<_, Problem>>()?;
    let optimizer = AdamW {
        schedule: Schedule::Constant(0.0),
        betas: (0.0, 0.0),
        eps: EPS,
        decay: 0.0,
        clip: Some(case.attribute("max_norm")?),
    };
    let mut session = session(case, &shapes, optimizer, registry, backend)?;
    for j in 0..tensors {
        session.write_input(&Term::weights(&format!("p{j}")), file.real(&name("in", j))?.1);
    }
    session.run_step()?;
    session.run_update()?;
    session.check()?;
    let label = format!("{}/out/norm", case.name);
    let norm = session.scalar("grad_norm").into_iter().collect::<Vec<_>>();
    judge.compare(label.clone(), &norm, file.real(&label)?.1, Kind::Values);
    for j in 0..tensors {
        let label = name("out", j);
        let clipped = state(&session, &format!("p{j}.m"))?;
        judge.compare(label.clone(), &clipped, file.real(&label)?.1, Kind::Values);
    }
    Ok(())
}
