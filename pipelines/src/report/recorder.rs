//! Writes rows in a thread of its own, so that a step never waits for a disk.

use std::thread::{self, JoinHandle};

use crossbeam::channel::{Receiver, Sender, bounded};

use super::{Notices, ReportError, Row};
use crate::data::prefetch::message_of;

/// How many rows may wait. If a disk is slower than this many steps, the steps wait.
const WAITING: usize = 1024;

/// A place that rows are written to. What it cannot write now it keeps, and tries again at the next `flush`.
pub trait Sink: Send {
    /// Takes a row.
    fn record(&mut self, row: &Row) -> Result<(), ReportError>;

    /// Called when no row waits: what is buffered should become visible.
    fn flush(&mut self) -> Result<(), ReportError> {
        Ok(())
    }

    /// Makes what was recorded durable.
    fn sync(&mut self) -> Result<(), ReportError> {
        self.flush()
    }

    /// Called after the last row.
    fn finish(&mut self) -> Result<(), ReportError> {
        self.sync()
    }
}

enum Message {
    Row(Row),
    /// Closed once all rows before are on the disk, as far as it takes them.
    Mark(Sender<()>),
}

/// The thread that writes.
#[derive(Debug)]
pub struct Recorder {
    messages: Option<Sender<Message>>,
    thread: Option<JoinHandle<Result<(), ReportError>>>,
}

impl Recorder {
    /// Starts the thread; each row goes to all sinks. What a sink cannot write is a notice, and an error only if it
    /// still cannot at the end.
    pub fn start(sinks: Vec<Box<dyn Sink>>, notices: Notices) -> Result<Recorder, ReportError> {
        let (messages, receiver) = bounded(WAITING);
        let sinks = sinks.into_iter().map(|sink| Watched { sink, failing: None, notices: notices.clone() }).collect();
        let work = move || write_all(&receiver, sinks);
        let thread = thread::Builder::new().name("metrics".into()).spawn(work).map_err(ReportError::Thread)?;
        Ok(Recorder { messages: Some(messages), thread: Some(thread) })
    }

    /// Hands a row to the thread.
    ///
    /// # Errors
    /// If the thread panicked.
    pub fn record(&mut self, row: Row) -> Result<(), ReportError> {
        self.send(Message::Row(row))
    }

    /// What closes once all rows so far are on the disk.
    ///
    /// # Errors
    /// If the thread panicked.
    pub fn mark(&mut self) -> Result<Receiver<()>, ReportError> {
        let (sender, receiver) = bounded(0);
        self.send(Message::Mark(sender))?;
        Ok(receiver)
    }

    fn send(&mut self, message: Message) -> Result<(), ReportError> {
        match &self.messages {
            Some(messages) if messages.send(message).is_ok() => Ok(()),
            _ => Err(self.end().err().unwrap_or(ReportError::Ended)),
        }
    }

    /// Waits until everything is written.
    pub fn finish(mut self) -> Result<(), ReportError> {
        self.end()
    }

    fn end(&mut self) -> Result<(), ReportError> {
        self.messages = None;
        match self.thread.take().map(JoinHandle::join) {
            None => Ok(()),
            Some(Ok(result)) => result,
            Some(Err(panic)) => Err(ReportError::Panicked(message_of(&*panic))),
        }
    }
}

impl Drop for Recorder {
    fn drop(&mut self) {
        // Reached without `finish` only on the way out from another error, which matters more.
        let _ = self.end();
    }
}

/// A sink whose troubles are told once.
struct Watched {
    sink: Box<dyn Sink>,
    failing: Option<String>,
    notices: Notices,
}

impl Watched {
    fn watch(&mut self, result: Result<(), ReportError>) {
        let message = result.err().map(|e| e.to_string());
        if let Some(message) = message.as_ref().filter(|m| self.failing.as_ref() != Some(m)) {
            self.notices.push(format!("{message}; the run goes on and tries again"));
        }
        self.failing = message.or(self.failing.take());
    }
}

fn write_all(messages: &Receiver<Message>, mut sinks: Vec<Watched>) -> Result<(), ReportError> {
    while let Ok(message) = messages.recv() {
        match message {
            Message::Row(row) => {
                for watched in &mut sinks {
                    if let Err(error) = watched.sink.record(&row) {
                        watched.watch(Err(error));
                    }
                }
            }
            Message::Mark(done) => {
                for watched in &mut sinks {
                    let result = watched.sink.sync();
                    watched.watch(result);
                }
                drop(done);
            }
        }
        if messages.is_empty() {
            for watched in &mut sinks {
                let result = watched.sink.flush();
                watched.watch(result);
            }
        }
    }
    let results: Vec<_> = sinks.iter_mut().map(|watched| watched.sink.finish()).collect();
    results.into_iter().collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::metrics::{self, MetricsFile, tests::step};

    #[test]
    fn everything_is_written() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("run/metrics.jsonl");
        let file = MetricsFile::create(&path).unwrap();
        let mut recorder = Recorder::start(vec![Box::new(file)], Notices::default()).unwrap();
        (0..5000).for_each(|n| recorder.record(step(n, 1.0)).unwrap());
        recorder.finish().unwrap();
        assert_eq!(metrics::read(&path).unwrap().len(), 5000);
    }

    #[test]
    fn rows_are_visible_while_the_run_goes_on() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        let mut recorder =
            Recorder::start(vec![Box::new(MetricsFile::create(&path).unwrap())], Notices::default()).unwrap();
        recorder.record(step(0, 1.0)).unwrap();
        let visible = (0..500).any(|_| {
            thread::sleep(std::time::Duration::from_millis(10));
            metrics::read(&path).unwrap().len() == 1
        });
        assert!(visible);
    }

    struct Broken {
        panics: bool,
        rows: usize,
    }

    impl Sink for Broken {
        fn record(&mut self, row: &Row) -> Result<(), ReportError> {
            assert!(!self.panics || row.step() != 2, "at row 2");
            self.rows += 1;
            Ok(())
        }
        fn flush(&mut self) -> Result<(), ReportError> {
            // the disk has room again after the fourth row
            if (2..4).contains(&self.rows) { Err(ReportError::Drawing("no ink".into())) } else { Ok(()) }
        }
    }

    #[test]
    fn panics_arrive() {
        let notices = Notices::default();
        let mut recorder = Recorder::start(vec![Box::new(Broken { panics: true, rows: 0 })], notices.clone()).unwrap();
        let error = (0..).find_map(|n| recorder.record(step(n, 1.0)).err()).unwrap();
        assert!(error.to_string().contains("panicked: at row 2"), "{error}");
        assert!(matches!(recorder.record(step(0, 1.0)), Err(ReportError::Ended)));
        let mut recorder = Recorder::start(vec![Box::new(Broken { panics: true, rows: 0 })], notices).unwrap();
        let _ = (0..3).try_for_each(|n| recorder.record(step(n, 1.0)));
        assert!(recorder.finish().is_err());
    }

    #[test]
    fn errors_are_told_once_and_matter_only_at_the_end() {
        for (rows, fine) in [(3, false), (5, true)] {
            let notices = Notices::default();
            let sink = Broken { panics: false, rows: 0 };
            let mut recorder = Recorder::start(vec![Box::new(sink)], notices.clone()).unwrap();
            for n in 0..rows {
                recorder.record(step(n, 1.0)).unwrap();
                // each mark is a try
                let _ = recorder.mark().unwrap().recv();
            }
            assert_eq!(recorder.finish().is_ok(), fine);
            let told = notices.take();
            assert_eq!(told.len(), 1, "{told:?}");
            assert!(told[0].ends_with("no ink; the run goes on and tries again"), "{told:?}");
        }
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn a_full_disk_is_an_error() {
        // Linux gives this device to test just that.
        let file = MetricsFile::create(std::path::Path::new("/dev/full")).unwrap();
        let mut recorder = Recorder::start(vec![Box::new(file)], Notices::default()).unwrap();
        let _ = recorder.record(step(0, 1.0));
        let message = recorder.finish().unwrap_err().to_string();
        assert!(message.contains("cannot write /dev/full") && message.contains("free some space"), "{message}");
    }
}
