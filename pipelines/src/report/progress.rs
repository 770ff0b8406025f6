//! What a run shows while it goes: a bar on a terminal, plain lines elsewhere.

use std::fmt::{self, Write as _};
use std::io::{self, IsTerminal, Write};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::metrics::{EvaluationRow, StepRow};

/// How often the bar changes: as fast as one can read.
const REFRESH: Duration = Duration::from_millis(100);

/// Shows how far a run is.
#[derive(Debug)]
pub struct Progress {
    steps: u64,
    every: u64,
    screen: Screen,
    line: String,
    last: Option<Instant>,
}

enum Screen {
    Bar(ProgressBar),
    Plain(Box<dyn Write + Send>),
}

impl fmt::Debug for Screen {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(match self {
            Screen::Bar(_) => "Bar",
            Screen::Plain(_) => "Plain",
        })
    }
}

impl Progress {
    /// Shows the progress on standard output: a bar if that is a terminal, else a line every `every` steps.
    /// The run starts at step `first`, which is not zero when it resumes.
    pub fn new(first: u64, steps: u64, every: u64) -> Progress {
        if !io::stdout().is_terminal() {
            return Progress::plain(steps, every, Box::new(io::stdout()));
        }
        let bar = ProgressBar::with_draw_target(Some(steps), ProgressDrawTarget::stdout());
        // The template is ours, and right; the plain bar is shown if it were not.
        if let Ok(style) = ProgressStyle::with_template("{bar:28} {pos}/{len} {msg} | {eta} left") {
            bar.set_style(style.progress_chars("━━─"));
        }
        // The time left follows from the steps of this run, not of the one it continues.
        bar.set_position(first);
        bar.reset_eta();
        Progress { steps, every, screen: Screen::Bar(bar), line: String::new(), last: None }
    }

    /// Writes lines, one every `every` steps.
    pub fn plain(steps: u64, every: u64, output: Box<dyn Write + Send>) -> Progress {
        Progress { steps, every: every.max(1), screen: Screen::Plain(output), line: String::new(), last: None }
    }

    /// Shows a step, counted from zero, which took so long.
    pub fn step(&mut self, row: &StepRow, took: Duration) {
        let done = row.step + 1;
        self.line.clear();
        match &mut self.screen {
            Screen::Plain(output) => {
                if done.is_multiple_of(self.every) || done == self.steps || row.step == 0 {
                    let _ = writeln!(self.line, "step {done}/{} | {}", self.steps, Numbers { row, took });
                    show(output, &self.line);
                }
            }
            Screen::Bar(bar) => {
                if self.last.is_none_or(|last| last.elapsed() >= REFRESH) || done == self.steps {
                    bar.set_position(done);
                    bar.set_message(format!("| loss {:.4} | {:.0} tok/s", row.loss, row.tokens_per_s));
                    self.last = Some(Instant::now());
                }
            }
        }
    }

    /// Shows an evaluation.
    pub fn evaluation(&mut self, row: &EvaluationRow) {
        let EvaluationRow { step, eval, accuracy } = row;
        let mut line = format!("step {step}/{} | train loss {:.4} | val loss {:.4}", self.steps, eval.train, eval.val);
        if let Some(accuracy) = accuracy {
            let _ = write!(line, " | accuracy {:.2} %", 100.0 * accuracy);
        }
        self.message(&line);
    }

    /// Shows a line, above the bar where there is one.
    pub fn message(&mut self, text: &str) {
        match &mut self.screen {
            Screen::Bar(bar) => bar.println(text),
            Screen::Plain(output) => show(output, &format!("{text}\n")),
        }
    }

    /// Shows a warning: above the bar where there is one, else on standard error.
    pub fn warning(&mut self, text: &str) {
        match &mut self.screen {
            Screen::Bar(bar) => bar.println(format!("warning: {text}")),
            Screen::Plain(_) => eprintln!("warning: {text}"),
        }
    }

    /// Leaves the last state on the screen.
    pub fn finish(&mut self) {
        match &mut self.screen {
            Screen::Bar(bar) => bar.abandon(),
            Screen::Plain(output) => drop(output.flush()),
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.finish();
    }
}

/// Writes in one piece. A reader that has gone (`| head`) must not end the training.
fn show(output: &mut impl Write, text: &str) {
    let _ = output.write_all(text.as_bytes()).and_then(|()| output.flush());
}

/// The numbers of a step, as llm.c prints them.
struct Numbers<'a> {
    row: &'a StepRow,
    took: Duration,
}

impl fmt::Display for Numbers<'_> {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let StepRow { loss, grad_norm, lr, tokens_per_s, mfu, .. } = self.row;
        let milliseconds = 1e3 * self.took.as_secs_f64();
        write!(f, "loss {loss:.4} | grad norm {grad_norm:.3} | lr {lr:.2e} | {milliseconds:.1} ms")?;
        if let Some(mfu) = mfu {
            write!(f, " | {:.1} % mfu", 100.0 * mfu)?;
        }
        write!(f, " | {tokens_per_s:.0} tok/s")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::Losses;
    use std::sync::{Arc, Mutex};

    #[derive(Clone, Default)]
    struct Shared(Arc<Mutex<Vec<u8>>>);

    impl Write for Shared {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn row(step: u64, mfu: Option<f64>) -> StepRow {
        let (loss, grad_norm, lr) = (2.345, 1.234_4, 1e-3);
        StepRow { step, tokens: 768, loss, grad_norm, lr, tokens_per_s: 15012.3, mfu }
    }

    #[test]
    fn plain_lines() {
        let shared = Shared::default();
        let mut progress = Progress::plain(25, 10, Box::new(shared.clone()));
        for step in 0..25 {
            let mfu = (step == 24).then_some(0.125);
            progress.step(&row(step, mfu), Duration::from_micros(51_234));
        }
        let eval = Losses { train: 1.5, val: 1.75 };
        progress.evaluation(&EvaluationRow { step: 25, eval, accuracy: Some(0.991) });
        progress.message("saved");
        progress.finish();
        let text = String::from_utf8(shared.0.lock().unwrap().clone()).unwrap();
        let tail = "loss 2.3450 | grad norm 1.234 | lr 1.00e-3 | 51.2 ms";
        let expected = format!(
            "step 1/25 | {tail} | 15012 tok/s\n\
             step 10/25 | {tail} | 15012 tok/s\n\
             step 20/25 | {tail} | 15012 tok/s\n\
             step 25/25 | {tail} | 12.5 % mfu | 15012 tok/s\n\
             step 25/25 | train loss 1.5000 | val loss 1.7500 | accuracy 99.10 %\n\
             saved\n"
        );
        assert_eq!(text, expected);
    }

    #[test]
    fn a_reader_that_is_gone_is_no_error() {
        struct Gone;
        impl Write for Gone {
            fn write(&mut self, _: &[u8]) -> io::Result<usize> {
                Err(io::ErrorKind::BrokenPipe.into())
            }
            fn flush(&mut self) -> io::Result<()> {
                Err(io::ErrorKind::BrokenPipe.into())
            }
        }
        let mut progress = Progress::plain(1, 1, Box::new(Gone));
        progress.step(&row(0, None), Duration::ZERO);
        progress.message("x");
    }

    #[test]
    fn the_bar_takes_any_numbers() {
        let bar = ProgressBar::hidden();
        let mut progress = Progress { steps: 3, every: 1, screen: Screen::Bar(bar), line: String::new(), last: None };
        (0..5).for_each(|step| progress.step(&row(step, None), Duration::ZERO));
        progress.message("x");
    }
}
