//! Parallel loops over tasks, and scratch memory that lives from step to step.
//!
//! What a task computes must depend on its index alone, never on the number of threads: that is what makes
//! results the same, bit for bit, on any machine load. So split work by sizes, not by thread count.

use std::cell::RefCell;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::pages::Pages;
pub use super::team::parallel_for;

/// Splits `0..len` into pieces of `grain` (the last one shorter) and runs `task` on each, in parallel.
pub fn parallel_ranges(len: usize, grain: usize, task: impl Fn(std::ops::Range<usize>) + Sync + Send) {
    let grain = grain.max(1);
    parallel_for(len.div_ceil(grain), |i| task(i * grain..((i + 1) * grain).min(len)));
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = const { RefCell::new(Scratch { free: Vec::new(), lent: 0 }) };
}

/// A thread's scratch memory.
struct Scratch {
    free: Vec<Buffer>,
    /// How many calls of [`with_scratch`] this thread is inside of.
    lent: usize,
}

/// Elements that start as 0.
struct Buffer {
    pages: Pages,
    /// Elements before the first: buffers on big pages would all start at the same lines of the first cache, and kernels use
    /// several at once.
    skip: usize,
}

impl Buffer {
    /// # Panics
    /// If the memory is all used up, as any other allocation.
    fn new(len: usize) -> Self {
        static MADE: AtomicUsize = AtomicUsize::new(0);
        let skip = MADE.fetch_add(1, Ordering::Relaxed) % 12 * 80;
        let pages = Pages::zeroed((len + skip) * size_of::<f32>()).expect("memory for the scratch of a kernel");
        Self { pages, skip }
    }

    fn len(&self) -> usize {
        self.pages.len() / size_of::<f32>() - self.skip
    }

    fn slice(&mut self, len: usize) -> &mut [f32] {
        assert!(len <= self.len());
        // SAFETY: in range, aligned, initialised as 0, and borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.pages.as_ptr().cast::<f32>().add(self.skip), len) }
    }
}

/// The most elements that any call wanted, the most calls inside of each other, and how often either grew.
static LONGEST: AtomicUsize = AtomicUsize::new(0);
static DEEPEST: AtomicUsize = AtomicUsize::new(0);
static GROWTH: AtomicUsize = AtomicUsize::new(0);

/// Counts how often the scratch memory of a thread had to grow beyond all before: when it changes, [`warm`] should
/// run on every thread.
pub(super) fn growth() -> usize {
    GROWTH.load(Ordering::Acquire)
}

/// Gives this thread as much scratch memory as any thread has needed so far. Which thread takes which task is a matter of
/// luck: without this one might meet its first long task after a thousand steps. Memory that no task touches costs
/// address space only.
pub(super) fn warm() {
    let (longest, deepest) = (LONGEST.load(Ordering::Acquire), DEEPEST.load(Ordering::Acquire));
    SCRATCH.with_borrow_mut(|scratch| {
        scratch.free.retain(|buffer| buffer.len() >= longest);
        let missing = deepest.saturating_sub(scratch.lent + scratch.free.len());
        scratch.free.extend((0..missing).map(|_| Buffer::new(longest)));
    });
}

/// Lends `len` elements of this thread's scratch memory, with whatever an earlier use left in them.
///
/// The memory is kept, so that a training step allocates nothing after the first. Calls may nest.
pub fn with_scratch<R>(len: usize, body: impl FnOnce(&mut [f32]) -> R) -> R {
    let (mut buffer, depth) = SCRATCH.with_borrow_mut(|scratch| {
        scratch.lent += 1;
        let free = &mut scratch.free;
        // the smallest that fits, of several the one used last, which is in the cache; else the largest (which is then replaced)
        let fits = (0..free.len()).rev().filter(|&i| free[i].len() >= len).min_by_key(|&i| free[i].len());
        let buffer = match fits.or_else(|| (0..free.len()).max_by_key(|&i| free[i].len())) {
            Some(i) => free.remove(i),
            None => Buffer::new(len),
        };
        (buffer, scratch.lent)
    });
    // a buffer that is given up by a panic must not count as lent for ever
    let returned = Returned;
    if LONGEST.load(Ordering::Relaxed) < len || DEEPEST.load(Ordering::Relaxed) < depth {
        let longer = LONGEST.fetch_max(len, Ordering::AcqRel) < len;
        let deeper = DEEPEST.fetch_max(depth, Ordering::AcqRel) < depth;
        GROWTH.fetch_add(usize::from(longer || deeper), Ordering::AcqRel);
    }
    if buffer.len() < len {
        drop(buffer);
        buffer = Buffer::new(len);
    }
    let result = body(buffer.slice(len));
    SCRATCH.with_borrow_mut(|scratch| scratch.free.push(buffer));
    drop(returned);
    result
}

struct Returned;

impl Drop for Returned {
    fn drop(&mut self) {
        SCRATCH.with_borrow_mut(|scratch| scratch.lent -= 1);
    }
}
