//! Safetensors files of any float type.

use std::path::Path;

use safetensors::SafeTensors;

use super::ImportError;
use super::torch::{Element, to_f32};
use crate::checkpoint::{Tensor, Tensors};
use crate::files::FileError;

pub(super) fn read(path: &Path) -> Result<Tensors, ImportError> {
    let format = |what: String| ImportError::Format { path: path.into(), what };
    let bytes = std::fs::read(path).map_err(FileError::on("read", path))?;
    let file = SafeTensors::deserialize(&bytes)
        .map_err(|e| format(format!("neither a PyTorch archive nor a safetensors file ({e})")))?;
    let mut tensors = Tensors::new();
    for (name, view) in file.iter() {
        let dtype = format!("{:?}", view.dtype());
        let element = Element::of_safetensors(&dtype)
            .ok_or_else(|| format(format!("tensor `{name}` has type {dtype}; weights are F64, F32, F16 or BF16")))?;
        tensors.insert(name.to_string(), Tensor::f32(view.shape().to_vec(), to_f32(element, view.data())));
    }
    Ok(tensors)
}
