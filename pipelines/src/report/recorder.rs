//! Writes rows in a thread of its own, so that a step never waits for a disk.

use std::thread::{self, JoinHandle};

use crossbeam::channel::{Receiver, Sender, bounded};

use super::{ReportError, Row};
use crate::data::prefetch::message_of;

/// How many rows may wait. If a disk is slower than this many steps, the steps wait.
const WAITING: usize = 1024;

/// A place that rows are written to.
pub trait Sink: Send {
    /// Takes a row.
    fn record(&mut self, row: &Row) -> Result<(), ReportError>;

    /// Called when no row waits: what is buffered should become visible.
    fn flush(&mut self) -> Result<(), ReportError> {
        Ok(())
    }

    /// Called after the last row.
    fn finish(&mut self) -> Result<(), ReportError> {
        self.flush()
    }
}

/// The thread that writes.
#[derive(Debug)]
pub struct Recorder {
    rows: Option<Sender<Row>>,
    thread: Option<JoinHandle<Result<(), ReportError>>>,
}

impl Recorder {
    /// Starts the thread; each row goes to all sinks.
    pub fn start(sinks: Vec<Box<dyn Sink>>) -> Result<Recorder, ReportError> {
        let (rows, receiver) = bounded(WAITING);
        let work = move || write_all(&receiver, sinks);
        let thread = thread::Builder::new().name("metrics".into()).spawn(work).map_err(ReportError::Thread)?;
        Ok(Recorder { rows: Some(rows), thread: Some(thread) })
    }

    /// Hands a row to the thread. An error is that of an earlier row: a full disk, a folder that is gone.
    pub fn record(&mut self, row: Row) -> Result<(), ReportError> {
        match &self.rows {
            Some(rows) if rows.send(row).is_ok() => Ok(()),
            _ => Err(self.end().err().unwrap_or(ReportError::Ended)),
        }
    }

    /// Waits until everything is written.
    pub fn finish(mut self) -> Result<(), ReportError> {
        self.end()
    }

    fn end(&mut self) -> Result<(), ReportError> {
        self.rows = None;
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

fn write_all(rows: &Receiver<Row>, mut sinks: Vec<Box<dyn Sink>>) -> Result<(), ReportError> {
    while let Ok(row) = rows.recv() {
        sinks.iter_mut().try_for_each(|sink| sink.record(&row))?;
        if rows.is_empty() {
            sinks.iter_mut().try_for_each(|sink| sink.flush())?;
        }
    }
    sinks.iter_mut().try_for_each(|sink| sink.finish())
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
        let mut recorder = Recorder::start(vec![Box::new(file)]).unwrap();
        (0..5000).for_each(|n| recorder.record(step(n, 1.0)).unwrap());
        recorder.finish().unwrap();
        assert_eq!(metrics::read(&path).unwrap().len(), 5000);
    }

    #[test]
    fn rows_are_visible_while_the_run_goes_on() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        let mut recorder = Recorder::start(vec![Box::new(MetricsFile::create(&path).unwrap())]).unwrap();
        recorder.record(step(0, 1.0)).unwrap();
        let visible = (0..500).any(|_| {
            thread::sleep(std::time::Duration::from_millis(10));
            metrics::read(&path).unwrap().len() == 1
        });
        assert!(visible);
    }

    struct Broken {
        panics: bool,
    }

    impl Sink for Broken {
        fn record(&mut self, row: &Row) -> Result<(), ReportError> {
            match row.step() {
                2 if self.panics => panic!("at row 2"),
                2 => Err(ReportError::Drawing("no ink".into())),
                _ => Ok(()),
            }
        }
    }

    #[test]
    fn errors_and_panics_arrive() {
        for panics in [false, true] {
            let mut recorder = Recorder::start(vec![Box::new(Broken { panics })]).unwrap();
            let error = (0..).find_map(|n| recorder.record(step(n, 1.0)).err()).unwrap();
            let message = error.to_string();
            assert!(message.contains(if panics { "panicked: at row 2" } else { "no ink" }), "{message}");
            assert!(matches!(recorder.record(step(0, 1.0)), Err(ReportError::Ended)));
            let mut recorder = Recorder::start(vec![Box::new(Broken { panics })]).unwrap();
            let _ = (0..3).try_for_each(|n| recorder.record(step(n, 1.0)));
            assert!(recorder.finish().is_err());
        }
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn a_full_disk_is_an_error() {
        // Linux gives this device to test just that.
        let file = MetricsFile::create(std::path::Path::new("/dev/full")).unwrap();
        let mut recorder = Recorder::start(vec![Box::new(file)]).unwrap();
        let _ = recorder.record(step(0, 1.0));
        let message = recorder.finish().unwrap_err().to_string();
        assert!(message.contains("cannot write /dev/full") && message.contains("free some space"), "{message}");
    }
}
