//! What a preparation shows while it goes.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::output::{Counts, State};

/// How often the bar changes, and how often there is a line where the output is no terminal.
const REFRESH: Duration = Duration::from_millis(100);
const LINES: Duration = Duration::from_secs(15);

/// Shows documents, speed, tokens and the time left.
pub(super) struct Meter {
    total: u64,
    bar: Option<ProgressBar>,
    started: Instant,
    shown: Instant,
    /// The text that earlier runs prepared.
    before: Counts,
    /// The bytes of the source files that were read when the first chunk came.
    first_read: Option<u64>,
}

impl Meter {
    /// Shows nothing yet. `total`: the bytes of the source files.
    pub(super) fn start(total: u64, state: &State) -> Meter {
        let bar = std::io::stdout().is_terminal().then(|| {
            let bar = ProgressBar::with_draw_target(Some(total.max(1)), ProgressDrawTarget::stdout());
            // The template is ours, and right; the plain bar is shown if it were not.
            if let Ok(style) = ProgressStyle::with_template("{bar:28} {percent}% {msg}") {
                bar.set_style(style.progress_chars("━━─"));
            }
            bar
        });
        let now = Instant::now();
        if state.counts.text_bytes() > 0 {
            println!("tokens: going on after {}", amounts(&state.counts));
        }
        Meter { total, bar, started: now, shown: now, before: state.counts, first_read: None }
    }

    /// A chunk was written; `read` bytes of the source files have been read.
    pub(super) fn chunk(&mut self, read: u64, counts: &Counts) {
        let first_read = *self.first_read.get_or_insert(read);
        let every = if self.bar.is_some() { REFRESH } else { LINES };
        if self.shown.elapsed() < every {
            return;
        }
        self.shown = Instant::now();
        let seconds = self.started.elapsed().as_secs_f64();
        let left = seconds * self.total.saturating_sub(read) as f64 / read.saturating_sub(first_read).max(1) as f64;
        let speed = (counts.text_bytes() - self.before.text_bytes()) as f64 / seconds / 1e6;
        let line = format!("{} | {speed:.1} MB/s | {} left", amounts(counts), duration(left));
        match &self.bar {
            Some(bar) => {
                bar.set_position(read.min(self.total));
                bar.set_message(line);
            }
            None => println!("tokens: {:.0}% | {line}", 100.0 * read as f64 / self.total.max(1) as f64),
        }
    }

    /// Takes the bar away.
    pub(super) fn clear(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
    }

    /// Shows the end.
    pub(super) fn finish(&mut self, state: &State, done: bool) {
        self.clear();
        if done {
            let seconds = self.started.elapsed().as_secs_f64();
            let speed = (state.counts.text_bytes() - self.before.text_bytes()) as f64 / seconds.max(1e-9) / 1e6;
            println!("tokens: {} in {seconds:.1} s ({speed:.1} MB/s)", amounts(&state.counts));
        }
    }
}

fn amounts(counts: &Counts) -> String {
    let (documents, tokens) =
        (counts.train.documents + counts.validation.documents, (counts.train.tokens + counts.validation.tokens) as f64);
    let tokens = match tokens {
        few if few < 1e4 => format!("{few} tokens"),
        some if some < 1e6 => format!("{:.1} k tokens", some / 1e3),
        many => format!("{:.1} M tokens", many / 1e6),
    };
    format!("{documents} documents | {tokens}")
}

fn duration(seconds: f64) -> String {
    match seconds as u64 {
        seconds if seconds < 60 => format!("{seconds} s"),
        seconds if seconds < 3600 => format!("{}:{:02} min", seconds / 60, seconds % 60),
        seconds if seconds < 360_000 => format!("{}:{:02} h", seconds / 3600, seconds / 60 % 60),
        _ => "days".into(),
    }
}
