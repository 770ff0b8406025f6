//! The device boundary: memory, launches, and what runs them.
//!
//! A plan is a list of [`Launch`]es over a few memory regions. A [`Device`] allocates the regions, binds the
//! launches to them once, and runs them any number of times. Everything above this line is the same for every
//! device; another device implements [`Device`] and adds its form of [`Kernel`].

use std::any::Any;
use std::fmt;
use std::ops::Range;
use std::sync::Arc;

pub use crate::cpu::device::{Arguments, CpuDevice};
pub use crate::cuda::call::Calls;

use crate::cpu::team::{Team, parallel_for};

/// The kind of device that a kernel is written for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Target {
    /// The processor.
    Cpu,
    /// A CUDA device.
    Cuda,
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Target::Cpu => "cpu",
            Target::Cuda => "cuda",
        })
    }
}

/// Element types.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DType {
    /// IEEE single precision.
    F32,
    /// Token ids, targets and counters.
    I32,
    /// The upper half of an IEEE single.
    Bf16,
}

impl DType {
    /// Bytes of an element.
    pub fn size(self) -> usize {
        match self {
            DType::F32 | DType::I32 => 4,
            DType::Bf16 => 2,
        }
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            DType::F32 => "f32",
            DType::I32 => "i32",
            DType::Bf16 => "bf16",
        })
    }
}

/// The memory regions of a program. They are separate allocations, so that programs can share parameters
/// and each have an arena of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Region {
    /// Activations, gradients and temporaries: laid out by liveness, contents last one step.
    Arena,
    /// Trained parameters.
    Parameters,
    /// Optimizer moments, gradient accumulators, counters.
    State,
    /// What the host writes before a run and reads after it: tokens, targets, losses.
    Io,
}

impl Region {
    /// Every region, in the order of [`Device::load`]'s buffers.
    pub const ALL: [Region; 4] = [Region::Arena, Region::Parameters, Region::State, Region::Io];

    /// Its place in [`ALL`](Self::ALL).
    pub fn index(self) -> usize {
        match self {
            Region::Arena => 0,
            Region::Parameters => 1,
            Region::State => 2,
            Region::Io => 3,
        }
    }
}

/// A tensor of a launch: a row-strided matrix in a region.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Operand {
    /// Where it lies.
    pub region: Region,
    /// Byte offset of its first element.
    pub offset: usize,
    /// Product of its leading dimensions.
    pub rows: usize,
    /// Its last dimension.
    pub cols: usize,
    /// Elements from one row to the next.
    pub stride: usize,
    /// Element type.
    pub dtype: DType,
}

impl Operand {
    /// Bytes from the first element to one past the last.
    pub fn span(&self) -> Range<usize> {
        let elements = if self.rows == 0 || self.cols == 0 { 0 } else { (self.rows - 1) * self.stride + self.cols };
        self.offset..self.offset + elements * self.dtype.size()
    }

    /// Whether the two share an element. Column blocks of one wide buffer do not.
    pub fn overlaps(&self, other: &Operand) -> bool {
        let (a, b) = (self.span(), other.span());
        if self.region != other.region || a.start >= b.end || b.start >= a.end {
            return false;
        }
        let bytes = self.stride * self.dtype.size();
        if self.rows <= 1 || other.rows <= 1 || bytes != other.stride * other.dtype.size() || bytes == 0 {
            return true;
        }
        // rows of both repeat with one period: within it, self has the bytes from 0 on, other those from `start` on
        let start = (other.offset as isize - self.offset as isize).rem_euclid(bytes as isize) as usize;
        let size = self.dtype.size();
        start < self.cols * size || start + other.cols * size > bytes
    }
}

/// Why a kernel refused its input, in words for the user.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
#[error("{0}")]
pub struct KernelError(pub String);

/// A kernel for the processor: reads and writes the tensors of its launch.
pub type CpuKernel = Box<dyn Fn(&Arguments<'_>) -> Result<(), KernelError> + Send + Sync>;

/// A kernel for a CUDA device: writes down the calls of its launch, once, when a plan is loaded.
pub type CudaKernel = Box<dyn Fn(&mut Calls<'_>) -> Result<(), KernelError> + Send + Sync>;

/// The code that a launch runs.
pub enum Kernel {
    /// A closure over slices.
    Cpu(CpuKernel),
    /// Kernel calls and matrix products, see [`cuda::call`](crate::cuda::call).
    Cuda(CudaKernel),
}

impl Kernel {
    /// A CPU kernel.
    pub fn cpu(run: impl Fn(&Arguments<'_>) -> Result<(), KernelError> + Send + Sync + 'static) -> Self {
        Kernel::Cpu(Box::new(run))
    }

    /// A CUDA kernel.
    pub fn cuda(describe: impl Fn(&mut Calls<'_>) -> Result<(), KernelError> + Send + Sync + 'static) -> Self {
        Kernel::Cuda(Box::new(describe))
    }

    /// What it is for.
    pub fn target(&self) -> Target {
        match self {
            Kernel::Cpu(_) => Target::Cpu,
            Kernel::Cuda(_) => Target::Cuda,
        }
    }
}

impl fmt::Debug for Kernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.target())
    }
}

/// One kernel with its tensors.
#[derive(Debug)]
pub struct Launch {
    /// For messages and profiles.
    pub name: String,
    /// What runs.
    pub kernel: Kernel,
    /// Tensors that are read.
    pub inputs: Vec<Operand>,
    /// Tensors that are written.
    pub outputs: Vec<Operand>,
    /// Pairs (output, input) that are the same memory: the kernel updates it in place.
    pub in_place: Vec<(usize, usize)>,
}

impl Launch {
    /// Checks that every operand lies in its region, whose sizes are `bytes`, and that none overlaps one that is written.
    ///
    /// # Errors
    /// [`DeviceError::Plan`]
    pub(crate) fn validate(&self, bytes: [usize; 4]) -> Result<(), DeviceError> {
        let wrong = |what: String| Err(DeviceError::Plan { launch: self.name.clone(), what });
        for operand in self.inputs.iter().chain(&self.outputs) {
            let len = bytes[operand.region.index()];
            if operand.span().end > len || !operand.offset.is_multiple_of(operand.dtype.size()) {
                return wrong(format!("{operand:?} lies outside of its region of {len} bytes"));
            }
            if operand.rows > 1 && operand.stride < operand.cols {
                return wrong(format!("rows of {operand:?} overlap"));
            }
        }
        for (o, output) in self.outputs.iter().enumerate() {
            for (i, input) in self.inputs.iter().enumerate() {
                let allowed = self.in_place.contains(&(o, i)) && input == output;
                if input.overlaps(output) && !allowed {
                    return wrong(format!("output {o} overlaps input {i}: {output:?}, {input:?}"));
                }
            }
            if let Some(other) = self.outputs[..o].iter().position(|other| other.overlaps(output)) {
                return wrong(format!("outputs {o} and {other} overlap"));
            }
        }
        Ok(())
    }
}

/// What can go wrong on a device.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// No memory left.
    #[error("the device has no room for {0} more bytes: use a smaller batch, block or model")]
    OutOfMemory(usize),
    /// Two tensors of a launch overlap although one of them is written.
    #[error("launch `{launch}`: {what}")]
    Plan {
        /// Its name.
        launch: String,
        /// What is wrong with it.
        what: String,
    },
    /// A kernel refused its input.
    #[error("`{launch}`: {source}")]
    Kernel {
        /// The launch's name.
        launch: String,
        /// The kernel's words.
        source: KernelError,
    },
    /// The device itself does not do what it is asked to.
    #[error("{0}")]
    Failed(String),
}

/// Device memory. Clones share it.
#[derive(Clone)]
pub struct Buffer {
    /// Bytes.
    pub len: usize,
    pub(crate) memory: Arc<dyn Any + Send + Sync>,
}

impl fmt::Debug for Buffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Buffer({} bytes)", self.len)
    }
}

/// What runs a plan.
pub trait Device: Send + Sync {
    /// For people: name, instruction set, threads.
    fn describe(&self) -> String;

    /// Which kernels it takes.
    fn target(&self) -> Target;

    /// The floating-point operations a second that its maker promises for dense matrix products with factors of this
    /// type; `None` where that is not known, as of processors.
    fn peak_flops(&self, _factors: DType) -> Option<f64> {
        None
    }

    /// Zeroed memory.
    ///
    /// # Errors
    /// [`DeviceError::OutOfMemory`]
    fn allocate(&self, bytes: usize) -> Result<Buffer, DeviceError>;

    /// Copies `bytes` to byte `offset` of `to`.
    ///
    /// # Panics
    /// If they do not fit.
    fn write(&self, to: &Buffer, offset: usize, bytes: &[u8]);

    /// Copies from byte `offset` of `from`.
    ///
    /// # Panics
    /// If `from` is shorter.
    fn read(&self, from: &Buffer, offset: usize, into: &mut [u8]);

    /// Runs `task(0) … task(tasks - 1)` on threads of the processor, in any order.
    fn on_host(&self, tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        match Team::new(None) {
            Ok(team) => team.run(|| parallel_for(tasks, task)),
            // slower, but not worse
            Err(_) => (0..tasks).for_each(task),
        }
    }

    /// Binds launches to memory, one buffer a [`Region`].
    ///
    /// # Errors
    /// [`DeviceError::Plan`] where an operand lies outside its region or overlaps one that is written.
    fn load(&self, launches: Vec<Launch>, buffers: [Buffer; 4]) -> Result<Box<dyn Program>, DeviceError>;
}

/// Launches bound to memory.
pub trait Program: Send {
    /// Runs the launches of `range`, in order.
    ///
    /// # Errors
    /// [`DeviceError::Kernel`] if one refuses its input (a token id outside the vocabulary, say).
    fn run(&mut self, range: Range<usize>) -> Result<(), DeviceError>;

    /// As [`run`](Self::run), and adds the seconds each launch took to its place in `seconds`.
    ///
    /// # Errors
    /// As `run`.
    fn run_timed(&mut self, range: Range<usize>, seconds: &mut [f64]) -> Result<(), DeviceError>;

    /// Waits until everything that was asked for is done, and tells what went wrong meanwhile: a device may run
    /// behind the program that asks.
    ///
    /// # Errors
    /// As `run`.
    fn check(&mut self) -> Result<(), DeviceError> {
        Ok(())
    }
}

/// Numbers that go to a device as they lie in memory.
pub trait Element: Copy + Default + Send + Sync + 'static {
    /// Their element type.
    const DTYPE: DType;
}

impl Element for f32 {
    const DTYPE: DType = DType::F32;
}
impl Element for i32 {
    const DTYPE: DType = DType::I32;
}

/// A number of the type `bf16`: the upper 16 bits of a single.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(transparent)]
pub struct Bf16(pub u16);

impl Bf16 {
    /// The nearest one, halfway to even.
    pub fn from_f32(x: f32) -> Self {
        let bits = x.to_bits();
        if x.is_nan() {
            return Self((bits >> 16) as u16 | 0x40); // rounding might make an infinity of it
        }
        let round = 0x7fff + ((bits >> 16) & 1);
        Self((bits.wrapping_add(round) >> 16) as u16)
    }

    /// The number.
    pub fn to_f32(self) -> f32 {
        f32::from_bits(u32::from(self.0) << 16)
    }
}

impl Element for Bf16 {
    const DTYPE: DType = DType::Bf16;
}

/// The bytes of a slice of numbers.
pub fn as_bytes<T: Element>(data: &[T]) -> &[u8] {
    // SAFETY: f32, i32 and Bf16 have no padding and any alignment is right for u8.
    unsafe { std::slice::from_raw_parts(data.as_ptr().cast(), std::mem::size_of_val(data)) }
}

/// The bytes of a slice of numbers, for writing.
pub fn as_bytes_mut<T: Element>(data: &mut [T]) -> &mut [u8] {
    // SAFETY: as above, and every bit pattern is an f32, i32 or Bf16.
    unsafe { std::slice::from_raw_parts_mut(data.as_mut_ptr().cast(), std::mem::size_of_val(data)) }
}
