//! A team of threads that share the tasks of one parallel loop after the other.
//!
//! A training step has hundreds of loops, many of them shorter than the time in which a system wakes a thread up. So members
//! that wait for the next loop spin for a while before they sleep, and to hand a loop out takes a few stores, no lock and no
//! allocation.

use std::any::Any;
use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::ptr::{from_ref, null, null_mut};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use super::threads::{growth, warm};

/// How long a member looks for work without pause, and how long before it sleeps. In between it lets other threads go first.
const SPIN: Duration = Duration::from_micros(50);
const AWAKE: Duration = Duration::from_millis(2);

/// Bits of a [`Shared::taken`] that count tasks; the others are the number of the loop.
const TASK_BITS: u32 = 24;
/// Most tasks of a loop.
const MOST_TASKS: usize = 1 << TASK_BITS;

/// What has a cache line of its own, and that next to it, which processors fetch along.
#[repr(align(128))]
struct Apart<T>(T);

/// What the members know of the loop that is running.
///
/// A loop's tasks are dealt out in as many runs as there are members. A member takes the tasks of its own run first, and then
/// what is left of the others': so in loop after loop over the same rows each member meets the rows that it has in its caches,
/// as long as all are equally fast.
struct Shared {
    /// The number of the loop: odd while the next one is being written.
    number: Apart<AtomicU64>,
    /// Tasks of the loop, and the function that runs one of them with its closure.
    tasks: AtomicUsize,
    call: AtomicPtr<()>,
    closure: AtomicPtr<()>,
    /// For each run the loop in which a task of it was last taken, and how many were. What was taken in another loop is none.
    taken: Vec<Apart<AtomicU64>>,
    /// Tasks of the loop that are done.
    done: Apart<AtomicUsize>,
    /// The first panic of a task of the loop.
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    /// Members that sleep, and what they wait for.
    sleepers: AtomicUsize,
    sleep: Mutex<()>,
    woken: Condvar,
    ended: AtomicBool,
}

/// A loop, as a member sees it.
#[derive(Clone, Copy)]
struct Loop {
    number: u64,
    tasks: usize,
    call: *mut (),
    closure: *mut (),
}

/// Runs `task` of the closure of type `F` at an address.
///
/// # Safety
/// A closure of that type must be there.
unsafe fn call<F: Fn(usize)>(closure: *const (), task: usize) {
    // SAFETY: the caller's promise.
    unsafe { (*closure.cast::<F>())(task) }
}

impl Shared {
    fn new(threads: usize) -> Self {
        Self {
            number: Apart(AtomicU64::new(0)),
            tasks: AtomicUsize::new(0),
            call: AtomicPtr::new(null_mut()),
            closure: AtomicPtr::new(null_mut()),
            taken: (0..threads).map(|_| Apart(AtomicU64::new(0))).collect(),
            done: Apart(AtomicUsize::new(0)),
            panic: Mutex::new(None),
            sleepers: AtomicUsize::new(0),
            sleep: Mutex::new(()),
            woken: Condvar::new(),
            ended: AtomicBool::new(false),
        }
    }

    fn threads(&self) -> usize {
        self.taken.len()
    }

    /// The loop behind number `last`, if there is one and it is not being written.
    fn newer(&self, last: u64) -> Option<Loop> {
        let number = self.number.0.load(Ordering::Acquire);
        if number == last || number % 2 == 1 {
            return None;
        }
        let tasks = self.tasks.load(Ordering::Acquire);
        let (call, closure) = (self.call.load(Ordering::Acquire), self.closure.load(Ordering::Acquire));
        // if one of these was of the loop after it, the number had changed before it was written
        (self.number.0.load(Ordering::Relaxed) == number).then_some(Loop { number, tasks, call, closure })
    }

    /// The next task of run `i` of a loop, if one is left: the caller must run it.
    fn take(&self, of: &Loop, i: usize) -> Option<usize> {
        let (start, end) = (of.tasks * i / self.threads(), of.tasks * (i + 1) / self.threads());
        let taken = &self.taken[i].0;
        let mut seen = taken.load(Ordering::Acquire);
        loop {
            let count = match (seen >> TASK_BITS).cmp(&of.number) {
                std::cmp::Ordering::Less => 0,
                std::cmp::Ordering::Equal => seen as usize % MOST_TASKS,
                // the loop is over
                std::cmp::Ordering::Greater => return None,
            };
            if count == end - start {
                return None;
            }
            // A loop ends when all tasks of all its runs are taken and done. So where this succeeds it has not ended.
            let next = of.number << TASK_BITS | (count as u64 + 1);
            match taken.compare_exchange_weak(seen, next, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => return Some(start + count),
                Err(now) => seen = now,
            }
        }
    }

    /// Runs tasks until none is left to be taken: of run `member` first.
    fn work(&self, of: &Loop, member: usize) {
        // SAFETY: it was made from such a function.
        let call: unsafe fn(*const (), usize) = unsafe { std::mem::transmute(of.call) };
        let mut done = 0;
        for i in (member..self.threads()).chain(0..member) {
            while let Some(task) = self.take(of, i) {
                // SAFETY: a loop waits for every task that was taken, so that its closure is still there.
                let run = AssertUnwindSafe(|| unsafe { call(of.closure, task) });
                if let Err(panic) = catch_unwind(run) {
                    self.panic.lock().get_or_insert(panic);
                }
                done += 1;
            }
        }
        if done > 0 {
            self.done.0.fetch_add(done, Ordering::Release);
        }
    }

    /// Runs a loop on this thread and on those of the others that come in time. One thread at a time may call this.
    fn share<F: Fn(usize) + Sync>(&self, tasks: usize, closure: &F) {
        let number = self.number.0.load(Ordering::Relaxed) + 2;
        self.number.0.store(number - 1, Ordering::Relaxed);
        let (call, closure) = (call::<F> as *mut (), from_ref(closure).cast_mut().cast());
        self.tasks.store(tasks, Ordering::Release);
        self.call.store(call, Ordering::Release);
        self.closure.store(closure, Ordering::Release);
        self.done.0.store(0, Ordering::Relaxed);
        // against `sleep`: either the number of sleepers is seen here, or that of the loop there
        self.number.0.store(number, Ordering::SeqCst);
        if self.sleepers.load(Ordering::SeqCst) > 0 {
            drop(self.sleep.lock());
            self.woken.notify_all();
        }
        self.work(&Loop { number, tasks, call, closure }, 0);
        let waited = Instant::now();
        while self.done.0.load(Ordering::Acquire) < tasks {
            relax(waited);
        }
        if let Some(panic) = self.panic.lock().take() {
            resume_unwind(panic);
        }
    }

    /// What every member does but the first, until the team is dropped.
    fn serve(&self, member: usize) {
        let (mut last, mut idle) = (0, Instant::now());
        while !self.ended.load(Ordering::Acquire) {
            if let Some(next) = self.newer(last) {
                last = next.number;
                self.work(&next, member);
                idle = Instant::now();
            } else if idle.elapsed() < AWAKE {
                relax(idle);
            } else {
                let mut guard = self.sleep.lock();
                self.sleepers.fetch_add(1, Ordering::SeqCst);
                while self.number.0.load(Ordering::SeqCst) == last && !self.ended.load(Ordering::SeqCst) {
                    self.woken.wait(&mut guard);
                }
                self.sleepers.fetch_sub(1, Ordering::SeqCst);
                drop(guard);
                idle = Instant::now();
            }
        }
    }

    fn end(&self) {
        self.ended.store(true, Ordering::SeqCst);
        drop(self.sleep.lock());
        self.woken.notify_all();
    }
}

/// A moment of waiting that began at `since`.
fn relax(since: Instant) {
    if since.elapsed() < SPIN {
        (0..16).for_each(|_| std::hint::spin_loop());
    } else {
        std::thread::yield_now();
    }
}

thread_local! {
    /// The team whose loops this thread shares out: it is inside of [`Team::run`], and not in a task.
    static LED: Cell<*const Shared> = const { Cell::new(null()) };
}

/// Puts back what [`LED`] was, also when a panic passes.
struct Led(*const Shared);

impl Led {
    fn set(shared: *const Shared) -> Self {
        Self(LED.replace(shared))
    }
}

impl Drop for Led {
    fn drop(&mut self) {
        LED.set(self.0);
    }
}

/// Runs `task(0) … task(tasks - 1)`, in any order, on the threads of the team that this thread [leads](Team::run); in order
/// and on this thread alone outside of a team and within a task.
pub fn parallel_for(tasks: usize, task: impl Fn(usize) + Sync) {
    let led = LED.get();
    if tasks <= 1 || tasks >= MOST_TASKS || led.is_null() {
        return (0..tasks).for_each(task);
    }
    let _within = Led::set(null());
    // SAFETY: set by `Team::run`, which is below this on the stack and keeps the team.
    unsafe { &*led }.share(tasks, &task);
}

/// Threads that compute together: the one that calls [`run`](Self::run), and others that wait for loops of it.
pub struct Team {
    shared: Arc<Shared>,
    members: Vec<JoinHandle<()>>,
    /// One leader at a time. Holds the [`growth`] of scratch memory up to which every thread is warm.
    turn: Mutex<usize>,
}

impl Team {
    /// A team of `threads` threads, the leader included, or of as many as this process may use processors.
    ///
    /// # Errors
    /// If the system refuses to start the threads.
    pub fn new(threads: Option<usize>) -> std::io::Result<Self> {
        let threads = match threads {
            Some(threads) => threads.max(1),
            None => std::thread::available_parallelism().map_or(1, usize::from),
        };
        let shared = Arc::new(Shared::new(threads));
        // those that did start end with the team if one does not
        let mut team = Self { shared, members: Vec::new(), turn: Mutex::new(0) };
        for i in 1..threads {
            let shared = team.shared.clone();
            let thread = std::thread::Builder::new().name(format!("kernel-{i}"));
            team.members.push(thread.spawn(move || shared.serve(i))?);
        }
        Ok(team)
    }

    /// Number of threads.
    pub fn threads(&self) -> usize {
        self.shared.threads()
    }

    /// Runs `body`, whose loops the team shares. If it has needed more scratch memory than any before, all threads get as much.
    pub fn run<R>(&self, body: impl FnOnce() -> R) -> R {
        let mut warmed = self.turn.lock();
        let _led = Led::set(if self.threads() > 1 { &*self.shared } else { null() });
        let result = body();
        let grown = growth();
        if *warmed != grown {
            self.everywhere(warm);
            *warmed = grown;
        }
        result
    }

    /// Runs `body` once on every thread.
    fn everywhere(&self, body: impl Fn() + Sync + Send) {
        let arrived = AtomicUsize::new(0);
        parallel_for(self.threads(), |_| {
            // nobody takes a second task while one waits for the others
            arrived.fetch_add(1, Ordering::AcqRel);
            let waited = Instant::now();
            while arrived.load(Ordering::Acquire) < self.threads() {
                relax(waited);
            }
            body();
        });
    }
}

impl Drop for Team {
    fn drop(&mut self) {
        self.shared.end();
        // a panic of a task never ends a member
        self.members.drain(..).for_each(|member| drop(member.join()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_once() {
        for threads in [1, 2, 5] {
            let team = Team::new(Some(threads)).unwrap();
            team.run(|| {
                for tasks in (0..300).chain([10_000]) {
                    let counts: Vec<AtomicUsize> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
                    parallel_for(tasks, |i| _ = counts[i].fetch_add(1, Ordering::Relaxed));
                    assert!(counts.iter().all(|count| count.load(Ordering::Relaxed) == 1), "{tasks} on {threads}");
                }
            });
        }
    }

    #[test]
    fn members_that_slept_come_back() {
        let team = Team::new(Some(3)).unwrap();
        for pause in [0, 1, 5, 20] {
            std::thread::sleep(Duration::from_millis(pause));
            let seen = Mutex::new(Vec::new());
            team.run(|| team.everywhere(|| seen.lock().push(std::thread::current().id())));
            let mut seen = seen.into_inner();
            seen.sort_by_key(|id| format!("{id:?}"));
            seen.dedup();
            assert_eq!(seen.len(), 3);
        }
    }

    #[test]
    fn a_loop_within_a_task_stays_on_its_thread() {
        let team = Team::new(Some(2)).unwrap();
        team.run(|| {
            parallel_for(8, |_| {
                let thread = std::thread::current().id();
                parallel_for(8, |_| assert_eq!(std::thread::current().id(), thread));
            });
        });
    }

    #[test]
    fn leaders_take_turns() {
        let team = Team::new(Some(2)).unwrap();
        let total = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..100 {
                        team.run(|| parallel_for(7, |i| _ = total.fetch_add(i, Ordering::Relaxed)));
                    }
                });
            }
        });
        assert_eq!(total.into_inner(), 4 * 100 * 21);
    }
}
