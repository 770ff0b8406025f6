//! Safetensors files: named tensors, written so that equal contents are equal bytes.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::Path;

use dataflow_kernels::device::as_bytes;
use safetensors::{Dtype, SafeTensors};
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

use super::CheckpointError;
use super::sidecar::FileSum;
use crate::data::text::hexadecimal;
use crate::files::FileError;

/// The elements of a tensor, row by row.
#[derive(Clone, Debug, PartialEq)]
pub enum Numbers {
    /// Single precision.
    F32(Vec<f32>),
    /// Counters.
    I32(Vec<i32>),
}

/// A tensor.
#[derive(Clone, Debug, PartialEq)]
pub struct Tensor {
    /// Its dimensions.
    pub shape: Vec<usize>,
    /// Its elements.
    pub numbers: Numbers,
}

/// Tensors by name.
pub type Tensors = BTreeMap<String, Tensor>;

impl Tensor {
    /// A tensor of single precision.
    pub fn f32(shape: Vec<usize>, numbers: Vec<f32>) -> Self {
        Self { shape, numbers: Numbers::F32(numbers) }
    }

    /// The elements, if they are of single precision.
    pub fn as_f32(&self) -> Option<&[f32]> {
        match &self.numbers {
            Numbers::F32(numbers) => Some(numbers),
            Numbers::I32(_) => None,
        }
    }

    /// Whether every element is zero.
    pub fn is_zero(&self) -> bool {
        match &self.numbers {
            // minus zero is another number, bit for bit
            Numbers::F32(numbers) => numbers.iter().all(|x| x.to_bits() == 0),
            Numbers::I32(numbers) => numbers.iter().all(|x| *x == 0),
        }
    }

    fn bytes(&self) -> &[u8] {
        match &self.numbers {
            Numbers::F32(numbers) => as_bytes(numbers),
            Numbers::I32(numbers) => as_bytes(numbers),
        }
    }
}

/// Writes a file and syncs it. The header has its entries in the order of their names, so that the bytes follow from the
/// contents alone; it is written here because the `safetensors` crate keeps notes in a hash map.
///
/// # Errors
/// What the operating system says.
pub fn write(path: &Path, tensors: &Tensors, notes: &BTreeMap<String, String>) -> Result<FileSum, FileError> {
    write_all(path, tensors, notes).map_err(FileError::on("write", path))
}

fn write_all(path: &Path, tensors: &Tensors, notes: &BTreeMap<String, String>) -> io::Result<FileSum> {
    let mut entries = Map::new();
    if !notes.is_empty() {
        entries.insert("__metadata__".into(), json!(notes));
    }
    let mut offset = 0;
    for (name, tensor) in tensors {
        let (end, dtype) = (
            offset + tensor.bytes().len(),
            match tensor.numbers {
                Numbers::F32(_) => "F32",
                Numbers::I32(_) => "I32",
            },
        );
        entries.insert(name.clone(), json!({"dtype": dtype, "shape": tensor.shape, "data_offsets": [offset, end]}));
        offset = end;
    }
    let mut header = serde_json::to_vec(&Value::Object(entries))?;
    header.resize(header.len().next_multiple_of(8), b' ');
    let mut file = Summing::new(File::create(path)?);
    file.write_all(&(header.len() as u64).to_le_bytes())?;
    file.write_all(&header)?;
    tensors.values().try_for_each(|tensor| file.write_all(tensor.bytes()))?;
    let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    file.finish(name)
}

/// A file that is summed while it is written.
struct Summing {
    file: BufWriter<File>,
    sum: Sha256,
    bytes: u64,
}

impl Summing {
    fn new(file: File) -> Self {
        Self { file: BufWriter::with_capacity(1 << 20, file), sum: Sha256::new(), bytes: 0 }
    }

    fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.sum.update(bytes);
        self.bytes += bytes.len() as u64;
        self.file.write_all(bytes)
    }

    fn finish(mut self, name: String) -> io::Result<FileSum> {
        self.file.flush()?;
        self.file.get_ref().sync_all()?;
        Ok(FileSum { name, bytes: self.bytes, sha256: hexadecimal(&self.sum.finalize()) })
    }
}

/// The tensors and notes of a file of `f32` and `i32`.
///
/// # Errors
/// A text that says what is wrong, for bytes that are no such file.
pub fn parse(bytes: &[u8]) -> Result<(Tensors, BTreeMap<String, String>), String> {
    let file = SafeTensors::deserialize(bytes).map_err(|e| format!("no safetensors file: {e}"))?;
    let (_, header) = SafeTensors::read_metadata(bytes).map_err(|e| format!("no safetensors file: {e}"))?;
    let mut tensors = Tensors::new();
    for (name, view) in file.iter() {
        let words = view.data().chunks_exact(4).map(|b| [b[0], b[1], b[2], b[3]]);
        let numbers = match view.dtype() {
            Dtype::F32 => Numbers::F32(words.map(f32::from_le_bytes).collect()),
            Dtype::I32 => Numbers::I32(words.map(i32::from_le_bytes).collect()),
            other => return Err(format!("tensor `{name}` has type {other:?}; use `dataflow import` for such a file")),
        };
        tensors.insert(name.to_string(), Tensor { shape: view.shape().to_vec(), numbers });
    }
    let notes = header.metadata().iter().flatten().map(|(k, v)| (k.clone(), v.clone())).collect();
    Ok((tensors, notes))
}

/// Reads a file.
///
/// # Errors
/// If it cannot be read or is no such file.
pub fn read(path: &Path) -> Result<(Tensors, BTreeMap<String, String>), CheckpointError> {
    let bytes = std::fs::read(path).map_err(FileError::on("read", path))?;
    parse(&bytes).map_err(|what| CheckpointError::Damaged { path: path.into(), what })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.safetensors");
        let weight = Tensor::f32(vec![2, 2], vec![1.0, -0.0, f32::MIN_POSITIVE, 4.0]);
        let step = Tensor { shape: vec![1], numbers: Numbers::I32(vec![-7]) };
        let tensors = Tensors::from([("h.0.weight".into(), weight), ("step".into(), step)]);
        let notes: BTreeMap<String, String> =
            ["b", "a", "c"].iter().map(|n| (n.to_string(), format!("\"{n}\"\n"))).collect();
        let sum = write(&path, &tensors, &notes).unwrap();
        let bytes = std::fs::read(&path).unwrap();
        assert_eq!((sum.bytes, sum.sha256), (bytes.len() as u64, hexadecimal(&Sha256::digest(&bytes))));
        assert_eq!(read(&path).unwrap(), (tensors.clone(), notes.clone()));
        write(&path, &tensors, &notes).unwrap();
        assert!(std::fs::read(&path).unwrap() == bytes, "equal contents are equal bytes");
        assert!(tensors.values().all(|t| !t.is_zero()) && Tensor::f32(vec![1], vec![0.0]).is_zero());
        assert!(!Tensor::f32(vec![1], vec![-0.0]).is_zero());
    }
}
