//! Launches bound to a device's memory: compiled, captured into a graph, replayed.
//!
//! The first run of a range goes launch by launch, so that libraries load what they need; the second is captured, and
//! later ones replay the graph: one call a step, whatever number of kernels it has.

use std::collections::HashMap;
use std::ffi::{CString, c_void};
use std::ops::Range;
use std::sync::Arc;

use cudarc::driver::result;
use cudarc::driver::sys;
use rayon::prelude::*;

use super::blas::{Blas, Planned};
use super::call::{Argument, Call, Place, Refusal, Tensor, Work};
use super::compile::{self, Options, Unit};
use super::device::{Memory, Pinned, Shared, failed, memory};
use super::units::{Described, LaunchWork, Units, describe};
use crate::device::{Buffer, DeviceError, KernelError, Launch, Program};

/// A program of a CUDA device.
pub(super) struct CudaProgram {
    launches: Vec<Bound>,
    graphs: HashMap<Range<usize>, Replay>,
    faults: Pinned,
    refusals: Vec<(usize, Refusal)>,
    modules: Vec<sys::CUmodule>,
    shared: Arc<Shared>,
    /// Kept alive: memory that the launches point into.
    _memory: (Vec<Memory>, [Buffer; 4]),
}

// SAFETY: handles of the driver may be used from any thread that has made the context current.
unsafe impl Send for CudaProgram {}

/// How often a range has run, or its graph.
enum Replay {
    Warm,
    Graph(sys::CUgraphExec),
}

struct Bound {
    name: String,
    steps: Vec<Step>,
}

enum Step {
    Kernel(KernelCall),
    Product(Planned),
}

struct KernelCall {
    function: sys::CUfunction,
    grid: [u32; 3],
    block: [u32; 3],
    shared: u32,
    parameters: Packed,
}

/// Arguments laid out as a kernel's parameters or in a table, in units of 8 bytes: each parameter has words of its own.
#[derive(Default)]
struct Packed {
    words: Vec<u64>,
    starts: Vec<usize>,
    /// The words that are places in the table memory.
    tables: Vec<usize>,
}

/// Where things lie.
struct Addresses {
    regions: [u64; 4],
    scratch: u64,
}

impl Addresses {
    fn of(&self, tensor: &Tensor) -> u64 {
        let base = match tensor.place {
            Place::Region(region) => self.regions[region.index()],
            Place::Scratch => self.scratch,
        };
        base + tensor.offset as u64
    }
}

impl Packed {
    fn push(&mut self, words: &[u64]) {
        self.starts.push(self.words.len());
        self.words.extend(words);
    }

    /// `Rows<T>`: a pointer, two `int`s, a `long long`.
    fn push_rows(&mut self, tensor: &Tensor, address: u64) {
        let sizes = u64::from(tensor.rows as u32) | u64::from(tensor.cols as u32) << 32;
        self.push(&[address, sizes, tensor.stride as u64]);
    }
}

impl CudaProgram {
    pub(super) fn load(shared: &Arc<Shared>, launches: Vec<Launch>, buffers: [Buffer; 4]) -> Result<Self, DeviceError> {
        let bytes = std::array::from_fn(|region| buffers[region].len);
        launches.iter().try_for_each(|launch| launch.validate(bytes))?;
        let Described { launches, scratch } = describe(launches)?;
        let scratch = Memory::zeroed(shared, scratch)?;
        let regions = std::array::from_fn(|region| memory(&buffers[region]).address);
        let addresses = Addresses { regions, scratch: scratch.address };
        let mut program = Self {
            launches: Vec::new(),
            graphs: HashMap::new(),
            faults: Pinned::zeroed(shared, 4 * count_faults(&launches))?,
            refusals: Vec::new(),
            modules: Vec::new(),
            shared: shared.clone(),
            _memory: (vec![scratch], buffers),
        };
        program.bind(launches, &addresses)?;
        Ok(program)
    }

    /// Compiles the kernels and packs their arguments.
    fn bind(&mut self, described: Vec<LaunchWork>, addresses: &Addresses) -> Result<(), DeviceError> {
        let shared = self.shared.clone();
        let units = Units::of(&described)?;
        let images = images(&units.units, &shared)?;
        shared.enter()?;
        for image in &images {
            // SAFETY: machine code from the compiler; modules are unloaded when the program goes.
            let module = unsafe { result::module::load_data(image.as_ptr().cast()) };
            self.modules.push(module.map_err(failed("cannot load machine code"))?);
        }
        let mut functions: HashMap<(usize, String), sys::CUfunction> = HashMap::new();
        let mut tables = Vec::new();
        for (number, LaunchWork { name, work }) in described.into_iter().enumerate() {
            let mut steps = Vec::with_capacity(work.len());
            for work in work {
                steps.push(match work {
                    Work::Product(product) => {
                        let mut state = shared.state.lock();
                        let planned = state.blas.plan(&product, |t| addresses.of(t));
                        Step::Product(planned.map_err(|e| DeviceError::Plan { launch: name.clone(), what: e })?)
                    }
                    Work::Call(call) => {
                        let module = units.module_of(&call);
                        let key = (module, call.entry.to_string());
                        let function = match functions.get(&key) {
                            Some(function) => *function,
                            None => {
                                let function = self.function(module, &call, &name)?;
                                functions.insert(key, function);
                                function
                            }
                        };
                        let fault = call.refusal.map(|refusal| {
                            self.refusals.push((number, refusal));
                            // SAFETY: `count_faults` counted this one.
                            unsafe { self.faults.host.add(4 * (self.refusals.len() - 1)) as u64 }
                        });
                        let packed = pack(&call.arguments, addresses, fault, &mut tables);
                        allow_shared(function, call.shared).map_err(|e| {
                            let words = failed("too much shared memory")(e).to_string();
                            DeviceError::Plan {
                                launch: name.clone(),
                                what: format!("kernel `{}`: {words}", call.entry),
                            }
                        })?;
                        Step::Kernel(KernelCall {
                            function,
                            grid: call.grid,
                            block: call.block,
                            shared: call.shared as u32,
                            parameters: packed,
                        })
                    }
                });
            }
            self.launches.push(Bound { name, steps });
        }
        // tables lie in one piece of memory, whose address their pointers get now
        let memory = Memory::zeroed(&shared, 8 * tables.len())?;
        for step in self.launches.iter_mut().flat_map(|l| &mut l.steps) {
            if let Step::Kernel(call) = step {
                let Packed { words, tables, .. } = &mut call.parameters;
                tables.iter().for_each(|&w| words[w] = memory.address + 8 * words[w]);
            }
        }
        if !tables.is_empty() {
            shared.synchronize()?;
            // SAFETY: the memory has so many words, and nothing runs that uses it.
            unsafe { result::memcpy_htod_sync(memory.address, &tables) }
                .map_err(failed("cannot copy to the device"))?;
        }
        self._memory.0.push(memory);
        Ok(())
    }

    fn function(&self, module: usize, call: &Call, launch: &str) -> Result<sys::CUfunction, DeviceError> {
        let name = CString::new(call.entry.as_bytes()).expect("names of kernels have no zero byte");
        // SAFETY: the module is loaded.
        unsafe { result::module::get_function(self.modules[module], name) }.map_err(|e| DeviceError::Plan {
            launch: launch.to_string(),
            what: format!("there is no kernel `{}`: {}", call.entry, failed("get_function")(e)),
        })
    }

    /// Puts the launches of a range on the stream.
    fn enqueue(&mut self, range: Range<usize>, blas: &Blas) -> Result<(), DeviceError> {
        for launch in &mut self.launches[range] {
            launch.enqueue(&self.shared, blas)?;
        }
        Ok(())
    }

    /// Captures the launches of a range.
    fn capture(&mut self, range: Range<usize>, blas: &Blas) -> Result<sys::CUgraphExec, DeviceError> {
        let stream = self.shared.stream;
        let what = failed("cannot capture the step");
        // SAFETY: the stream is this device's, and the lock keeps others from it; the graph is destroyed here, its
        // executable form when the program goes.
        unsafe {
            let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
            result::stream::begin_capture(stream, mode).map_err(&what)?;
            let enqueued = self.enqueue(range, blas);
            let graph = result::stream::end_capture(stream);
            enqueued?;
            let graph = graph.map_err(&what)?;
            let mut executable = std::ptr::null_mut();
            let made = sys::cuGraphInstantiateWithFlags(&mut executable, graph, 0).result();
            let _ = sys::cuGraphDestroy(graph);
            made.map_err(&what)?;
            Ok(executable)
        }
    }

    /// What a kernel refused since the last time.
    fn refused(&mut self) -> Result<(), DeviceError> {
        for (i, (launch, refusal)) in self.refusals.iter().enumerate() {
            let words: [i32; 4] = std::array::from_fn(|w| self.faults.get(4 * i + w));
            if words[0] != 0 {
                (0..4).for_each(|w| self.faults.set(4 * i + w, 0));
                let source = KernelError(refusal(words));
                return Err(DeviceError::Kernel { launch: self.launches[*launch].name.clone(), source });
            }
        }
        Ok(())
    }
}

impl Program for CudaProgram {
    fn run(&mut self, range: Range<usize>) -> Result<(), DeviceError> {
        self.refused()?;
        self.shared.take_failure()?;
        self.shared.enter()?;
        let shared = self.shared.clone();
        let state = shared.state.lock();
        match self.graphs.get(&range) {
            Some(Replay::Graph(graph)) => {
                // SAFETY: the graph's kernels use memory that the program keeps alive.
                let launched = unsafe { sys::cuGraphLaunch(*graph, shared.stream) };
                launched.result().map_err(failed("cannot launch the step"))
            }
            Some(Replay::Warm) if shared.settings.capture => {
                let graph = self.capture(range.clone(), &state.blas)?;
                self.graphs.insert(range, Replay::Graph(graph));
                // SAFETY: as above.
                let launched = unsafe { sys::cuGraphLaunch(graph, shared.stream) };
                launched.result().map_err(failed("cannot launch the step"))
            }
            _ => {
                self.graphs.insert(range.clone(), Replay::Warm);
                self.enqueue(range, &state.blas)
            }
        }
    }

    fn run_timed(&mut self, range: Range<usize>, seconds: &mut [f64]) -> Result<(), DeviceError> {
        self.refused()?;
        self.shared.take_failure()?;
        self.shared.enter()?;
        let shared = self.shared.clone();
        let state = shared.state.lock();
        let what = failed("cannot time the step");
        let mut events = Vec::with_capacity(range.len() + 1);
        let record = |events: &mut Vec<sys::CUevent>| {
            // SAFETY: the event is destroyed below, after its last use.
            unsafe {
                let event = result::event::create(sys::CUevent_flags::CU_EVENT_DEFAULT)?;
                events.push(event);
                result::event::record(event, shared.stream)
            }
        };
        let mut enqueue = || {
            record(&mut events).map_err(&what)?;
            for i in range.clone() {
                self.launches[i].enqueue(&shared, &state.blas)?;
                record(&mut events).map_err(&what)?;
            }
            shared.synchronize()
        };
        let mut done = enqueue();
        for (pair, i) in events.windows(2).zip(range) {
            if done.is_ok() {
                // SAFETY: both events have happened.
                match unsafe { result::event::elapsed(pair[0], pair[1]) } {
                    Ok(milliseconds) => seconds[i] += f64::from(milliseconds) * 1e-3,
                    Err(e) => done = Err(what(e)),
                }
            }
        }
        for event in events {
            // SAFETY: made above, destroyed once.
            let _ = unsafe { result::event::destroy(event) };
        }
        drop(state);
        done?;
        self.refused()
    }

    fn check(&mut self) -> Result<(), DeviceError> {
        self.shared.synchronize()?;
        self.refused()?;
        self.shared.take_failure()
    }
}

impl Bound {
    fn enqueue(&mut self, shared: &Shared, blas: &Blas) -> Result<(), DeviceError> {
        for step in &mut self.steps {
            match step {
                Step::Kernel(call) => {
                    let Packed { words, starts, .. } = &mut call.parameters;
                    let mut parameters = [std::ptr::null_mut::<c_void>(); 128];
                    for (parameter, start) in parameters.iter_mut().zip(&*starts) {
                        *parameter = words.as_mut_ptr().wrapping_add(*start).cast();
                    }
                    let ([gx, gy, gz], [bx, by, bz]) = (call.grid, call.block);
                    // SAFETY: the parameters are those of the kernel, and the memory they point to is alive; overlaps were
                    // excluded by `validate`.
                    let launched = unsafe {
                        let parameters = &mut parameters[..starts.len()];
                        let (grid, block) = ((gx, gy, gz), (bx, by, bz));
                        result::launch_kernel(call.function, grid, block, call.shared, shared.stream, parameters)
                    };
                    launched.map_err(|e| self_failed(&self.name, failed("cannot launch a kernel")(e)))?;
                }
                Step::Product(planned) => {
                    // SAFETY: the addresses were those of live tensors when it was planned, and the program keeps them.
                    unsafe { blas.run(planned, shared.workspace, shared.stream) }
                        .map_err(|e| DeviceError::Failed(format!("`{}`: cuBLASLt: {e}", self.name)))?;
                }
            }
        }
        Ok(())
    }
}

fn self_failed(launch: &str, error: DeviceError) -> DeviceError {
    DeviceError::Failed(format!("`{launch}`: {error}"))
}

impl Drop for CudaProgram {
    fn drop(&mut self) {
        if self.shared.synchronize().is_err() {
            return;
        }
        // SAFETY: made by this program, released once, and nothing of it runs any more.
        unsafe {
            for replay in self.graphs.values() {
                if let Replay::Graph(graph) = replay {
                    let _ = sys::cuGraphExecDestroy(*graph);
                }
            }
            for module in &self.modules {
                let _ = result::module::unload(*module);
            }
        }
    }
}

/// More than 48 KiB of dynamic shared memory must be asked for.
fn allow_shared(function: sys::CUfunction, bytes: usize) -> Result<(), result::DriverError> {
    if bytes <= 48 << 10 {
        return Ok(());
    }
    let attribute = sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
    // SAFETY: the function's module is loaded.
    unsafe { result::function::set_function_attribute(function, attribute, bytes as i32) }
}

fn count_faults(described: &[LaunchWork]) -> usize {
    let refuses = |w: &&Work| matches!(w, Work::Call(call) if call.refusal.is_some());
    described.iter().flat_map(|d| &d.work).filter(refuses).count()
}

/// The arguments as words: each parameter begins at a word.
fn pack(arguments: &[Argument], addresses: &Addresses, fault: Option<u64>, tables: &mut Vec<u64>) -> Packed {
    let mut packed = Packed::default();
    for argument in arguments {
        match argument {
            Argument::Rows(tensor) => packed.push_rows(tensor, addresses.of(tensor)),
            Argument::Pointer(tensor) => packed.push(&[addresses.of(tensor)]),
            Argument::NoRows => packed.push(&[0, 0, 0]),
            Argument::Null => packed.push(&[0]),
            Argument::I32(x) => packed.push(&[u64::from(*x as u32)]),
            Argument::U32(x) => packed.push(&[u64::from(*x)]),
            Argument::I64(x) => packed.push(&[*x as u64]),
            Argument::U64(x) => packed.push(&[*x]),
            Argument::F32(x) => packed.push(&[u64::from(x.to_bits())]),
            Argument::F64(x) => packed.push(&[x.to_bits()]),
            Argument::Fault => packed.push(&[fault.unwrap_or(0)]),
            Argument::Table(entries) => {
                let entries = pack(entries, addresses, fault, tables);
                packed.tables.push(packed.words.len());
                packed.push(&[tables.len() as u64]);
                tables.extend(entries.words);
            }
        }
    }
    packed
}

/// Machine code of every unit, from disk where it is there.
fn images(units: &[Unit], shared: &Shared) -> Result<Vec<Vec<u8>>, DeviceError> {
    let options = Options { arch: shared.arch.clone(), verbose: false };
    let one = |unit: &Unit| {
        if let Some(image) = shared.cache.get(unit, &options, &shared.name) {
            return Ok(image);
        }
        if !compile::is_available() {
            let what = "NVRTC (libnvrtc.so) is not on the library path: install the CUDA toolkit, or set CUDA_HOME";
            return Err(DeviceError::Failed(what.into()));
        }
        let compiled = compile::compile(unit, &options).map_err(DeviceError::Failed)?;
        shared.cache.put(unit, &options, &shared.name, &compiled.image);
        Ok(compiled.image)
    };
    units.par_iter().map(one).collect()
}
