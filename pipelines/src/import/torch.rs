//! `torch.save` files since PyTorch 1.6: a zip archive of a pickle, `data.pkl`, and the bytes of each storage,
//! `data/KEY`.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use zip::ZipArchive;

use super::ImportError;
use super::pickle::{self, Found, PickleError, TensorRef};
use crate::checkpoint::{Tensor, Tensors};
use crate::files::FileError;

/// The largest pickle that is read; that of a model of a thousand layers has a few megabytes.
const LARGEST_PICKLE: u64 = 64 << 20;

/// Types of elements that become `f32`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Element {
    F64,
    F32,
    F16,
    Bf16,
}

impl Element {
    pub(super) fn size(self) -> usize {
        match self {
            Element::F64 => 8,
            Element::F32 => 4,
            Element::F16 | Element::Bf16 => 2,
        }
    }

    pub(super) fn of_safetensors(name: &str) -> Option<Self> {
        Some(match name {
            "F64" => Element::F64,
            "F32" => Element::F32,
            "F16" => Element::F16,
            "BF16" => Element::Bf16,
            _ => return None,
        })
    }

    /// The name of a storage class of PyTorch.
    fn of_storage(name: &str) -> Option<Self> {
        Some(match name {
            "DoubleStorage" => Element::F64,
            "FloatStorage" => Element::F32,
            "HalfStorage" => Element::F16,
            "BFloat16Storage" => Element::Bf16,
            _ => return None,
        })
    }
}

/// Little-endian elements as `f32`.
pub(super) fn to_f32(element: Element, bytes: &[u8]) -> Vec<f32> {
    let halves = || bytes.chunks_exact(2).map(|b| u16::from_le_bytes([b[0], b[1]]));
    match element {
        Element::F64 => {
            let eight = bytes.chunks_exact(8).map(|b| f64::from_le_bytes(b.try_into().expect("eight bytes")));
            eight.map(|x| x as f32).collect()
        }
        Element::F32 => bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect(),
        Element::Bf16 => halves().map(|h| f32::from_bits(u32::from(h) << 16)).collect(),
        Element::F16 => halves().map(from_half).collect(),
    }
}

/// IEEE 754 binary16: 1 bit of sign, 5 of exponent, 10 of fraction.
fn from_half(half: u16) -> f32 {
    let (sign, exponent, fraction) = (half >> 15, (half >> 10) & 31, f32::from(half & 1023));
    let size = match exponent {
        0 => fraction * 2f32.powi(-24),
        31 if fraction == 0.0 => f32::INFINITY,
        31 => f32::NAN,
        e => (1024.0 + fraction) * 2f32.powi(i32::from(e) - 25),
    };
    if sign == 1 { -size } else { size }
}

/// The tensors of a file.
///
/// # Errors
/// See [`ImportError`].
pub fn read(path: &Path) -> Result<Tensors, ImportError> {
    let format = |what: String| ImportError::Format { path: path.into(), what };
    let file = File::open(path).map_err(FileError::on("read", path))?;
    let mut archive = ZipArchive::new(file).map_err(|e| format(format!("not a whole PyTorch archive: {e}")))?;
    let names: Vec<String> = archive.file_names().filter_map(|n| Some(n.ok()?.into_owned())).collect();
    let pickles: Vec<&String> = names.iter().filter(|n| *n == "data.pkl" || n.ends_with("/data.pkl")).collect();
    let [name] = pickles[..] else {
        return Err(format("the archive has no `data.pkl`, so it is not from `torch.save`".into()));
    };
    let folder = name.trim_end_matches("data.pkl");
    let pickle = entry(&mut archive, name, LARGEST_PICKLE).map_err(|e| format(format!("`{name}`: {e}")))?;
    let order = format!("{folder}byteorder");
    if names.contains(&order) && entry(&mut archive, &order, 16).is_ok_and(|order| order != b"little") {
        return Err(format("saved by a big-endian machine; load it there and save it as safetensors".into()));
    }
    let found = pickle::tensors(&pickle).map_err(|e| match e {
        PickleError::Refused(name) => ImportError::Refused { path: path.into(), name },
        PickleError::Wrong(what) => format(format!("`{name}`: {what}")),
    })?;
    let mut tensors = Tensors::new();
    for Found { name, tensor } in found {
        let wrong = |what: String| format(format!("tensor `{name}`: {what}"));
        // counters and masks are no weights
        let Some(element) = Element::of_storage(&tensor.storage) else { continue };
        let (first, last) = tensor.range().ok_or_else(|| wrong("its shape and strides make no sense".into()))?;
        let needed = (last as u64).saturating_mul(element.size() as u64);
        let key = format!("{folder}data/{}", tensor.key);
        let bytes = entry(&mut archive, &key, u64::MAX).map_err(|e| wrong(format!("`{key}`: {e}")))?;
        if (bytes.len() as u64) < needed || tensor.elements() > bytes.len() / element.size() {
            return Err(wrong(format!("it needs {needed} bytes of `{key}`, which has {}", bytes.len())));
        }
        let storage = to_f32(element, &bytes);
        let shape = tensor.shape.clone();
        tensors.insert(name, Tensor::f32(shape, gather(&storage, first, &tensor)));
    }
    match tensors.is_empty() {
        true => Err(format("it holds no tensors under names: save a `state_dict()`".into())),
        false => Ok(tensors),
    }
}

fn entry(archive: &mut ZipArchive<File>, name: &str, most: u64) -> io::Result<Vec<u8>> {
    let file = archive.by_name(name).map_err(io::Error::other)?;
    if file.size() > most {
        return Err(io::Error::other(format!("{} bytes are too many", file.size())));
    }
    // the archive may lie about the size
    let (size, mut bytes) = (file.size(), Vec::new());
    file.take(size).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// The elements of a tensor in order, from a storage that it is a strided view of.
fn gather(storage: &[f32], first: usize, tensor: &TensorRef) -> Vec<f32> {
    let mut out = Vec::with_capacity(tensor.elements());
    let mut index = vec![0; tensor.shape.len()];
    let mut at = first;
    for _ in 0..tensor.elements() {
        out.push(storage[at]);
        for d in (0..index.len()).rev() {
            index[d] += 1;
            at += tensor.stride[d];
            if index[d] < tensor.shape[d] {
                break;
            }
            at -= tensor.stride[d] * tensor.shape[d];
            index[d] = 0;
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn elements_become_single_precision() {
        for (half, expected) in [
            (0x0000, 0.0),
            (0x3c00, 1.0),
            (0xc000, -2.0),
            (0x7bff, 65504.0),
            (0x0001, 5.960_464_5e-8),
            (0x0400, 6.103_515_6e-5),
            (0x3555, 0.333_251_95),
            (0x7c00, f32::INFINITY),
        ] {
            assert_eq!(from_half(half), expected, "{half:x}");
        }
        assert!(from_half(0x7e00).is_nan() && from_half(0x8000).to_bits() == (-0f32).to_bits());
        assert_eq!(to_f32(Element::Bf16, &[0x80, 0x3f, 0x20, 0xc0]), [1.0, -2.5]);
        assert_eq!(to_f32(Element::F64, &1.5f64.to_le_bytes()), [1.5]);
    }

    #[test]
    fn views_are_gathered() {
        let storage: Vec<f32> = (0..12).map(|x| x as f32).collect();
        let view = |shape: &[usize], stride: &[usize], offset| {
            let (shape, stride) = (shape.to_vec(), stride.to_vec());
            let tensor = TensorRef { storage: "FloatStorage".into(), key: "0".into(), offset, shape, stride };
            let (first, last) = tensor.range().unwrap();
            (gather(&storage, first, &tensor), last)
        };
        assert_eq!(view(&[2, 3], &[1, 2], 1), (vec![1.0, 3.0, 5.0, 2.0, 4.0, 6.0], 7));
        assert_eq!(view(&[], &[], 4), (vec![4.0], 5));
        assert_eq!(view(&[0, 3], &[3, 1], 0), (vec![], 0));
    }
}
