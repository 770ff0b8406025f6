//! What a download shows while it goes.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// How often there is a line where the output is no terminal.
const LINES: Duration = Duration::from_secs(15);

/// Shows how much of a file has come.
pub(super) struct Meter<'a> {
    url: &'a str,
    bar: Option<ProgressBar>,
    shown: Instant,
}

impl<'a> Meter<'a> {
    /// Shows nothing yet.
    pub(super) fn new(url: &'a str) -> Meter<'a> {
        let bar = std::io::stdout().is_terminal().then(|| {
            let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stdout());
            // The template is ours, and right; the plain bar is shown if it were not.
            if let Ok(style) =
                ProgressStyle::with_template("{bar:28} {bytes} of {total_bytes} | {bytes_per_sec} | {eta}")
            {
                bar.set_style(style.progress_chars("━━─"));
            }
            bar
        });
        Meter { url, bar, shown: Instant::now() }
    }

    /// So many bytes have come, of `total` if the server tells.
    pub(super) fn bytes(&mut self, bytes: u64, total: Option<u64>) {
        if let Some(bar) = &self.bar {
            if let Some(total) = total {
                bar.set_length(total);
            }
            bar.set_position(bytes);
        } else if self.shown.elapsed() >= LINES {
            self.shown = Instant::now();
            let megabytes = |bytes: u64| format!("{:.1} MB", bytes as f64 / 1e6);
            let of = total.map_or_else(String::new, |total| format!(" of {}", megabytes(total)));
            println!("downloading {}: {}{of}", self.url, megabytes(bytes));
        }
    }
}

impl Drop for Meter<'_> {
    fn drop(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
    }
}
