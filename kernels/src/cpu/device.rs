//! The processor as a [`Device`].

use std::cell::Cell;
use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use parking_lot::Mutex;

use super::pages::Pages;
use super::simd;
use super::team::{Team, parallel_for};
use crate::cpu::output::Output;
use crate::device::{
    Bf16, Buffer, CpuKernel, DType, Device, DeviceError, Element, Kernel, Launch, Operand, Program, Target,
};
use crate::{Rows, RowsMut};

/// Bytes that can be used before the machine runs out of memory, where the system tells.
fn available_memory() -> Option<usize> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let kilobytes = |name: &str| {
        let line = text.lines().find_map(|l| l.strip_prefix(name))?;
        line.split_whitespace().next()?.parse::<usize>().ok()
    };
    let total = kilobytes("MemAvailable:")? + kilobytes("SwapFree:").unwrap_or(0);
    total.checked_mul(1024)
}

/// The processor: kernels are closures, threads a team of its own.
pub struct CpuDevice {
    team: Arc<Team>,
    /// Held during every access to any buffer of this device.
    lock: Arc<Mutex<()>>,
}

impl CpuDevice {
    /// A device of `threads` threads, or of as many as the machine has processors.
    ///
    /// # Errors
    /// If the system refuses to start the threads.
    pub fn new(threads: Option<usize>) -> Result<Self, String> {
        let team = Team::new(threads).map_err(|e| format!("cannot start the kernel threads: {e}"))?;
        Ok(Self { team: Arc::new(team), lock: Arc::default() })
    }

    /// Number of threads.
    pub fn threads(&self) -> usize {
        self.team.threads()
    }
}

fn memory(buffer: &Buffer) -> &Pages {
    buffer.memory.downcast_ref().expect("a buffer of another device")
}

impl Device for CpuDevice {
    fn describe(&self) -> String {
        format!("cpu ({}, {} threads)", simd::level().name(), self.threads())
    }

    fn target(&self) -> Target {
        Target::Cpu
    }

    fn allocate(&self, bytes: usize) -> Result<Buffer, DeviceError> {
        // systems promise memory that they do not have, and end the process that uses it
        if available_memory().is_some_and(|available| bytes > available) {
            return Err(DeviceError::OutOfMemory(bytes));
        }
        let memory = Pages::zeroed(bytes).ok_or(DeviceError::OutOfMemory(bytes))?;
        Ok(Buffer { len: bytes, memory: Arc::new(memory) })
    }

    fn write(&self, to: &Buffer, offset: usize, bytes: &[u8]) {
        assert!(offset + bytes.len() <= to.len);
        let _guard = self.lock.lock();
        // SAFETY: in range, and the lock, which is held during every access, makes it exclusive.
        unsafe { memory(to).as_ptr().add(offset).copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) }
    }

    fn read(&self, from: &Buffer, offset: usize, into: &mut [u8]) {
        assert!(offset + into.len() <= from.len);
        let _guard = self.lock.lock();
        // SAFETY: in range, and the lock makes the access exclusive.
        unsafe { into.as_mut_ptr().copy_from_nonoverlapping(memory(from).as_ptr().add(offset), into.len()) }
    }

    fn on_host(&self, tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        self.team.run(|| parallel_for(tasks, task));
    }

    fn load(&self, launches: Vec<Launch>, buffers: [Buffer; 4]) -> Result<Box<dyn Program>, DeviceError> {
        let bound = launches.into_iter().map(|l| Bound::new(l, &buffers)).collect::<Result<_, _>>()?;
        Ok(Box::new(CpuProgram {
            launches: bound,
            _buffers: buffers,
            team: self.team.clone(),
            lock: self.lock.clone(),
        }))
    }
}

/// A tensor with its address.
struct Tensor {
    operand: Operand,
    ptr: *mut u8,
    /// Handed to the kernel in this run.
    taken: Cell<bool>,
}

struct Bound {
    name: String,
    kernel: CpuKernel,
    inputs: Vec<Tensor>,
    outputs: Vec<Tensor>,
    in_place: Vec<(usize, usize)>,
}

// SAFETY: the addresses point into buffers that the program keeps alive and reaches under the lock only; the
// cells are touched by the thread that runs the launch.
unsafe impl Send for Bound {}

impl Bound {
    fn new(launch: Launch, buffers: &[Buffer; 4]) -> Result<Self, DeviceError> {
        launch.validate(std::array::from_fn(|region| buffers[region].len))?;
        let bind = |operand: &Operand| {
            // SAFETY: in range, which was checked above.
            let ptr = unsafe { memory(&buffers[operand.region.index()]).as_ptr().add(operand.offset) };
            Tensor { operand: operand.clone(), ptr, taken: Cell::new(false) }
        };
        let inputs = launch.inputs.iter().map(&bind).collect();
        let outputs = launch.outputs.iter().map(&bind).collect();
        let kernel = match launch.kernel {
            Kernel::Cpu(kernel) => kernel,
            other => {
                let what = format!("its kernel is for {}, not for the processor", other.target());
                return Err(DeviceError::Plan { launch: launch.name, what });
            }
        };
        Ok(Self { name: launch.name, kernel, inputs, outputs, in_place: launch.in_place })
    }

    fn run(&self) -> Result<(), DeviceError> {
        self.outputs.iter().for_each(|t| t.taken.set(false));
        let done = (self.kernel)(&Arguments { launch: self });
        done.map_err(|source| DeviceError::Kernel { launch: self.name.clone(), source })
    }
}

/// The tensors of a running launch.
///
/// Outputs are handed out once each, and an input that an output updates in place is not handed out at all,
/// so safe code cannot make two overlapping slices of which one is writable.
pub struct Arguments<'a> {
    launch: &'a Bound,
}

impl<'a> Arguments<'a> {
    fn check<T: Element>(tensor: &Tensor) {
        assert!(tensor.operand.dtype == T::DTYPE, "the tensor is {}, not {}", tensor.operand.dtype, T::DTYPE);
    }

    /// Number of inputs.
    pub fn inputs(&self) -> usize {
        self.launch.inputs.len()
    }

    /// Number of outputs.
    pub fn outputs(&self) -> usize {
        self.launch.outputs.len()
    }

    /// The input that output `o` updates in place, if there is one.
    pub fn in_place(&self, o: usize) -> Option<usize> {
        self.launch.in_place.iter().find(|pair| pair.0 == o).map(|pair| pair.1)
    }

    /// Input `i` as a matrix `[rows, last dimension]`.
    ///
    /// # Panics
    /// If its elements are not `T`, or an output updates it in place.
    pub fn rows<T: Element>(&self, i: usize) -> Rows<'a, T> {
        let tensor = &self.launch.inputs[i];
        Self::check::<T>(tensor);
        assert!(self.launch.in_place.iter().all(|pair| pair.1 != i), "input {i} is updated in place");
        let o = &tensor.operand;
        // SAFETY: bound in range; `load` proved that no output of this launch overlaps it.
        unsafe { Rows::from_raw(tensor.ptr.cast(), o.rows, o.cols, o.stride) }
    }

    /// Input `i`, which must lie without gaps, as a slice.
    ///
    /// # Panics
    /// As [`rows`](Self::rows), or if it has gaps.
    pub fn slice<T: Element>(&self, i: usize) -> &'a [T] {
        self.rows(i).as_slice().expect("the input has gaps between its rows")
    }

    /// Output `o` as a matrix. Where it updates an input in place it holds that input's values.
    ///
    /// # Panics
    /// If its elements are not `T`, or it was handed out before.
    pub fn rows_mut<T: Element>(&self, o: usize) -> RowsMut<'a, T> {
        let tensor = &self.launch.outputs[o];
        Self::check::<T>(tensor);
        assert!(!tensor.taken.replace(true), "output {o} was handed out before");
        let p = &tensor.operand;
        // SAFETY: bound in range; handed out once; `load` proved that nothing else of this launch overlaps
        // it but an input that `rows` refuses to hand out.
        unsafe { RowsMut::from_raw(tensor.ptr.cast(), p.rows, p.cols, p.stride) }
    }

    /// Output `o` in the type that it has.
    ///
    /// # Panics
    /// As [`rows_mut`](Self::rows_mut), or if it is neither of the two.
    pub fn output(&self, o: usize) -> Output<'a> {
        match self.launch.outputs[o].operand.dtype {
            DType::Bf16 => self.rows_mut::<Bf16>(o).into(),
            _ => self.rows_mut::<f32>(o).into(),
        }
    }

    /// Output `o`, which must lie without gaps, as a slice.
    ///
    /// # Panics
    /// As [`rows_mut`](Self::rows_mut), or if it has gaps.
    pub fn slice_mut<T: Element>(&self, o: usize) -> &'a mut [T] {
        let mut rows = self.rows_mut::<T>(o);
        let len = rows.rows() * rows.cols();
        assert!(rows.is_contiguous(), "the output has gaps between its rows");
        // SAFETY: without gaps, so `len` elements; handed out once.
        unsafe { std::slice::from_raw_parts_mut(rows.as_mut_ptr(), len) }
    }

    /// The element type of input `i`.
    pub fn input_dtype(&self, i: usize) -> DType {
        self.launch.inputs[i].operand.dtype
    }
}

struct CpuProgram {
    launches: Vec<Bound>,
    /// Keeps the memory alive that the launches point into.
    _buffers: [Buffer; 4],
    team: Arc<Team>,
    lock: Arc<Mutex<()>>,
}

impl Program for CpuProgram {
    fn run(&mut self, range: Range<usize>) -> Result<(), DeviceError> {
        let _guard = self.lock.lock();
        let launches = &mut self.launches[range];
        self.team.run(|| launches.iter_mut().try_for_each(|launch| launch.run()))
    }

    fn run_timed(&mut self, range: Range<usize>, seconds: &mut [f64]) -> Result<(), DeviceError> {
        let _guard = self.lock.lock();
        let launches = &mut self.launches[range.clone()];
        let seconds = &mut seconds[range];
        self.team.run(|| {
            launches.iter_mut().zip(seconds).try_for_each(|(launch, total)| {
                let start = Instant::now();
                launch.run()?;
                *total += start.elapsed().as_secs_f64();
                Ok(())
            })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::{Region, as_bytes, as_bytes_mut};

    fn operand(offset: usize, rows: usize, cols: usize, stride: usize) -> Operand {
        Operand { region: Region::Arena, offset, rows, cols, stride, dtype: DType::F32 }
    }

    fn device_and_buffers() -> (CpuDevice, [Buffer; 4]) {
        let device = CpuDevice::new(Some(1)).unwrap();
        let buffers = std::array::from_fn(|_| device.allocate(64).unwrap());
        (device, buffers)
    }

    #[test]
    fn a_launch_reads_and_writes_strided_tensors() {
        let (device, buffers) = device_and_buffers();
        device.write(&buffers[0], 0, as_bytes(&[1.0f32, 2.0, 3.0, 4.0]));
        let launch = Launch {
            name: "copy".into(),
            kernel: Kernel::cpu(|a| {
                let (x, mut y) = (a.rows::<f32>(0), a.rows_mut::<f32>(0));
                (0..2).for_each(|r| y.row(r).copy_from_slice(x.row(r)));
                Ok(())
            }),
            inputs: vec![operand(0, 2, 1, 2)],
            outputs: vec![operand(16, 2, 1, 1)],
            in_place: vec![],
        };
        device.load(vec![launch], buffers.clone()).unwrap().run(0..1).unwrap();
        let mut out = [0.0f32; 2];
        device.read(&buffers[0], 16, as_bytes_mut(&mut out));
        assert_eq!(out, [1.0, 3.0]);
    }

    #[test]
    fn more_memory_than_there_is_is_an_error() {
        let device = CpuDevice::new(Some(1)).unwrap();
        let Some(available) = available_memory() else { return };
        assert!(available > 1 << 20, "{available}");
        // twice that: other processes may give some back meanwhile
        for bytes in [2 * available, isize::MAX as usize, usize::MAX] {
            assert!(matches!(device.allocate(bytes), Err(DeviceError::OutOfMemory(b)) if b == bytes));
        }
    }

    #[test]
    fn overlap_is_refused_unless_columns_differ() {
        let (device, buffers) = device_and_buffers();
        let launch = |input: Operand, output: Operand| Launch {
            name: "overlap".into(),
            kernel: Kernel::cpu(|_| Ok(())),
            inputs: vec![input],
            outputs: vec![output],
            in_place: vec![],
        };
        assert!(device.load(vec![launch(operand(0, 2, 2, 2), operand(8, 2, 2, 2))], buffers.clone()).is_err());
        assert!(device.load(vec![launch(operand(0, 2, 1, 2), operand(4, 2, 1, 2))], buffers.clone()).is_ok());
        assert!(device.load(vec![launch(operand(8, 2, 1, 4), operand(4, 2, 1, 4))], buffers.clone()).is_ok());
        assert!(device.load(vec![launch(operand(8, 2, 2, 4), operand(12, 2, 2, 4))], buffers.clone()).is_err());
        assert!(device.load(vec![launch(operand(0, 2, 1, 1), operand(60, 2, 1, 1))], buffers).is_err());
    }
}
