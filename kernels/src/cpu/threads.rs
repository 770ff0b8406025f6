//! Parallel loops over tasks, and scratch memory that lives from step to step.
//!
//! What a task computes must depend on its index alone, never on the number of threads: that is what makes
//! results the same, bit for bit, on any machine load. So split work by sizes, not by thread count.

use std::cell::RefCell;

use rayon::prelude::*;

/// Runs `task(0) … task(tasks - 1)`, in any order, on the threads of the current pool.
pub fn parallel_for(tasks: usize, task: impl Fn(usize) + Sync + Send) {
    if tasks <= 1 || rayon::current_num_threads() == 1 {
        (0..tasks).for_each(task);
    } else {
        (0..tasks).into_par_iter().with_max_len(1).for_each(task);
    }
}

/// Splits `0..len` into pieces of `grain` (the last one shorter) and runs `task` on each, in parallel.
pub fn parallel_ranges(len: usize, grain: usize, task: impl Fn(std::ops::Range<usize>) + Sync + Send) {
    let grain = grain.max(1);
    parallel_for(len.div_ceil(grain), |i| task(i * grain..((i + 1) * grain).min(len)));
}

thread_local! {
    static SCRATCH: RefCell<Vec<Vec<f32>>> = const { RefCell::new(Vec::new()) };
}

/// Lends `len` elements of this thread's scratch memory, with whatever an earlier use left in them.
///
/// The memory is kept, so that a training step allocates nothing after the first. Calls may nest.
pub fn with_scratch<R>(len: usize, body: impl FnOnce(&mut [f32]) -> R) -> R {
    let mut buffer = SCRATCH.with_borrow_mut(|free| {
        // the smallest that fits, else the largest (which then grows)
        let fits = (0..free.len()).filter(|&i| free[i].len() >= len).min_by_key(|&i| free[i].len());
        match fits.or_else(|| (0..free.len()).max_by_key(|&i| free[i].len())) {
            Some(i) => free.swap_remove(i),
            None => Vec::new(),
        }
    });
    if buffer.len() < len {
        buffer.resize(len, 0.0);
    }
    let result = body(&mut buffer[..len]);
    SCRATCH.with_borrow_mut(|free| free.push(buffer));
    result
}
