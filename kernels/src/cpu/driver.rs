//! The thread that launches: one member of a device's pool, to which work is handed without an allocation.
//!
//! `rayon`'s own way into a pool from outside is a queue that takes a new block of memory every 63 jobs. Here the first
//! thread of the pool waits for work itself, and what it runs is inside of the pool already.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Arc;
use std::thread::JoinHandle;

use parking_lot::{Condvar, Mutex};

use super::threads::{growth, warm};

/// Work of a caller who waits until it is done.
struct Job(*mut (dyn FnMut() + Send));

// SAFETY: what it points to is `Send`, and only the driver touches it before the caller goes on.
unsafe impl Send for Job {}

enum Slot {
    Empty,
    Wanted(Job),
    Done(Option<Box<dyn Any + Send>>),
    Closed,
}

struct Shared {
    slot: Mutex<Slot>,
    changed: Condvar,
}

/// A pool of threads and the one that runs what [`run`](Self::run) is given.
pub(super) struct Driver {
    pool: rayon::ThreadPool,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
    /// One caller at a time. Holds the [`growth`] of scratch memory up to which every thread is warm.
    turn: Mutex<usize>,
}

impl Driver {
    /// A pool of `threads` threads, or of as many as the machine has processors.
    pub(super) fn new(threads: usize) -> Result<Self, String> {
        let shared = Arc::new(Shared { slot: Mutex::new(Slot::Empty), changed: Condvar::new() });
        let (report, started) = std::sync::mpsc::channel();
        let inner = shared.clone();
        let thread = std::thread::Builder::new()
            .name("kernel-0".into())
            .spawn(move || {
                let pool = rayon::ThreadPoolBuilder::new()
                    .num_threads(threads)
                    .thread_name(|i| format!("kernel-{i}"))
                    .use_current_thread()
                    .build();
                let built = pool.is_ok();
                // a caller that is gone needs no answer
                let _ = report.send(pool.map_err(|e| e.to_string()));
                if built {
                    drive(&inner);
                }
            })
            .map_err(|e| e.to_string())?;
        let pool = started.recv().map_err(|e| e.to_string())??;
        Ok(Self { pool, shared, thread: Some(thread), turn: Mutex::new(0) })
    }

    /// Number of threads.
    pub(super) fn threads(&self) -> usize {
        self.pool.current_num_threads()
    }

    /// Runs `body` on the first thread of the pool; returns when it is done. A panic of it goes on here. If it has
    /// needed more scratch memory than any before, all threads get as much.
    pub(super) fn run<R: Send>(&self, body: impl FnOnce() -> R + Send) -> R {
        let mut turn = self.turn.lock();
        let warmed = &mut *turn;
        let (mut body, mut result) = (Some(body), None);
        let pool = &self.pool;
        let mut job = || {
            result = body.take().map(|body| body());
            let grown = growth();
            if *warmed != grown {
                pool.broadcast(|_| warm());
                *warmed = grown;
            }
        };
        let job: *mut (dyn FnMut() + Send + '_) = &mut job;
        // SAFETY: only the lifetime is made longer, and the job is not touched after this call: it waits below until
        // the driver is done with it, and nothing between can panic.
        let job: *mut (dyn FnMut() + Send + 'static) = unsafe { std::mem::transmute(job) };
        let mut slot = self.shared.slot.lock();
        *slot = Slot::Wanted(Job(job));
        self.shared.changed.notify_all();
        let panic = loop {
            match std::mem::replace(&mut *slot, Slot::Empty) {
                Slot::Done(panic) => break panic,
                other => *slot = other,
            }
            self.shared.changed.wait(&mut slot);
        };
        drop(slot);
        if let Some(panic) = panic {
            resume_unwind(panic);
        }
        result.expect("the driver has run the job")
    }
}

/// Takes jobs until the device is dropped.
fn drive(shared: &Shared) {
    let mut slot = shared.slot.lock();
    loop {
        match std::mem::replace(&mut *slot, Slot::Empty) {
            Slot::Wanted(Job(job)) => {
                drop(slot);
                // SAFETY: its caller waits for `Done` and touches nothing of it until then.
                let done = catch_unwind(AssertUnwindSafe(|| unsafe { (*job)() }));
                slot = shared.slot.lock();
                *slot = Slot::Done(done.err());
                shared.changed.notify_all();
            }
            Slot::Closed => return,
            other => *slot = other,
        }
        shared.changed.wait(&mut slot);
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        *self.shared.slot.lock() = Slot::Closed;
        self.shared.changed.notify_all();
        if let Some(thread) = self.thread.take() {
            // it ends by itself, and a job's panic never ends it
            let _ = thread.join();
        }
    }
}
