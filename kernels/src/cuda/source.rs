//! The device side: the files of `kernels/cuda`, as text in this library.

use super::call::{Call, Tensor};
use crate::device::DType;

/// Name and text of each file that the files of kernels may include.
pub const HEADERS: &[(&str, &str)] = &[
    ("common.cuh", include_str!("../../cuda/common.cuh")),
    ("elementwise.cuh", include_str!("../../cuda/elementwise.cuh")),
    ("keep.cuh", include_str!("../../cuda/keep.cuh")),
    ("real.cuh", include_str!("../../cuda/real.cuh")),
    ("tile.cuh", include_str!("../../cuda/tile.cuh")),
];

/// Name (without `.cu`) and text of each file of kernels.
pub const FILES: &[(&str, &str)] = &[
    ("attention", include_str!("../../cuda/attention.cu")),
    ("conv1d", include_str!("../../cuda/conv1d.cu")),
    ("cross_entropy", include_str!("../../cuda/cross_entropy.cu")),
    ("embedding", include_str!("../../cuda/embedding.cu")),
    ("gla", include_str!("../../cuda/gla.cu")),
    ("layout", include_str!("../../cuda/layout.cu")),
    ("linear_attention", include_str!("../../cuda/linear_attention.cu")),
    ("norm", include_str!("../../cuda/norm.cu")),
    ("optimizer", include_str!("../../cuda/optimizer.cu")),
    ("partials", include_str!("../../cuda/partials.cu")),
    ("recurrent", include_str!("../../cuda/recurrent.cu")),
    ("reduce", include_str!("../../cuda/reduce.cu")),
    ("retention", include_str!("../../cuda/retention.cu")),
    ("rotary", include_str!("../../cuda/rotary.cu")),
    ("scan", include_str!("../../cuda/scan.cu")),
    ("token_shift", include_str!("../../cuda/token_shift.cu")),
];

/// The text of a header.
pub fn header(name: &str) -> Option<&'static str> {
    HEADERS.iter().find(|(n, _)| *n == name).map(|(_, text)| *text)
}

/// The text of a file.
pub fn file(name: &str) -> Option<&'static str> {
    FILES.iter().find(|(n, _)| *n == name).map(|(_, text)| *text)
}

/// Compiles a call's file for activations of the type of `tensor`; see `kernels/cuda/real.cuh`.
pub(super) fn real(call: Call, tensor: Tensor) -> Call {
    match tensor.dtype {
        DType::F32 | DType::I32 => call.define("REAL", "float"),
        DType::Bf16 => call.define("REAL", "bf16"),
    }
}

/// The most elements, up to `most`, that can be loaded at once from all of the tensors.
pub(super) fn common_vector(tensors: &[Tensor], most: usize) -> usize {
    tensors.iter().map(|t| t.vector(most)).min().unwrap_or(1)
}

/// As [`common_vector`], for heads of `dim` columns: 16 bytes at most.
pub(super) fn head_vector(tensors: &[Tensor], dim: usize) -> usize {
    let most = 16 / tensors.first().map_or(4, |t| t.dtype.size());
    let common = common_vector(tensors, most);
    if dim == 0 { common } else { common.min(1 << dim.trailing_zeros()) }
}

/// Elements from one row to the next of a tile of `cols` columns in shared memory; see `kernels/cuda/tile.cuh`.
pub(super) fn pitch(cols: usize, dtype: DType) -> usize {
    cols.next_multiple_of(16) + if dtype.size() == 2 { 8 } else { 4 }
}
