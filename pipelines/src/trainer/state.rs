//! From the memory of a session to tensors by name, and back.

use std::fmt::Write;

use dataflow_graph::plan::{Plan, Port};
use dataflow_graph::session::Session;
use dataflow_kernels::device::DType;
use sha2::{Digest, Sha256};

use crate::checkpoint::{CheckpointError, Numbers, Tensor, Tensors};
use crate::data::text::hexadecimal;
use crate::saved;

/// The parameters, and what else a step leaves to the next one. A state that is zero is left out: so are the gradient
/// sums of micro-batches, which start anew with every update.
pub(super) fn read(session: &Session) -> (Tensors, Tensors) {
    let plan = session.plan();
    let one = |port: &Port| {
        let numbers = match port.tensor.dtype {
            DType::I32 => Numbers::I32(session.read(port)),
            _ => Numbers::F32(session.read(port)),
        };
        Tensor { shape: port.tensor.shape.clone(), numbers }
    };
    let parameters = plan.parameters.iter().map(|p| (p.parameter.name.clone(), one(&p.port)));
    let states = plan.states.iter().map(|(name, port)| (name.clone(), one(port)));
    (parameters.collect(), states.filter(|(_, tensor)| !tensor.is_zero()).collect())
}

/// The reverse of [`read`].
pub(super) fn restore(session: &Session, parameters: &Tensors, states: &Tensors) -> Result<(), CheckpointError> {
    let plan = session.plan();
    for (name, tensor) in states {
        let fits = plan.states.get(name).is_some_and(|port| {
            let same_type = matches!(tensor.numbers, Numbers::I32(_)) == (port.tensor.dtype == DType::I32);
            same_type && port.tensor.shape == tensor.shape
        });
        if !fits {
            let what = format!("the checkpoint's optimizer has a tensor `{name}` of shape {:?}", tensor.shape);
            return Err(CheckpointError::Misfit(format!("{what}, which this pipeline's has not: it was changed")));
        }
    }
    saved::write_parameters(session, parameters).map_err(CheckpointError::Misfit)?;
    for (name, port) in &plan.states {
        let elements = port.tensor.elements();
        match (states.get(name).map(|t| &t.numbers), port.tensor.dtype) {
            (Some(Numbers::I32(numbers)), _) => session.write(port, numbers),
            (Some(Numbers::F32(numbers)), _) => session.write(port, numbers),
            (None, DType::I32) => session.write(port, &vec![0i32; elements]),
            (None, _) => session.write(port, &vec![0f32; elements]),
        }
    }
    Ok(())
}

/// A hash of what a step computes and keeps: equal hashes promise equal bits.
pub(super) fn graph_hash(plan: &Plan) -> String {
    let mut text = String::new();
    for launch in &plan.launches {
        let _ = writeln!(text, "{} {}", launch.name, launch.op);
    }
    for planned in &plan.parameters {
        let _ = writeln!(text, "{} {:?} {}", planned.parameter.name, planned.parameter.shape, planned.decays);
    }
    for (name, port) in &plan.states {
        let _ = writeln!(text, "{name} {:?}", port.tensor);
    }
    hexadecimal(&Sha256::digest(text))
}
