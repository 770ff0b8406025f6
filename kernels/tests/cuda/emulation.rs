//! Runs the calls of a launch on the processor: kernels are compiled by g++ against `kernels/cuda/emulation` into shared
//! libraries, once for each set of definitions, and called with the launch's own grid and arguments.

use std::cell::RefCell;
use std::collections::HashMap;
use std::collections::hash_map::DefaultHasher;
use std::ffi::{CStr, CString, c_char, c_int, c_uint, c_void};
use std::hash::{Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, OnceLock};

use dataflow_kernels::cuda::call::{Argument, Call, Calls, Mat, Place, Product, Source, Start, Tensor, Work};
use dataflow_kernels::cuda::source;
use dataflow_kernels::device::{DType, KernelError, Region};
use libloading::Library;

/// Thread orders in which every kernel runs: ascending, descending, greedy, shuffled.
pub const ORDERS: [u32; 4] = [0, 1, 2, 20_231];

/// Set in the process that runs the tests under sanitizers.
pub const SANITIZE: &str = "EMULATION_SANITIZE";

/// Whether this is that process.
pub fn sanitized() -> bool {
    std::env::var_os(SANITIZE).is_some()
}

/// Whether there is a compiler for the emulation.
pub fn available() -> bool {
    static FOUND: OnceLock<bool> = OnceLock::new();
    *FOUND.get_or_init(|| {
        let found = Command::new("g++").arg("--version").output().is_ok_and(|o| o.status.success());
        if !found {
            eprintln!("g++ was not found: CUDA kernels are not tested on the emulation");
        }
        found
    })
}

type Launch =
    unsafe extern "C" fn(*const c_char, *const c_uint, *const c_uint, usize, *mut *mut c_void, c_uint) -> c_int;
type Params = unsafe extern "C" fn(*const c_char) -> c_int;
type ParamSize = unsafe extern "C" fn(*const c_char, c_int) -> usize;
type Error = unsafe extern "C" fn() -> *const c_char;

/// A compiled file. Its emulation has one machine, so launches take turns.
struct Module {
    library: Mutex<Library>,
}

/// Where the kernels are.
fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("cuda")
}

/// The names of the kernels in a file.
fn kernels(text: &str) -> Vec<&str> {
    text.lines()
        .filter_map(|line| line.strip_prefix("KERNEL "))
        .map(|line| {
            let line = match line.strip_prefix("__launch_bounds__(") {
                Some(rest) => rest.split_once(") ").expect("a name behind the launch bounds").1,
                None => line,
            };
            line.split('(').next().unwrap()
        })
        .collect()
}

fn compile(text: &str, defines: &[(&'static str, String)]) -> PathBuf {
    let sanitize = sanitized();
    let emulation = folder().join("emulation");
    let headers: Vec<String> = ["emulation.hpp", "builtins.hpp"]
        .iter()
        .map(|name| std::fs::read_to_string(emulation.join(name)).unwrap())
        .chain(source::HEADERS.iter().map(|(name, _)| std::fs::read_to_string(folder().join(name)).unwrap()))
        .collect();
    let mut hash = DefaultHasher::new();
    (text, defines, headers, sanitize).hash(&mut hash);
    let folder = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("emulation");
    std::fs::create_dir_all(&folder).unwrap();
    let stem = format!("{:016x}", hash.finish());
    let library = folder.join(format!("{stem}.so"));
    if library.exists() {
        return library;
    }
    let mut unit = String::from("#include \"emulation.hpp\"\n");
    unit.push_str(text);
    kernels(text).iter().for_each(|name| unit.push_str(&format!("\nEMU_KERNEL({name});")));
    unit.push('\n');
    let file = folder.join(format!("{stem}-{}.cpp", std::process::id()));
    let temporary = folder.join(format!("{stem}-{}.so", std::process::id()));
    std::fs::write(&file, unit).unwrap();
    let mut command = Command::new("g++");
    command.args(["-std=c++17", "-O1", "-shared", "-fPIC", "-fno-strict-aliasing", "-Wall", "-Wno-unused", "-Werror"]);
    command.args(["-Wno-unknown-pragmas", "-Wno-maybe-uninitialized", "-Wno-stringop-overflow"]);
    if sanitize {
        command.args(["-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]);
    }
    command.arg("-I").arg(&emulation).arg("-I").arg(emulation.join(".."));
    command.args(defines.iter().map(|(name, value)| format!("-D{name}={value}")));
    let output = command.arg(&file).arg("-o").arg(&temporary).output().unwrap();
    assert!(output.status.success(), "{:?}: {}", file, String::from_utf8_lossy(&output.stderr));
    std::fs::rename(&temporary, &library).unwrap();
    std::fs::remove_file(&file).unwrap();
    library
}

fn module(call: &Call) -> &'static Module {
    type Key = (Source, Vec<(&'static str, String)>);
    static MODULES: OnceLock<Mutex<HashMap<Key, &'static OnceLock<Module>>>> = OnceLock::new();
    let mut modules = MODULES.get_or_init(Mutex::default).lock().unwrap();
    let cell = *modules
        .entry((call.source.clone(), call.defines.clone()))
        .or_insert_with(|| Box::leak(Box::new(OnceLock::new())));
    drop(modules);
    cell.get_or_init(|| {
        let text = match &call.source {
            Source::File(name) => std::fs::read_to_string(folder().join(format!("{name}.cu"))).unwrap(),
            Source::Generated(text) => format!("#include \"common.cuh\"\n{text}"),
        };
        let path = compile(&text, &call.defines);
        // SAFETY: the library's initializers only fill a list of kernels.
        Module { library: Mutex::new(unsafe { Library::new(path.to_str().unwrap()) }.unwrap()) }
    })
}

/// An activation as the kernels see it in bf16 mode: its bf16 elements, with the gaps between its rows.
struct Shadow {
    tensor: Tensor,
    bits: Vec<u16>,
}

/// The nearest bf16, ties to even.
fn to_bf16(x: f32) -> u16 {
    let bits = x.to_bits();
    if x.is_nan() { 0x7fff } else { ((bits + 0x7fff + (bits >> 16 & 1)) >> 16) as u16 }
}

fn from_bf16(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

/// Device memory: tensors, each in an allocation of its own, so that a sanitizer sees their bounds.
pub struct Memory {
    order: u32,
    /// Whether activations are bf16 to the kernels: what they take as `Rows<real>`.
    bf16: bool,
    blocks: RefCell<Vec<Vec<u64>>>,
    shadows: RefCell<Vec<Shadow>>,
}

/// Offsets of different tensors are so far apart.
const APART: usize = 1 << 32;

impl Memory {
    /// No tensors; kernels run in this thread order.
    pub fn new(order: u32) -> Self {
        Self { order, bf16: false, blocks: RefCell::default(), shadows: RefCell::default() }
    }

    /// As [`new`](Self::new), for kernels of bf16 activations. The tests' numbers stay f32 and are rounded on the way.
    pub fn bf16(order: u32) -> Self {
        Self { bf16: true, ..Self::new(order) }
    }

    /// The error that a test with this tolerance in f32 may have.
    pub fn tolerance(&self, f32: f32) -> f32 {
        if self.bf16 { 2e-2 } else { f32 }
    }

    /// The address of a tensor's bf16 form.
    fn shadow(&self, t: Tensor) -> usize {
        let mut shadows = self.shadows.borrow_mut();
        let found = shadows.iter().position(|s| s.tensor == t);
        let at = found.unwrap_or_else(|| {
            let from = self.address(&t).cast::<f32>();
            let len = if t.is_empty() { 0 } else { (t.rows - 1) * t.stride + t.cols };
            // SAFETY: the elements of the tensor and the gaps between its rows.
            let bits = (0..len).map(|i| to_bf16(unsafe { *from.add(i) })).collect();
            shadows.push(Shadow { tensor: t, bits });
            shadows.len() - 1
        });
        shadows[at].bits.as_ptr() as usize
    }

    /// Writes what kernels left in bf16 forms to the tensors.
    fn end_shadows(&self) {
        for Shadow { tensor, bits } in self.shadows.borrow_mut().drain(..) {
            let element = |i: usize| from_bf16(bits[i / tensor.cols * tensor.stride + i % tensor.cols]);
            self.write(tensor, &(0..tensor.len()).map(element).collect::<Vec<_>>());
        }
    }

    fn allocate(&self, bytes: usize) -> usize {
        let mut blocks = self.blocks.borrow_mut();
        // rounded down, the sanitizer's boundary would be behind the end
        blocks.push(vec![u64::MAX; bytes.div_ceil(8)]);
        (blocks.len() - 1) * APART
    }

    fn tensor(&self, rows: usize, cols: usize, dtype: DType) -> Tensor {
        let offset = self.allocate(rows * cols * dtype.size());
        Tensor { place: Place::Region(Region::Arena), offset, rows, cols, stride: cols, dtype }
    }

    fn address(&self, t: &Tensor) -> *mut u8 {
        let block = &mut self.blocks.borrow_mut()[t.offset / APART];
        block.as_mut_ptr().cast::<u8>().wrapping_add(t.offset % APART)
    }

    /// A tensor without gaps.
    pub fn input(&self, data: &[f32], cols: usize) -> Tensor {
        let t = self.tensor(data.len() / cols, cols, DType::F32);
        self.write(t, data);
        t
    }

    /// A block of columns of a wider matrix of NaN.
    pub fn columns(&self, data: &[f32], cols: usize) -> Tensor {
        let rows = data.len() / cols;
        let t = self.tensor(rows, cols + 7, DType::F32).slice_cols(3, cols + 3);
        self.write(t, data);
        t
    }

    /// Token ids or counters.
    pub fn integers(&self, data: &[i32]) -> Tensor {
        let t = self.tensor(1, data.len(), DType::I32);
        // SAFETY: just allocated with this size.
        unsafe { std::ptr::copy_nonoverlapping(data.as_ptr(), self.address(&t).cast(), data.len()) };
        t
    }

    /// A tensor of NaN.
    pub fn output(&self, rows: usize, cols: usize) -> Tensor {
        self.tensor(rows, cols, DType::F32)
    }

    /// A block of columns of a wider matrix, all NaN.
    pub fn output_columns(&self, rows: usize, cols: usize) -> Tensor {
        self.tensor(rows, cols + 7, DType::F32).slice_cols(3, cols + 3)
    }

    /// Writes the elements.
    pub fn write(&self, t: Tensor, data: &[f32]) {
        assert_eq!(data.len(), t.len());
        let to = self.address(&t).cast::<f32>();
        for (i, &x) in data.iter().enumerate() {
            // SAFETY: element i of the tensor, which was allocated with its gaps.
            unsafe { *to.add(i / t.cols * t.stride + i % t.cols) = x };
        }
    }

    /// Reads the elements.
    pub fn read(&self, t: Tensor) -> Vec<f32> {
        let from = self.address(&t).cast::<f32>();
        // SAFETY: as for `write`.
        (0..t.len()).map(|i| unsafe { *from.add(i / t.cols * t.stride + i % t.cols) }).collect()
    }

    /// Writes down the calls and runs them.
    pub fn run(&self, describe: impl FnOnce(&mut Calls<'_>) -> Result<(), KernelError>) {
        self.try_run(describe).unwrap();
    }

    /// As [`run`](Self::run), with what a kernel refuses.
    pub fn try_run(&self, describe: impl FnOnce(&mut Calls<'_>) -> Result<(), KernelError>) -> Result<(), KernelError> {
        let mut calls = Calls::new(&[], &[], &[]);
        describe(&mut calls)?;
        let (work, scratch) = calls.finish();
        let scratch = self.allocate(scratch);
        for one in work {
            match one {
                Work::Call(call) => self.call(&call, scratch)?,
                Work::Product(product) => self.product(&product, scratch),
            }
        }
        Ok(())
    }

    /// A tensor of a call as one of this memory.
    fn placed(&self, t: &Tensor, scratch: usize) -> Tensor {
        match t.place {
            Place::Scratch => Tensor { offset: t.offset + scratch, ..*t },
            Place::Region(_) => *t,
        }
    }

    fn bytes(&self, argument: &Argument, scratch: usize, fault: *mut i32) -> Vec<u8> {
        let pointer = |t: &Tensor| (self.address(&self.placed(t, scratch)) as usize).to_ne_bytes();
        match argument {
            Argument::Rows(t) => {
                let sizes = [t.rows, t.cols].map(|n| (n as i32).to_ne_bytes());
                let data = if self.bf16 { self.shadow(self.placed(t, scratch)).to_ne_bytes() } else { pointer(t) };
                [&data[..], &sizes[0], &sizes[1], &(t.stride as i64).to_ne_bytes()].concat()
            }
            Argument::Pointer(t) => pointer(t).to_vec(),
            Argument::Null => vec![0; 8],
            Argument::NoRows => vec![0; 24],
            Argument::I32(x) => x.to_ne_bytes().to_vec(),
            Argument::U32(x) => x.to_ne_bytes().to_vec(),
            Argument::I64(x) => x.to_ne_bytes().to_vec(),
            Argument::U64(x) => x.to_ne_bytes().to_vec(),
            Argument::F32(x) => x.to_ne_bytes().to_vec(),
            Argument::F64(x) => x.to_ne_bytes().to_vec(),
            Argument::Table(entries) => {
                let mut table = Vec::new();
                for entry in entries {
                    let bytes = self.bytes(entry, scratch, fault);
                    table.resize(table.len().next_multiple_of(bytes.len().min(8)), 0);
                    table.extend(bytes);
                }
                let at = self.allocate(table.len());
                let to = self.blocks.borrow_mut()[at / APART].as_mut_ptr().cast::<u8>();
                // SAFETY: just allocated with this size.
                unsafe { std::ptr::copy_nonoverlapping(table.as_ptr(), to, table.len()) };
                (to as usize).to_ne_bytes().to_vec()
            }
            Argument::Fault => (fault as usize).to_ne_bytes().to_vec(),
        }
    }

    fn call(&self, call: &Call, scratch: usize) -> Result<(), KernelError> {
        let mut call = call.clone();
        if self.bf16 {
            call.defines.iter_mut().filter(|d| d.0 == "REAL").for_each(|d| d.1 = "bf16".into());
        }
        let call = &call;
        let mut fault = Box::new([0i32; 4]);
        let mut storage: Vec<Vec<u64>> = Vec::new();
        let mut sizes = Vec::new();
        for argument in &call.arguments {
            let bytes = self.bytes(argument, scratch, fault.as_mut_ptr());
            let words = bytes.chunks(8).map(|word| {
                let mut whole = [0; 8];
                whole[..word.len()].copy_from_slice(word);
                u64::from_ne_bytes(whole)
            });
            sizes.push(bytes.len());
            storage.push(words.collect());
        }
        let mut pointers: Vec<*mut c_void> = storage.iter_mut().map(|a| a.as_mut_ptr().cast()).collect();
        let name = CString::new(&*call.entry).unwrap();
        let library = module(call).library.lock().unwrap();
        // SAFETY: the functions have these types (see emulation.hpp), and the arguments are checked against the
        // kernel's parameters; tensors live as long as `self`.
        let (code, message) = unsafe {
            let count = library.get::<Params>(b"emu_params").unwrap()(name.as_ptr());
            assert_eq!(count, sizes.len() as c_int, "arguments of `{}`", call.entry);
            for (i, &size) in sizes.iter().enumerate() {
                let expected = library.get::<ParamSize>(b"emu_param_size").unwrap()(name.as_ptr(), i as c_int);
                assert_eq!(size, expected, "bytes of argument {i} of `{}`", call.entry);
            }
            let launch = library.get::<Launch>(b"emu_launch").unwrap();
            let (grid, block) = (call.grid.as_ptr(), call.block.as_ptr());
            let code = launch(name.as_ptr(), grid, block, call.shared, pointers.as_mut_ptr(), self.order);
            let error = library.get::<Error>(b"emu_error").unwrap()();
            (code, CStr::from_ptr(error).to_string_lossy().into_owned())
        };
        drop(library);
        assert_eq!(code, 0, "`{}`: {message}", call.entry);
        self.end_shadows();
        match call.refusal {
            Some(refusal) if fault[0] != 0 => Err(KernelError(refusal(*fault))),
            _ => Ok(()),
        }
    }

    fn product(&self, product: &Product, scratch: usize) {
        let Product { a, b, y, start, batches, .. } = *product;
        let values = |m: &Mat| {
            let t = self.placed(&m.tensor, scratch);
            (self.read(t), t.rows / batches, t.cols, m.transposed)
        };
        let ((a, ra, ca, ta), (b, rb, cb, tb)) = (values(&a), values(&b));
        let y = self.placed(&y, scratch);
        let mut out = self.read(y);
        let (m, n, k) = (y.rows / batches, y.cols, if ta { ra } else { ca });
        for batch in 0..batches {
            for (i, j) in (0..m).flat_map(|i| (0..n).map(move |j| (i, j))) {
                let sum: f64 = (0..k)
                    .map(|p| {
                        let left = if ta { a[(batch * ra + p) * ca + i] } else { a[(batch * ra + i) * ca + p] };
                        let right = if tb { b[(batch * rb + j) * cb + p] } else { b[(batch * rb + p) * cb + j] };
                        f64::from(left) * f64::from(right)
                    })
                    .sum();
                let to = &mut out[(batch * m + i) * n + j];
                *to = match start {
                    Start::Zero => sum as f32,
                    Start::Add(base) => self.read(self.placed(&base, scratch))[(batch * m + i) * n + j] + sum as f32,
                    Start::Bias(bias) => self.read(self.placed(&bias, scratch))[j] + sum as f32,
                };
            }
        }
        self.write(y, &out);
    }
}
