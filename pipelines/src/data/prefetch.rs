//! Batches made ahead by a thread of their own, so that a step never waits for the data.

use std::any::Any;
use std::mem;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::thread::{self, JoinHandle};

use crossbeam::channel::{Receiver, Sender, bounded};

use super::batch::{Batch, BatchError, BatchSource, Draw};

/// A thread that fills batches ahead. As many buffers go around as there are batches ahead, plus the
/// caller's, so that nothing is allocated once each has been filled.
#[derive(Debug)]
pub struct Prefetcher {
    full: Option<Receiver<Result<Batch, BatchError>>>,
    empty: Option<Sender<Batch>>,
    thread: Option<JoinHandle<()>>,
    ended: bool,
}

impl Prefetcher {
    /// Starts to fill the batches of `draws`, in order and up to `ahead` of them (at least one).
    pub fn start(
        mut source: Box<dyn BatchSource>,
        draws: impl IntoIterator<Item = Draw, IntoIter: Send + 'static>,
        ahead: usize,
    ) -> Result<Prefetcher, BatchError> {
        let ahead = ahead.max(1);
        let draws = draws.into_iter();
        // The caller's buffers join the ring one by one, so it has room for one more.
        let (empty, empty_receiver) = bounded(ahead + 1);
        let (full_sender, full) = bounded(ahead);
        for _ in 0..ahead {
            empty.send(Batch::default()).map_err(|_| BatchError::Ended)?;
        }
        let work = move || {
            for draw in draws {
                // Either channel closes when the consumer is gone.
                let Ok(mut batch) = empty_receiver.recv() else { return };
                let filled = catch_unwind(AssertUnwindSafe(|| source.fill(draw, &mut batch)))
                    .unwrap_or_else(|panic| Err(BatchError::Panicked(message_of(&*panic))));
                let failed = filled.is_err();
                if full_sender.send(filled.map(|()| batch)).is_err() || failed {
                    return;
                }
            }
        };
        let thread = thread::Builder::new().name("batches".into()).spawn(work).map_err(BatchError::Thread)?;
        Ok(Prefetcher { full: Some(full), empty: Some(empty), thread: Some(thread), ended: false })
    }

    /// Makes `batch` the next one and takes its old buffers back; `false` after the last draw. An error or a
    /// panic of the source arrives here, after the batches before it.
    pub fn next_into(&mut self, batch: &mut Batch) -> Result<bool, BatchError> {
        if self.ended {
            return Err(BatchError::Ended);
        }
        let (Some(full), Some(empty)) = (&self.full, &self.empty) else { return Err(BatchError::Ended) };
        match full.recv() {
            Ok(Ok(filled)) => {
                // At the end of the draws nobody takes the buffers any more.
                let _ = empty.send(mem::replace(batch, filled));
                Ok(true)
            }
            Ok(Err(error)) => {
                self.ended = true;
                Err(error)
            }
            Err(_) => Ok(false),
        }
    }
}

impl Drop for Prefetcher {
    fn drop(&mut self) {
        // Closing the channels first lets the thread end, whichever of them it waits for.
        self.full = None;
        self.empty = None;
        if let Some(thread) = self.thread.take() {
            // Its panics were caught and reported.
            let _ = thread.join();
        }
    }
}

/// What a panic said.
pub(crate) fn message_of(panic: &(dyn Any + Send)) -> String {
    if let Some(text) = panic.downcast_ref::<&str>() {
        text.to_string()
    } else if let Some(text) = panic.downcast_ref::<String>() {
        text.clone()
    } else {
        "no message".into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::recall::Recall;

    /// Counts, and fails in the way it is told at step 3.
    #[derive(Clone)]
    struct Failing {
        panics: bool,
    }

    impl BatchSource for Failing {
        fn shape(&self) -> (usize, usize) {
            (1, 1)
        }

        fn vocabulary(&self) -> usize {
            10
        }

        fn fill(&mut self, draw: Draw, batch: &mut Batch) -> Result<(), BatchError> {
            batch.resize(1, 1);
            batch.step = draw.step;
            match draw.step {
                3 if self.panics => panic!("at step {}", draw.step),
                3 => Err(BatchError::Zero { attribute: "batch" }),
                _ => Ok(()),
            }
        }

        fn duplicate(&self) -> Box<dyn BatchSource> {
            Box::new(self.clone())
        }
    }

    #[test]
    fn same_batches_as_without() {
        let mut source = Recall::default().source(1).unwrap();
        let mut prefetcher = Prefetcher::start(source.duplicate(), (5..20).map(Draw::training), 3).unwrap();
        let (mut ahead, mut direct) = (Batch::default(), Batch::default());
        for step in 5..20 {
            assert!(prefetcher.next_into(&mut ahead).unwrap());
            source.fill(Draw::training(step), &mut direct).unwrap();
            assert_eq!(ahead, direct);
        }
        assert!(!prefetcher.next_into(&mut ahead).unwrap());
        assert!(!prefetcher.next_into(&mut ahead).unwrap());
    }

    #[test]
    fn buffers_go_around() {
        let source = Recall::default().source(1).unwrap();
        let mut prefetcher = Prefetcher::start(Box::new(source), (0..100).map(Draw::training), 2).unwrap();
        let mut batch = Batch::default();
        let mut seen = std::collections::HashSet::new();
        while prefetcher.next_into(&mut batch).unwrap() {
            seen.insert(batch.inputs.as_ptr() as usize);
        }
        assert!(seen.len() <= 3, "{} buffers", seen.len());
    }

    #[test]
    fn errors_and_panics_arrive() {
        for panics in [false, true] {
            let source = Box::new(Failing { panics });
            let mut prefetcher = Prefetcher::start(source, (0..10).map(Draw::training), 4).unwrap();
            let mut batch = Batch::default();
            for step in 0..3 {
                assert!(prefetcher.next_into(&mut batch).unwrap());
                assert_eq!(batch.step, step);
            }
            let message = prefetcher.next_into(&mut batch).unwrap_err().to_string();
            assert!(message.contains(if panics { "panicked: at step 3" } else { "batch: 0" }), "{message}");
            assert!(matches!(prefetcher.next_into(&mut batch), Err(BatchError::Ended)));
        }
    }

    #[test]
    fn may_be_dropped_at_any_time() {
        for taken in 0..4 {
            let source = Recall::default().source(1).unwrap();
            let mut prefetcher = Prefetcher::start(Box::new(source), (0..).map(Draw::training), 2).unwrap();
            let mut batch = Batch::default();
            (0..taken).for_each(|_| assert!(prefetcher.next_into(&mut batch).unwrap()));
        }
    }
}
