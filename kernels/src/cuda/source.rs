//! The device side: the files of `kernels/cuda`, as text in this library.

/// What every file includes: `Rows<T>`, reductions, number formats.
pub const COMMON: &str = include_str!("../../cuda/common.cuh");

/// Name (without `.cu`) and text of each file of kernels.
pub const FILES: &[(&str, &str)] = &[("layout", include_str!("../../cuda/layout.cu"))];

/// The text of a file.
pub fn file(name: &str) -> Option<&'static str> {
    FILES.iter().find(|(n, _)| *n == name).map(|(_, text)| *text)
}
