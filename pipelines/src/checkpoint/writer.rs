//! The thread that writes checkpoints: a step never waits for the disk.

use std::collections::{BTreeSet, VecDeque};
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use super::store::{Entry, Store};
use super::{CheckpointError, Snapshot};
use crate::data::prefetch::message_of;
use crate::files::FileError;
use crate::report::{Notices, RunFolder};

/// Snapshots that may wait while one is written.
const WAITING: usize = 2;

/// How long to wait before a checkpoint that could not be written is tried again, at first and at most.
const RETRY: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));

/// How long to wait for figures to reach the disk before the checkpoint behind them.
const FIGURES: Duration = Duration::from_secs(10);

/// A snapshot to write.
#[derive(Clone, Debug)]
pub struct Job {
    /// The checkpoint's name.
    pub entry: Entry,
    /// What is in it.
    pub snapshot: Arc<Snapshot>,
}

/// Which checkpoints stay when there are newer ones.
#[derive(Clone, Debug, Default)]
pub struct Policy {
    /// So many of the latest.
    pub last: Option<usize>,
    /// Those of multiples of these steps.
    pub every: Vec<u64>,
}

impl Policy {
    fn keeps(&self, step: u64) -> bool {
        self.every.iter().any(|k| step.is_multiple_of(*k))
    }
}

#[derive(Default)]
struct State {
    queue: VecDeque<Job>,
    policy: Policy,
    /// Checkpoints that are on the disk.
    written: BTreeSet<Entry>,
    /// Why the last try failed.
    failure: Option<String>,
    closing: bool,
}

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A handle on the thread. Clones share it.
#[derive(Clone)]
pub struct Writer {
    shared: Arc<Shared>,
    thread: Arc<Mutex<Option<JoinHandle<()>>>>,
}

impl Writer {
    /// Starts the thread.
    ///
    /// # Errors
    /// If the system has no more threads.
    pub fn start(folder: RunFolder, notices: Notices) -> std::io::Result<Self> {
        let shared = Arc::new(Shared { state: Mutex::default(), changed: Condvar::new() });
        let work = Work { shared: shared.clone(), store: Store::of(folder.path()), folder, notices };
        let thread = thread::Builder::new().name("checkpoints".into()).spawn(move || work.run())?;
        Ok(Self { shared, thread: Arc::new(Mutex::new(Some(thread))) })
    }

    /// Keeps more of the checkpoints.
    pub fn keep(&self, change: impl FnOnce(&mut Policy)) {
        change(&mut self.shared.lock().policy);
    }

    /// Says that a checkpoint is on the disk already.
    pub fn has(&self, entry: Entry) {
        self.shared.lock().written.insert(entry);
    }

    /// Hands a snapshot to the thread, unless it is written already. A snapshot that waits gives way to a newer one of
    /// its kind; one that is to stay is waited for, as long as the disk takes anything at all.
    ///
    /// # Errors
    /// If the thread panicked.
    pub fn submit(&self, job: Job) -> Result<(), CheckpointError> {
        self.check()?;
        let mut state = self.shared.lock();
        if state.written.contains(&job.entry) || state.queue.iter().any(|j| j.entry == job.entry) {
            return Ok(());
        }
        let policy = state.policy.clone();
        state.queue.retain(|j| j.entry.best != job.entry.best || (!j.entry.best && policy.keeps(j.entry.step)));
        while state.queue.len() >= WAITING && state.failure.is_none() && self.is_alive() {
            state = self.shared.changed.wait_timeout(state, RETRY.0).unwrap_or_else(PoisonError::into_inner).0;
        }
        if state.queue.len() >= WAITING {
            state.queue.pop_front();
        }
        state.queue.push_back(job);
        self.shared.changed.notify_all();
        Ok(())
    }

    fn is_alive(&self) -> bool {
        self.thread.lock().unwrap_or_else(PoisonError::into_inner).as_ref().is_some_and(|t| !t.is_finished())
    }

    /// Whether all is well.
    ///
    /// # Errors
    /// What the thread said when it panicked.
    pub fn check(&self) -> Result<(), CheckpointError> {
        let mut thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner);
        match thread.take_if(|t| t.is_finished()).map(JoinHandle::join) {
            Some(Err(panic)) => Err(panicked(&*panic)),
            _ => Ok(()),
        }
    }

    /// Waits until everything is written; what could not be written is tried once more.
    ///
    /// # Errors
    /// If the last checkpoint could not be written, or the thread panicked.
    pub fn finish(&self) -> Result<(), CheckpointError> {
        self.shared.lock().closing = true;
        self.shared.changed.notify_all();
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(Err(panic)) = thread.map(JoinHandle::join) {
            return Err(panicked(&*panic));
        }
        match self.shared.lock().failure.take() {
            Some(failure) => Err(CheckpointError::Misfit(failure)),
            None => Ok(()),
        }
    }
}

fn panicked(panic: &(dyn std::any::Any + Send)) -> CheckpointError {
    let message = message_of(panic);
    let what = format!("the thread that writes checkpoints panicked: {message}; this is a bug, please report it");
    CheckpointError::Misfit(what)
}

struct Work {
    shared: Arc<Shared>,
    store: Store,
    folder: RunFolder,
    notices: Notices,
}

impl Work {
    fn run(self) {
        let mut delay = RETRY.0;
        while let Some(job) = self.next() {
            if let Some(recorded) = &job.snapshot.recorded {
                // it closes when the figures are written, or cannot be
                let _ = recorded.recv_timeout(FIGURES);
            }
            match self.save(job.entry, &job.snapshot) {
                Ok(()) => {
                    delay = RETRY.0;
                    let mut state = self.shared.lock();
                    state.written.insert(job.entry);
                    if state.failure.take().is_some() {
                        self.notices.push(format!("checkpoints are written again: {}", job.entry.name()));
                    }
                }
                Err(error) => {
                    self.failed(job, &error, delay);
                    delay = RETRY.1.min(2 * delay);
                }
            }
            self.shared.changed.notify_all();
        }
    }

    fn next(&self) -> Option<Job> {
        let mut state = self.shared.lock();
        loop {
            if let Some(job) = state.queue.pop_front() {
                return Some(job);
            }
            if state.closing {
                return None;
            }
            state = self.shared.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Warns, and waits before the next try.
    fn failed(&self, job: Job, error: &FileError, delay: Duration) {
        let whole = self.store.latest().ok().and_then(|(latest, _)| latest);
        let before = whole.map_or("there is none before it".into(), |(entry, _)| format!("{} is whole", entry.name()));
        let message = format!("the checkpoint of step {} is not written: {error}; {before}", job.entry.step);
        let mut state = self.shared.lock();
        let new = state.failure.as_ref() != Some(&message);
        state.failure = Some(message.clone());
        if state.closing {
            return;
        }
        if new {
            self.notices.push(format!("{message}; the run goes on and tries again"));
        }
        let superseded = state.queue.iter().any(|j| j.entry.best == job.entry.best);
        if !superseded || state.policy.keeps(job.entry.step) {
            state.queue.push_front(job);
        }
        self.shared.changed.notify_all();
        let waited = self.shared.changed.wait_timeout_while(state, delay, |s| !s.closing);
        drop(waited.unwrap_or_else(PoisonError::into_inner));
    }

    fn save(&self, entry: Entry, snapshot: &Snapshot) -> Result<(), FileError> {
        if self.folder.restore()? {
            let path = self.folder.path().display().to_string();
            self.notices.push(format!("the folder {path} was gone; it is made anew"));
        }
        self.store.save(entry, snapshot)?;
        self.store.publish(entry, &self.published(entry))?;
        let policy = self.shared.lock().policy.clone();
        let list = self.store.list()?;
        let same = |e: &&Entry| e.best == entry.best && e.step != entry.step;
        let others = list.iter().filter(same).filter(|e| e.step < entry.step || e.best);
        let spared = if entry.best { 0 } else { policy.last.unwrap_or(1).saturating_sub(1) };
        for old in others.skip(spared).filter(|e| e.best || !policy.keeps(e.step)) {
            // one too many does no harm
            if let Err(error) = self.store.remove(*old) {
                self.notices.push(error.to_string());
            }
        }
        Ok(())
    }

    fn published(&self, entry: Entry) -> PathBuf {
        self.folder.file(if entry.best { "best.safetensors" } else { "last.safetensors" })
    }
}
