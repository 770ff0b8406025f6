//! A CUDA device as a [`Device`]: memory, two streams, the compiler's cache.
//!
//! Everything runs in order on one stream, behind the program that asks for it. Batches go up on a stream of their own,
//! through pinned memory into a staging area on the device, while the step before still computes; the copy from there into
//! place is part of the first stream's order.

use std::ffi::c_void;
use std::sync::Arc;

use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys;
use parking_lot::Mutex;

use super::blas::{Blas, WORKSPACE};
use super::compile::Cache;
use super::peak;
use super::program::CudaProgram;
use crate::device::{Buffer, DType, Device, DeviceError, Launch, Program, Target};

/// Bytes of a slot of the staging area; larger writes wait for the device instead.
const SLOT: usize = 8 << 20;
/// Writes that may be under way at once: tokens and targets of two batches.
const SLOTS: usize = 4;

/// How to run.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// Which device, counted from 0.
    pub ordinal: usize,
    /// Whether steps are captured into graphs; launch by launch otherwise.
    pub capture: bool,
    /// Whether products of `f32` may round their inputs to TF32.
    pub tf32: bool,
}

impl Default for Settings {
    fn default() -> Self {
        Self { ordinal: 0, capture: true, tf32: false }
    }
}

/// What a driver call says, in words.
pub(super) fn failed(what: &str) -> impl Fn(DriverError) -> DeviceError + '_ {
    move |e| {
        let text = |r: Result<&std::ffi::CStr, DriverError>| r.map_or("?".into(), |s| s.to_string_lossy().into_owned());
        DeviceError::Failed(format!("CUDA: {what}: {} ({})", text(e.error_string()), text(e.error_name())))
    }
}

/// A context with its streams. All use is under the lock.
pub(super) struct Shared {
    device: sys::CUdevice,
    context: sys::CUcontext,
    pub(super) stream: sys::CUstream,
    uploads: sys::CUstream,
    pub(super) settings: Settings,
    pub(super) arch: String,
    pub(super) name: String,
    pub(super) cache: Cache,
    pub(super) workspace: u64,
    pub(super) state: Mutex<State>,
}

/// What changes.
pub(super) struct State {
    pub(super) blas: Blas,
    staging: Option<Staging>,
    /// A failure of a call that could not report it.
    failure: Option<DeviceError>,
}

// SAFETY: the driver's handles may be used from any thread that has made the context current.
unsafe impl Send for Shared {}
// SAFETY: as above, and all use is under the lock of `state`.
unsafe impl Sync for Shared {}
// SAFETY: as above.
unsafe impl Send for State {}

/// Slots that uploads go through, in turn.
struct Staging {
    host: *mut u8,
    device: u64,
    /// Of each slot: uploaded, and copied into place.
    events: [[sys::CUevent; 2]; SLOTS],
    next: usize,
}

impl Staging {
    fn new() -> Result<Self, DriverError> {
        // SAFETY: plain allocations, kept as long as the process: a device is opened once.
        unsafe {
            let host = result::malloc_host(SLOT * SLOTS, 0)?.cast();
            let device = result::malloc_sync(SLOT * SLOTS)?;
            let mut events = [[std::ptr::null_mut(); 2]; SLOTS];
            for event in events.iter_mut().flatten() {
                *event = result::event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING)?;
            }
            Ok(Self { host, device, events, next: 0 })
        }
    }

    /// Copies bytes to an address, in the order of `stream`.
    ///
    /// # Safety
    /// The address is valid for so many bytes, which fit a slot.
    unsafe fn write(
        &mut self,
        to: u64,
        bytes: &[u8],
        stream: sys::CUstream,
        uploads: sys::CUstream,
    ) -> Result<(), DriverError> {
        let slot = self.next;
        self.next = (slot + 1) % SLOTS;
        let [uploaded, placed] = self.events[slot];
        // SAFETY: the slot's pinned memory is free once its last upload is done, its device memory once it was copied on.
        unsafe {
            result::event::synchronize(uploaded)?;
            let host = std::slice::from_raw_parts_mut(self.host.add(slot * SLOT), bytes.len());
            host.copy_from_slice(bytes);
            let staged = self.device + (slot * SLOT) as u64;
            let flags = sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;
            result::stream::wait_event(uploads, placed, flags)?;
            result::memcpy_htod_async(staged, host, uploads)?;
            result::event::record(uploaded, uploads)?;
            result::stream::wait_event(stream, uploaded, flags)?;
            result::memcpy_dtod_async(to, staged, bytes.len(), stream)?;
            result::event::record(placed, stream)
        }
    }
}

impl Shared {
    /// Makes the context current on this thread.
    pub(super) fn enter(&self) -> Result<(), DeviceError> {
        // SAFETY: the context lives as long as self.
        unsafe { result::ctx::set_current(self.context) }.map_err(failed("cannot use the device"))
    }

    /// Waits for the stream.
    pub(super) fn synchronize(&self) -> Result<(), DeviceError> {
        self.enter()?;
        // SAFETY: the stream lives as long as self.
        unsafe { result::stream::synchronize(self.stream) }.map_err(failed("a kernel failed"))
    }

    /// The failure of an earlier call.
    pub(super) fn take_failure(&self) -> Result<(), DeviceError> {
        self.state.lock().failure.take().map_or(Ok(()), Err)
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        // SAFETY: made by `open`, released once; programs and buffers hold references, so none is left.
        unsafe {
            let _ = result::ctx::set_current(self.context);
            let _ = result::free_sync(self.workspace);
            let _ = result::stream::destroy(self.uploads);
            let _ = result::stream::destroy(self.stream);
            let _ = result::primary_ctx::release(self.device);
        }
    }
}

/// Memory of the device.
pub(super) struct Memory {
    pub(super) address: u64,
    shared: Arc<Shared>,
}

impl Memory {
    /// Zeroed memory.
    pub(super) fn zeroed(shared: &Arc<Shared>, bytes: usize) -> Result<Self, DeviceError> {
        shared.enter()?;
        // SAFETY: a plain allocation, of a size that is not zero.
        let address = unsafe { result::malloc_sync(bytes.max(256)) }.map_err(|e| match e.0 {
            sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY => DeviceError::OutOfMemory(bytes),
            _ => failed("cannot allocate memory")(e),
        })?;
        let memory = Self { address, shared: shared.clone() };
        // SAFETY: the memory was allocated above with so many bytes.
        unsafe { result::memset_d8_async(address, 0, bytes.max(256), shared.stream) }
            .map_err(failed("cannot clear memory"))?;
        Ok(memory)
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        if self.shared.synchronize().is_ok() {
            // SAFETY: allocated by `zeroed`, freed once, and nothing that runs uses it any more.
            let _ = unsafe { result::free_sync(self.address) };
        }
    }
}

pub(super) fn memory(buffer: &Buffer) -> &Memory {
    buffer.memory.downcast_ref().expect("a buffer of another device")
}

/// A GPU of NVIDIA's.
pub struct CudaDevice {
    shared: Arc<Shared>,
}

impl CudaDevice {
    /// Opens a device.
    ///
    /// # Errors
    /// In one line: no driver, no such device, libraries that are missing.
    pub fn open(settings: Settings) -> Result<Self, String> {
        // SAFETY: opens the driver's library, whose initialisation has no requirements.
        if !unsafe { sys::is_culib_present() } {
            return Err("there is no CUDA driver on this machine (libcuda.so is not on the library path): \
                        leave `--device` out to run on the CPU"
                .into());
        }
        let words = |what: &'static str| move |e| failed(what)(e).to_string();
        result::init().map_err(words("the driver does not start"))?;
        let count = result::device::get_count().map_err(words("the driver lists no devices"))?;
        if settings.ordinal >= count.max(0) as usize {
            return Err(format!("there is no device cuda:{}: this machine has {count}", settings.ordinal));
        }
        let device = result::device::get(settings.ordinal as i32).map_err(words("cannot open the device"))?;
        let attribute = |a| {
            // SAFETY: the device exists.
            unsafe { result::device::get_attribute(device, a) }.map_err(words("the device does not answer"))
        };
        use sys::CUdevice_attribute_enum as Attribute;
        let major = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
        let minor = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
        if major < 8 {
            return Err(format!("cuda:{} has compute capability {major}.{minor}; 8.0 is the least", settings.ordinal));
        }
        // instructions of their own architecture, such as wgmma, are in the variant `a` alone
        let arch = format!("sm_{major}{minor}{}", if major >= 9 { "a" } else { "" });
        let name = result::device::get_name(device).map_err(words("the device has no name"))?;
        // SAFETY: the context is retained for the life of `Shared`, which releases it.
        let (context, stream, uploads, workspace) = unsafe {
            let context = result::primary_ctx::retain(device).map_err(words("cannot open the device"))?;
            result::ctx::set_current(context).map_err(words("cannot use the device"))?;
            let stream = || result::stream::create(result::stream::StreamKind::NonBlocking);
            let streams = stream().and_then(|a| Ok((a, stream()?))).map_err(words("cannot make a stream"))?;
            let workspace = result::malloc_sync(WORKSPACE).map_err(words("cannot allocate memory"))?;
            (context, streams.0, streams.1, workspace)
        };
        let blas = Blas::new(settings.tf32)?;
        let state = Mutex::new(State { blas, staging: None, failure: None });
        let cache = Cache::of_user();
        let shared = Shared { device, context, stream, uploads, settings, arch, name, cache, workspace, state };
        Ok(Self { shared: Arc::new(shared) })
    }

    fn try_write(&self, to: &Buffer, offset: usize, bytes: &[u8]) -> Result<(), DeviceError> {
        let shared = &self.shared;
        shared.enter()?;
        let address = memory(to).address + offset as u64;
        let what = failed("cannot copy to the device");
        let mut state = shared.state.lock();
        if bytes.len() > SLOT {
            shared.synchronize()?;
            // SAFETY: in range, and nothing runs that uses the memory.
            return unsafe { result::memcpy_htod_sync(address, bytes) }.map_err(what);
        }
        let staging = match &mut state.staging {
            Some(staging) => staging,
            none => none.insert(Staging::new().map_err(failed("cannot allocate pinned memory"))?),
        };
        // SAFETY: in range.
        unsafe { staging.write(address, bytes, shared.stream, shared.uploads) }.map_err(what)
    }

    fn try_read(&self, from: &Buffer, offset: usize, into: &mut [u8]) -> Result<(), DeviceError> {
        self.shared.enter()?;
        let address = memory(from).address + offset as u64;
        let _state = self.shared.state.lock();
        self.shared.synchronize()?;
        // SAFETY: in range, and nothing runs that writes the memory.
        unsafe { result::memcpy_dtoh_sync(into, address) }.map_err(failed("cannot copy from the device"))
    }

    /// Keeps a failure until somebody asks.
    fn keep(&self, done: Result<(), DeviceError>) -> bool {
        match done {
            Ok(()) => true,
            Err(failure) => {
                self.shared.state.lock().failure.get_or_insert(failure);
                false
            }
        }
    }
}

impl Device for CudaDevice {
    fn describe(&self) -> String {
        format!("cuda:{} ({}, {})", self.shared.settings.ordinal, self.shared.name, self.shared.arch)
    }

    fn target(&self) -> Target {
        Target::Cuda
    }

    fn peak_flops(&self, factors: DType) -> Option<f64> {
        peak::flops(&self.shared.name, factors, self.shared.settings.tf32)
    }

    fn allocate(&self, bytes: usize) -> Result<Buffer, DeviceError> {
        Ok(Buffer { len: bytes, memory: Arc::new(Memory::zeroed(&self.shared, bytes)?) })
    }

    /// A failure is told by the next [`Program::check`] or run.
    fn write(&self, to: &Buffer, offset: usize, bytes: &[u8]) {
        assert!(offset + bytes.len() <= to.len);
        self.keep(self.try_write(to, offset, bytes));
    }

    /// A failure is told by the next [`Program::check`] or run; the bytes are those of NaNs then.
    fn read(&self, from: &Buffer, offset: usize, into: &mut [u8]) {
        assert!(offset + into.len() <= from.len);
        if !self.keep(self.try_read(from, offset, into)) {
            into.fill(0xff);
        }
    }

    fn load(&self, launches: Vec<Launch>, buffers: [Buffer; 4]) -> Result<Box<dyn Program>, DeviceError> {
        Ok(Box::new(CudaProgram::load(&self.shared, launches, buffers)?))
    }
}

/// Pinned memory that kernels write and the host reads.
pub(super) struct Pinned {
    pub(super) host: *mut i32,
    pub(super) len: usize,
    shared: Arc<Shared>,
}

// SAFETY: the memory is read with volatile reads, by the owner.
unsafe impl Send for Pinned {}

impl Pinned {
    /// Zeroed words. Under unified addressing the host's address is the device's too.
    pub(super) fn zeroed(shared: &Arc<Shared>, len: usize) -> Result<Self, DeviceError> {
        shared.enter()?;
        let flags = sys::CU_MEMHOSTALLOC_PORTABLE | sys::CU_MEMHOSTALLOC_DEVICEMAP;
        // SAFETY: a plain allocation; it is cleared before it is used.
        unsafe {
            let host: *mut i32 =
                result::malloc_host(4 * len.max(1), flags).map_err(failed("cannot allocate pinned memory"))?.cast();
            host.write_bytes(0, len.max(1));
            Ok(Self { host, len, shared: shared.clone() })
        }
    }

    /// Word `i` as it is now.
    pub(super) fn get(&self, i: usize) -> i32 {
        assert!(i < self.len);
        // SAFETY: in range; the device may write at any time, hence volatile.
        unsafe { self.host.add(i).read_volatile() }
    }

    /// Sets word `i`.
    pub(super) fn set(&mut self, i: usize, value: i32) {
        assert!(i < self.len);
        // SAFETY: in range; the device may write at any time, hence volatile.
        unsafe { self.host.add(i).write_volatile(value) }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        if self.shared.synchronize().is_ok() {
            // SAFETY: allocated by `zeroed`, freed once, and nothing that runs uses it any more.
            let _ = unsafe { result::free_host(self.host.cast::<c_void>()) };
        }
    }
}
