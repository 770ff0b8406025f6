//! Golden files: named tensors and metadata in one safetensors file.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use safetensors::tensor::{Dtype, SafeTensorError, SafeTensors};
use serde::de::DeserializeOwned;

use super::Problem;
use crate::files::FileError;

/// The numbers of a tensor.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Values {
    Real(Vec<f32>),
    /// Tokens and targets.
    Whole(Vec<i32>),
}

/// A tensor, row-major.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Tensor {
    pub shape: Vec<usize>,
    pub values: Values,
}

/// A golden file in memory.
#[derive(Debug)]
pub(super) struct GoldenFile {
    metadata: HashMap<String, String>,
    tensors: BTreeMap<String, Tensor>,
}

impl GoldenFile {
    pub(super) fn read(path: &Path) -> Result<Self, Problem> {
        let bytes = std::fs::read(path).map_err(FileError::on("read", path))?;
        let (_, header) = SafeTensors::read_metadata(&bytes).map_err(|e| not_safetensors(&e))?;
        let metadata = header.metadata().clone().unwrap_or_default();
        if metadata.is_empty() {
            return Err(Problem::Content("the file has no metadata, so this is no golden file".into()));
        }
        let file = SafeTensors::deserialize(&bytes).map_err(|e| not_safetensors(&e))?;
        let mut tensors = BTreeMap::new();
        for (name, view) in file.iter() {
            let data = view.data();
            let values = match view.dtype() {
                Dtype::F32 => Values::Real(numbers(data, f32::from_le_bytes)),
                Dtype::I64 => {
                    let whole = numbers(data, i64::from_le_bytes).into_iter().map(i32::try_from);
                    let whole: Result<Vec<i32>, _> = whole.collect();
                    let message = format!("tensor `{name}` has a number that no token can have");
                    Values::Whole(whole.map_err(|_| Problem::Content(message))?)
                }
                other => {
                    let message = format!("tensor `{name}` is {other}, but golden tensors are F32 or I64");
                    return Err(Problem::Content(message));
                }
            };
            if data.is_empty() {
                return Err(Problem::Content(format!("tensor `{name}` of shape {:?} is empty", view.shape())));
            }
            tensors.insert(name.to_string(), Tensor { shape: view.shape().to_vec(), values });
        }
        Ok(Self { metadata, tensors })
    }

    /// A metadata value as it stands.
    pub(super) fn word(&self, key: &str) -> Option<&str> {
        self.metadata.get(key).map(String::as_str)
    }

    /// A metadata value that holds JSON.
    pub(super) fn json<T: DeserializeOwned>(&self, key: &str) -> Result<T, Problem> {
        let text = self.word(key).ok_or_else(|| Problem::Content(format!("the metadata has no `{key}`")))?;
        serde_json::from_str(text).map_err(|e| Problem::Content(format!("the metadata's `{key}`: {e}")))
    }

    /// The tensors whose names start with `prefix`, with the rest of their names.
    pub(super) fn below(&self, prefix: &str) -> impl Iterator<Item = (&str, &Tensor)> {
        self.tensors.iter().filter_map(move |(name, tensor)| Some((name.strip_prefix(prefix)?, tensor)))
    }

    pub(super) fn tensor(&self, name: &str) -> Result<&Tensor, Problem> {
        self.tensors.get(name).ok_or_else(|| Problem::Content(format!("there is no tensor `{name}`")))
    }

    /// The real numbers of a tensor.
    pub(super) fn real(&self, name: &str) -> Result<(&[usize], &[f32]), Problem> {
        let tensor = self.tensor(name)?;
        match &tensor.values {
            Values::Real(values) => Ok((&tensor.shape, values)),
            Values::Whole(_) => Err(Problem::Content(format!("tensor `{name}` must be F32"))),
        }
    }

    /// The whole numbers of a tensor.
    pub(super) fn whole(&self, name: &str) -> Result<(&[usize], &[i32]), Problem> {
        let tensor = self.tensor(name)?;
        match &tensor.values {
            Values::Whole(values) => Ok((&tensor.shape, values)),
            Values::Real(_) => Err(Problem::Content(format!("tensor `{name}` must be I64"))),
        }
    }
}

fn not_safetensors(error: &SafeTensorError) -> Problem {
    use SafeTensorError::{HeaderTooSmall, InvalidHeaderLength, MetadataIncompleteBuffer};
    Problem::NotSafetensors(match error {
        HeaderTooSmall | InvalidHeaderLength | MetadataIncompleteBuffer => {
            format!("this is no safetensors file, or its end is missing ({error}); copy or download it again")
        }
        _ => format!("this is no safetensors file ({error})"),
    })
}

fn numbers<T, const N: usize>(bytes: &[u8], read: fn([u8; N]) -> T) -> Vec<T> {
    bytes.as_chunks().0.iter().map(|&number| read(number)).collect()
}

/// How the axes of a golden activation become this program's `[B, T, C]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Layout {
    /// As it is.
    Same,
    /// `(B, H, T, D)`: heads become blocks of columns.
    Heads,
    /// `(B, C, T)`.
    ChannelsFirst,
}

impl Layout {
    /// The tensor in this program's layout; one with another number of axes is no activation and stays.
    pub(super) fn apply(self, shape: &[usize], values: &[f32]) -> (Vec<usize>, Vec<f32>) {
        let (b, c, t, d) = match (self, shape) {
            (Layout::Heads, &[b, h, t, d]) => (b, h, t, d),
            (Layout::ChannelsFirst, &[b, c, t]) => (b, c, t, 1),
            _ => return (shape.to_vec(), values.to_vec()),
        };
        let mut moved = Vec::with_capacity(values.len());
        for batch in 0..b {
            for time in 0..t {
                for block in 0..c {
                    let from = ((batch * c + block) * t + time) * d;
                    moved.extend_from_slice(&values[from..from + d]);
                }
            }
        }
        (vec![b, t, c * d], moved)
    }
}

/// A tensor `[B, T, C]` with `rows` rows of zeros before the first of each sequence.
pub(super) fn pad_rows(shape: &mut [usize], values: &mut Vec<f32>, rows: usize) {
    if let [_, time, cols] = shape {
        let mut padded = Vec::with_capacity(values.len() + values.len() / *time * rows);
        for sequence in values.chunks(*time * *cols) {
            padded.resize(padded.len() + rows * *cols, 0.0);
            padded.extend_from_slice(sequence);
        }
        *time += rows;
        *values = padded;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layouts_end_with_channels() {
        let values: Vec<f32> = (0..12).map(|i| i as f32).collect();
        let (shape, moved) = Layout::Heads.apply(&[1, 2, 3, 2], &values);
        assert_eq!(shape, [1, 3, 4]);
        assert_eq!(moved, [0., 1., 6., 7., 2., 3., 8., 9., 4., 5., 10., 11.]);
        let (shape, moved) = Layout::ChannelsFirst.apply(&[2, 2, 3], &values);
        assert_eq!(shape, [2, 3, 2]);
        assert_eq!(moved, [0., 3., 1., 4., 2., 5., 6., 9., 7., 10., 8., 11.]);
        assert_eq!(Layout::Heads.apply(&[4, 3], &values), (vec![4, 3], values));
    }

    #[test]
    fn padding_goes_before_each_sequence() {
        let (mut shape, mut values) = (vec![2, 1, 2], vec![1.0, 2.0, 3.0, 4.0]);
        pad_rows(&mut shape, &mut values, 1);
        assert_eq!((shape, values), (vec![2, 2, 2], vec![0., 0., 1., 2., 0., 0., 3., 4.]));
    }
}
