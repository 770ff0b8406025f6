//! Weights from elsewhere: safetensors files and PyTorch's `state_dict`s, under names of other programs if need be.

pub mod mapping;
mod pickle;
mod safetensors_file;
pub mod torch;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use crate::checkpoint::Tensors;
use crate::files::FileError;

/// Why a file cannot be imported.
#[derive(Debug, thiserror::Error)]
pub enum ImportError {
    /// It cannot be read.
    #[error(transparent)]
    File(#[from] FileError),
    /// It is not what it should be.
    #[error("{}: {what}", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
    },
    /// Its pickle asks for something that is no tensor.
    #[error(
        "{} is refused: its pickle asks for `{name}`, which no tensor needs; loading such a file in Python would run \
         code of its author (nothing was run here)", path.display()
    )]
    Refused {
        /// The file.
        path: PathBuf,
        /// Module and name.
        name: String,
    },
    /// Tensors that do not fit.
    #[error("{0}")]
    Misfit(String),
}

/// All tensors of a file, in `f32`. What kind of file it is follows from its first bytes.
///
/// # Errors
/// A file that cannot be read, is damaged, or asks for more than tensors.
pub fn read(path: &Path) -> Result<Tensors, ImportError> {
    let mut start = [0; 4];
    let read = File::open(path).and_then(|mut file| file.read(&mut start)).map_err(FileError::on("read", path))?;
    match &start[..read] {
        b"PK\x03\x04" => torch::read(path),
        // a pickle of protocol 2 that begins with PyTorch's magic number; the header of a safetensors file may be of a length
        // whose first byte is that of a pickle too, but not of these 176 MB
        [0x80, 2, 0x8a, 0x0a] => Err(ImportError::Format {
            path: path.into(),
            what: "a file of PyTorch before 1.6; load it there and save it again, or use safetensors".into(),
        }),
        _ => safetensors_file::read(path),
    }
}

/// Wrappers of PyTorch that put a name before all others.
const WRAPPERS: [&str; 2] = ["_orig_mod.", "module."];

/// Without the prefixes that `torch.compile` and data-parallel training leave.
pub fn unwrapped(mut tensors: Tensors) -> Tensors {
    for prefix in WRAPPERS {
        if !tensors.is_empty() && tensors.keys().all(|name| name.starts_with(prefix)) {
            tensors = tensors.into_iter().map(|(name, t)| (name[prefix.len()..].to_string(), t)).collect();
        }
    }
    tensors
}

/// Removes tensors that are another one under a second name, as a tied output head is.
///
/// `shapes` are those that the model wants.
pub fn without_ties(tensors: &mut Tensors, shapes: &BTreeMap<String, Vec<usize>>) {
    let extra: Vec<String> = tensors.keys().filter(|name| !shapes.contains_key(*name)).cloned().collect();
    for name in extra {
        let tied = |(other, tensor): (&String, &crate::checkpoint::Tensor)| {
            shapes.contains_key(other) && Some(tensor) == tensors.get(&name)
        };
        if tensors.iter().any(tied) {
            tensors.remove(&name);
        }
    }
}

/// Checks that the tensors are the model's.
///
/// # Errors
/// A list of all that are missing, too many, or of another shape.
pub fn check(tensors: &Tensors, shapes: &BTreeMap<String, Vec<usize>>) -> Result<(), ImportError> {
    let mut lines = Vec::new();
    for (name, shape) in shapes {
        match tensors.get(name) {
            None => lines.push(format!("  missing: {name} {shape:?}")),
            Some(tensor) if tensor.shape != *shape => {
                lines.push(format!("  wrong shape: {name} is {:?}, the model wants {shape:?}", tensor.shape));
            }
            Some(_) => {}
        }
    }
    let extra = tensors.iter().filter(|(name, _)| !shapes.contains_key(*name));
    lines.extend(extra.map(|(name, tensor)| format!("  extra: {name} {:?}", tensor.shape)));
    match lines.is_empty() {
        true => Ok(()),
        false => Err(ImportError::Misfit(format!("the tensors do not fit the model:\n{}", lines.join("\n")))),
    }
}
