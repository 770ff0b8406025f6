//! From CUDA source to machine code: NVRTC at first use, then from a folder on disk, by content hash.

use std::collections::HashMap;
use std::ffi::{CString, c_char};
use std::path::{Path, PathBuf};

use cudarc::nvrtc::{result, sys};
use sha2::{Digest, Sha256};

use super::source;

/// Preprocessor definitions: names and values.
pub type Defines = Vec<(&'static str, String)>;

/// Source text with everything that its machine code depends on.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Unit {
    /// For messages: `norm.cu`.
    pub name: String,
    /// The text.
    pub text: String,
    /// Preprocessor definitions.
    pub defines: Defines,
}

/// Machine code and what the compiler said.
#[derive(Clone, Debug)]
pub struct Compiled {
    /// For `cuModuleLoadData`.
    pub image: Vec<u8>,
    /// The compiler's log; with [`Options::verbose`] also registers, stack and spills of each kernel.
    pub log: String,
}

/// How to compile.
#[derive(Clone, Debug)]
pub struct Options {
    /// The architecture: `sm_90a`.
    pub arch: String,
    /// Whether the log shows what each kernel takes.
    pub verbose: bool,
}

/// Whether NVRTC can be had; looks into the CUDA toolkit's folder too.
pub fn is_available() -> bool {
    find("nvrtc", || {
        // SAFETY: opens a library of NVIDIA's, whose initialisation has no requirements.
        unsafe { sys::is_culib_present() }
    })
}

/// Whether `is_present` holds, by itself or after the library was opened from the toolkit's folder: a library that is open
/// is found by its name from then on.
pub(super) fn find(name: &str, is_present: impl Fn() -> bool) -> bool {
    if is_present() {
        return true;
    }
    let homes = ["CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(std::env::var_os).map(PathBuf::from);
    for home in homes.chain([PathBuf::from("/usr/local/cuda")]) {
        for folder in ["lib64", "lib", "targets/x86_64-linux/lib"] {
            // NVRTC opens its part `libnvrtc-builtins` by name, so that must be open too
            open_all(&home.join(folder), &format!("lib{name}-builtins.so."));
            open_all(&home.join(folder), &format!("lib{name}.so."));
            if is_present() {
                return true;
            }
        }
    }
    false
}

/// Opens the libraries of a folder whose names begin so, for good.
fn open_all(folder: &Path, prefix: &str) {
    let Ok(entries) = std::fs::read_dir(folder) else { return };
    for entry in entries.flatten().filter(|e| e.file_name().to_string_lossy().starts_with(prefix)) {
        // SAFETY: opens a library of NVIDIA's, whose initialisation has no requirements. It is never closed.
        if let Ok(library) = unsafe { libloading::Library::new(entry.path()) } {
            std::mem::forget(library);
        }
    }
}

fn words(log: &[c_char]) -> String {
    let bytes: Vec<u8> = log.iter().map(|&c| c as u8).take_while(|&c| c != 0).collect();
    String::from_utf8_lossy(&bytes).trim().to_string()
}

/// Compiles a unit to machine code.
///
/// # Errors
/// What the compiler says, each message with the line of the source that it means.
pub fn compile(unit: &Unit, options: &Options) -> Result<Compiled, String> {
    let failed = |e: result::NvrtcError| format!("NVRTC cannot compile {}: {e}", unit.name);
    let c_string = |text: &str| CString::new(text).map_err(|_| format!("{} has a zero byte in it", unit.name));
    let (text, name) = (c_string(&unit.text)?, c_string(&unit.name)?);
    let strings = |all: Vec<&str>| all.into_iter().map(c_string).collect::<Result<Vec<_>, _>>();
    let headers = strings(source::HEADERS.iter().map(|h| h.1).collect())?;
    let names = strings(source::HEADERS.iter().map(|h| h.0).collect())?;
    let pointers = |strings: &[CString]| strings.iter().map(|s| s.as_ptr()).collect::<Vec<_>>();
    let (header_texts, header_names) = (pointers(&headers), pointers(&names));
    let count = headers.len() as i32;
    let mut arguments = vec![format!("--gpu-architecture={}", options.arch), "--std=c++17".into()];
    arguments.push("--device-as-default-execution-space".into());
    if options.verbose {
        arguments.push("--ptxas-options=-v".into());
    }
    arguments.extend(unit.defines.iter().map(|(name, value)| format!("-D{name}={value}")));
    let mut program = std::ptr::null_mut();
    // SAFETY: all strings outlive the call, which copies them.
    let created = unsafe {
        let (headers, names) = (header_texts.as_ptr(), header_names.as_ptr());
        sys::nvrtcCreateProgram(&mut program, text.as_ptr(), name.as_ptr(), count, headers, names)
    };
    created.result().map_err(failed)?;
    // SAFETY: the program was created above and is destroyed below, after its last use.
    unsafe {
        let compiled = result::compile_program(program, &arguments);
        let log = result::get_program_log(program).map(|log| words(&log)).unwrap_or_default();
        let image = compiled.and_then(|()| image_of(program));
        let _ = result::destroy_program(program);
        match image {
            Ok(image) => Ok(Compiled { image, log }),
            Err(e) if log.is_empty() => Err(failed(e)),
            Err(_) => Err(format!("{} does not compile for {}:\n{}", unit.name, options.arch, explained(&log, unit))),
        }
    }
}

/// # Safety
/// The program was compiled.
unsafe fn image_of(program: sys::nvrtcProgram) -> Result<Vec<u8>, result::NvrtcError> {
    let mut size = 0;
    // SAFETY: the caller's promise; the buffer has the size that was asked for.
    unsafe {
        sys::nvrtcGetCUBINSize(program, &mut size).result()?;
        let mut image = vec![0u8; size];
        sys::nvrtcGetCUBIN(program, image.as_mut_ptr().cast()).result()?;
        Ok(image)
    }
}

/// The log with the source line below each message that names one: `norm.cu(12): error: ...`.
fn explained(log: &str, unit: &Unit) -> String {
    let mut out = String::new();
    for line in log.lines() {
        out.push_str(line);
        out.push('\n');
        let place = line.split_once("): ").and_then(|(place, _)| place.rsplit_once('('));
        let Some((file, number)) = place else { continue };
        let header = source::header(file);
        let Some(text) = header.or((file == unit.name).then_some(unit.text.as_str())) else { continue };
        if let Some(source) = number.parse::<usize>().ok().and_then(|n| text.lines().nth(n.wrapping_sub(1))) {
            out.push_str(&format!("  {number} | {}\n", source.trim_end()));
        }
    }
    out
}

/// Machine code on disk.
pub struct Cache {
    folder: Option<PathBuf>,
}

impl Cache {
    /// The user's cache folder: `$DATAFLOW_CACHE`, else `$XDG_CACHE_HOME/dataflow`, else `~/.cache/dataflow`. Without any
    /// of them nothing is kept.
    pub fn of_user() -> Self {
        let variable = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
        let folder = variable("DATAFLOW_CACHE")
            .or_else(|| variable("XDG_CACHE_HOME").map(|p| p.join("dataflow")))
            .or_else(|| variable("HOME").map(|p| p.join(".cache/dataflow")));
        Self { folder: folder.map(|p| p.join("cuda")) }
    }

    /// The file of a unit's machine code. `device` is in the hash, so that devices never load each other's.
    fn path(&self, unit: &Unit, options: &Options, device: &str) -> Option<PathBuf> {
        let mut hash = Sha256::new();
        let defines = format!("{:?}", unit.defines);
        let headers = source::HEADERS.iter().map(|h| h.1);
        for part in [device, &options.arch, &unit.text, &defines].into_iter().chain(headers) {
            hash.update((part.len() as u64).to_le_bytes());
            hash.update(part);
        }
        let mut name = String::new();
        hash.finalize()[..16].iter().for_each(|byte| name.push_str(&format!("{byte:02x}")));
        Some(self.folder.as_ref()?.join(format!("{name}.cubin")))
    }

    /// The machine code of a unit, if it is there.
    pub fn get(&self, unit: &Unit, options: &Options, device: &str) -> Option<Vec<u8>> {
        std::fs::read(self.path(unit, options, device)?).ok()
    }

    /// Keeps machine code. A folder that cannot be written only costs the next start its time.
    pub fn put(&self, unit: &Unit, options: &Options, device: &str, image: &[u8]) {
        let Some(path) = self.path(unit, options, device) else { return };
        let write = |path: &Path| -> std::io::Result<()> {
            std::fs::create_dir_all(path.parent().unwrap_or(Path::new(".")))?;
            let temporary = path.with_extension(format!("{}.tmp", std::process::id()));
            std::fs::write(&temporary, image)?;
            std::fs::rename(temporary, path)
        };
        let _ = write(&path);
    }
}

/// What a kernel takes, from the log of a verbose compilation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Usage {
    /// The kernel's name.
    pub kernel: String,
    /// Registers of a thread.
    pub registers: usize,
    /// Bytes that are written to memory for want of registers.
    pub spilled: usize,
    /// Bytes of static shared memory.
    pub shared: usize,
}

/// The usage of each kernel in a log of ptxas.
pub fn usage(log: &str) -> Vec<Usage> {
    fn before(line: &str, what: &str) -> usize {
        line.find(what).and_then(|at| line[..at].split_whitespace().last()).and_then(|n| n.parse().ok()).unwrap_or(0)
    }
    let mut all: HashMap<String, Usage> = HashMap::new();
    let mut current = String::new();
    let mut order = Vec::new();
    for line in log.lines() {
        if let Some(rest) = line.split("Compiling entry function '").nth(1) {
            current = rest.split('\'').next().unwrap_or("").to_string();
            order.push(current.clone());
            let new = Usage { kernel: current.clone(), registers: 0, spilled: 0, shared: 0 };
            all.insert(current.clone(), new);
        }
        let Some(usage) = all.get_mut(&current) else { continue };
        if line.contains("bytes spill stores") {
            usage.spilled += before(line, " bytes spill stores") + before(line, " bytes spill loads");
        }
        if line.contains("registers") {
            usage.registers = before(line, " registers");
            usage.shared = before(line, " bytes smem");
        }
    }
    order.into_iter().filter_map(|kernel| all.remove(&kernel)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_show_their_source_line() {
        let unit = Unit { name: "a.cu".into(), text: "first\nsecond\n".into(), defines: vec![] };
        let log = "a.cu(2): error: no such thing\nelsewhere.h(1): note";
        assert_eq!(explained(log, &unit), "a.cu(2): error: no such thing\n  2 | second\nelsewhere.h(1): note\n");
    }

    #[test]
    fn usage_is_read_from_the_log() {
        let log = "ptxas info    : Compiling entry function 'norm' for 'sm_90a'\n\
            ptxas info    : Function properties for norm\n    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads\n\
            ptxas info    : Used 40 registers, used 1 barriers, 128 bytes smem\n";
        let expected = Usage { kernel: "norm".into(), registers: 40, spilled: 16, shared: 128 };
        assert_eq!(usage(log), [expected]);
    }

    #[test]
    fn logs_end_at_the_zero_byte() {
        let log = c"fine\n";
        let chars: Vec<c_char> = log.to_bytes_with_nul().iter().map(|&b| b as c_char).collect();
        assert_eq!(words(&chars), "fine");
    }
}
