//! What sequence ops have in common: activations are `[B, T, C]`, heads are blocks of columns.

use dataflow_graph::op::OpError;
use dataflow_graph::types::TensorType;

/// B, T and C of an activation.
pub(crate) fn sizes(tensor: &TensorType) -> Result<(usize, usize, usize), OpError> {
    match tensor.shape[..] {
        [b, t, c] => Ok((b, t, c)),
        _ => Err(format!("expected a tensor [B, T, C], found {tensor}").into()),
    }
}

/// Columns of a head.
pub(crate) fn head_dim(cols: usize, heads: usize) -> Result<usize, OpError> {
    if heads == 0 || cols == 0 || !cols.is_multiple_of(heads) {
        return Err(format!("{cols} columns do not split into {heads} heads").into());
    }
    Ok(cols / heads)
}

/// Fails unless the two have one type.
pub(crate) fn same(what: &str, a: &TensorType, b: &TensorType) -> Result<(), OpError> {
    if a == b { Ok(()) } else { Err(format!("{what} have different shapes").into()) }
}
