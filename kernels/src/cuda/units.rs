//! From launches to calls, and from calls to the sources that must be compiled.

use std::collections::HashMap;

use super::call::{Call, Calls, Source, Work};
use super::compile::{Defines, Unit};
use super::{elementwise, source};
use crate::device::{DeviceError, Kernel, Launch};

/// What a launch does.
pub struct LaunchWork {
    /// The launch.
    pub name: String,
    /// In order.
    pub work: Vec<Work>,
}

/// What launches do.
pub struct Described {
    /// In order.
    pub launches: Vec<LaunchWork>,
    /// Bytes of scratch memory that serve every launch.
    pub scratch: usize,
}

/// Asks each launch for its calls.
///
/// # Errors
/// What a kernel does not take, and kernels of other devices.
pub fn describe(launches: Vec<Launch>) -> Result<Described, DeviceError> {
    let mut described = Described { launches: Vec::with_capacity(launches.len()), scratch: 0 };
    for Launch { name, kernel, inputs, outputs, in_place } in launches {
        let kernel = match kernel {
            Kernel::Cuda(kernel) => kernel,
            other => {
                let what = format!("its kernel is for {}, not for CUDA", other.target());
                return Err(DeviceError::Plan { launch: name, what });
            }
        };
        let mut calls = Calls::new(&inputs, &outputs, &in_place);
        kernel(&mut calls).map_err(|source| DeviceError::Kernel { launch: name.clone(), source })?;
        let (work, scratch) = calls.finish();
        described.scratch = described.scratch.max(scratch);
        described.launches.push(LaunchWork { name, work });
    }
    Ok(described)
}

/// The sources of a program, each once: a module of machine code for each.
pub struct Units {
    /// What is compiled.
    pub units: Vec<Unit>,
    files: HashMap<(&'static str, Defines), usize>,
    generated: usize,
}

impl Units {
    /// Those that the calls name; all generated code is one.
    ///
    /// # Errors
    /// A file that does not exist.
    pub fn of(launches: &[LaunchWork]) -> Result<Self, DeviceError> {
        let calls = launches.iter().flat_map(|launch| &launch.work).filter_map(|work| match work {
            Work::Call(call) => Some(call),
            Work::Product(_) => None,
        });
        let mut units = Self { units: Vec::new(), files: HashMap::new(), generated: usize::MAX };
        let mut generated: Vec<&str> = Vec::new();
        for call in calls {
            match &call.source {
                Source::Generated(text) => generated.push(text),
                Source::File(file) => {
                    let key = (*file, call.defines.clone());
                    if units.files.contains_key(&key) {
                        continue;
                    }
                    let Some(text) = source::file(file) else {
                        return Err(DeviceError::Failed(format!("there is no kernel file `{file}.cu`")));
                    };
                    let (name, text, defines) = (format!("{file}.cu"), text.to_string(), call.defines.clone());
                    units.files.insert(key, units.units.len());
                    units.units.push(Unit { name, text, defines });
                }
            }
        }
        generated.sort_unstable();
        generated.dedup();
        if !generated.is_empty() {
            units.generated = units.units.len();
            let text = format!("{}\n{}", elementwise::PRELUDE, generated.join("\n"));
            units.units.push(Unit { name: "generated.cu".into(), text, defines: Vec::new() });
        }
        Ok(units)
    }

    /// The unit of a call.
    pub(super) fn module_of(&self, call: &Call) -> usize {
        match &call.source {
            Source::Generated(_) => self.generated,
            Source::File(file) => self.files[&(*file, call.defines.clone())],
        }
    }
}
