//! The device side: the files of `kernels/cuda`, as text in this library.

use super::call::{Call, Tensor};
use crate::device::DType;

/// What every file includes: `Rows<T>`, reductions, number formats.
pub const COMMON: &str = include_str!("../../cuda/common.cuh");

/// Name and text of each file that the files of kernels may include.
pub const HEADERS: &[(&str, &str)] = &[("common.cuh", COMMON), ("real.cuh", include_str!("../../cuda/real.cuh"))];

/// Name (without `.cu`) and text of each file of kernels.
pub const FILES: &[(&str, &str)] = &[
    ("cross_entropy", include_str!("../../cuda/cross_entropy.cu")),
    ("layout", include_str!("../../cuda/layout.cu")),
    ("norm", include_str!("../../cuda/norm.cu")),
    ("optimizer", include_str!("../../cuda/optimizer.cu")),
    ("partials", include_str!("../../cuda/partials.cu")),
    ("rotary", include_str!("../../cuda/rotary.cu")),
];

/// The text of a file.
pub fn file(name: &str) -> Option<&'static str> {
    FILES.iter().find(|(n, _)| *n == name).map(|(_, text)| *text)
}

/// Compiles a call's file for activations of the type of `tensor`; see `kernels/cuda/real.cuh`.
pub(super) fn real(call: Call, tensor: Tensor) -> Call {
    match tensor.dtype {
        DType::F32 | DType::I32 => call.define("REAL", "float"),
    }
}
