//! `loss.svg`: the losses of a run over its steps.

use std::fmt::Display;
use std::io::Write;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use plotters::prelude::*;

use super::{ReportError, Row, Sink};
use crate::files;

/// The size of the picture in pixels.
const SIZE: (u32, u32) = (900, 540);

/// The most points of a line: about what the picture can show.
const MOST_POINTS: usize = 1024;

/// The least time between two pictures of a run that goes on.
const EVERY: Duration = Duration::from_secs(10);

/// Collects losses, and draws them after evaluations and at the end.
#[derive(Debug)]
pub struct Curve {
    path: PathBuf,
    step: Series,
    train: Series,
    validation: Series,
    drawn: Option<Instant>,
    changed: bool,
}

impl Curve {
    /// A picture at `path`.
    pub fn new(path: &Path) -> Curve {
        let (step, train, validation) = Default::default();
        Curve { path: path.into(), step, train, validation, drawn: None, changed: false }
    }

    /// Takes a row without drawing, as those of a run that goes on.
    pub fn add(&mut self, row: &Row) {
        match row {
            Row::Step(row) => self.step.add(row.step, row.loss.into()),
            Row::Evaluation(row) => {
                self.train.add(row.step, row.eval.train);
                self.validation.add(row.step, row.eval.val);
            }
        }
        self.changed = true;
    }

    /// The picture so far.
    pub fn svg(&self) -> Result<String, ReportError> {
        let mut svg = String::new();
        self.draw(&SVGBackend::with_string(&mut svg, SIZE).into_drawing_area())?;
        Ok(svg)
    }

    /// Writes the picture.
    pub fn save(&mut self) -> Result<(), ReportError> {
        // a try that fails counts too: a full disk is not asked at every row
        self.drawn = Some(Instant::now());
        let svg = self.svg()?;
        files::write_atomically(&self.path, |file| file.write_all(svg.as_bytes()))?;
        self.changed = false;
        Ok(())
    }

    fn draw(&self, area: &DrawingArea<SVGBackend, plotters::coord::Shift>) -> Result<(), ReportError> {
        let lines = [
            ("training batches", &self.step, RGBColor(150, 180, 220)),
            ("evaluation, training split", &self.train, RGBColor(31, 90, 180)),
            ("evaluation, validation split", &self.validation, RGBColor(214, 80, 30)),
        ];
        area.fill(&WHITE).map_err(drawing)?;
        let points = || lines.iter().flat_map(|(_, series, _)| series.points());
        let mut chart = ChartBuilder::on(area)
            .margin(16)
            .x_label_area_size(44)
            .y_label_area_size(64)
            .build_cartesian_2d(range(points().map(|point| point.0), 0.0), range(points().map(|point| point.1), 0.04))
            .map_err(drawing)?;
        chart
            .configure_mesh()
            .x_desc("step")
            .y_desc("loss (nats per token)")
            .x_label_formatter(&|x| format!("{x:.0}"))
            .light_line_style(WHITE)
            .bold_line_style(RGBColor(225, 225, 225))
            .axis_desc_style(("sans-serif", 19))
            .label_style(("sans-serif", 17))
            .draw()
            .map_err(drawing)?;
        for (name, series, color) in lines {
            if series.points().next().is_none() {
                continue;
            }
            let line = LineSeries::new(series.points(), color.stroke_width(2));
            let key = move |(x, y)| PathElement::new([(x, y), (x + 20, y)], color.stroke_width(2));
            chart.draw_series(line).map_err(drawing)?.label(name).legend(key);
        }
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::UpperRight)
            .background_style(WHITE)
            .border_style(RGBColor(200, 200, 200))
            .label_font(("sans-serif", 17))
            .draw()
            .map_err(drawing)?;
        area.present().map_err(drawing)
    }
}

impl Sink for Curve {
    fn record(&mut self, row: &Row) -> Result<(), ReportError> {
        self.add(row);
        let due = self.drawn.is_none_or(|drawn| drawn.elapsed() >= EVERY);
        match row {
            Row::Evaluation(_) if due => self.save(),
            _ => Ok(()),
        }
    }

    fn finish(&mut self) -> Result<(), ReportError> {
        if self.changed { self.save() } else { Ok(()) }
    }
}

fn drawing(error: impl Display) -> ReportError {
    ReportError::Drawing(error.to_string())
}

/// From the least to the largest number, widened by a part of the distance, and never empty.
fn range(numbers: impl Iterator<Item = f64>, margin: f64) -> Range<f64> {
    let (low, high) = numbers.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), x| (low.min(x), high.max(x)));
    if low > high {
        return 0.0..1.0;
    }
    let margin = margin * (high - low);
    let (low, high) = (low - margin, high + margin);
    // A range must also be wide enough for tick marks that differ in floating point.
    if high - low > 1e-9 * low.abs().max(high.abs()) { low..high } else { low - 0.5..low + low.abs().max(1.0) }
}

/// A line of a bounded number of points: each is the mean over as many steps as it takes.
#[derive(Debug)]
struct Series {
    points: Vec<(f64, f64)>,
    /// How many steps a point is the mean of.
    stride: usize,
    /// The sums over the steps of the next point, and their number.
    pending: (f64, f64, usize),
}

impl Default for Series {
    fn default() -> Series {
        Series { points: Vec::new(), stride: 1, pending: (0.0, 0.0, 0) }
    }
}

impl Series {
    fn add(&mut self, step: u64, loss: f64) {
        // A loss that is not finite has no place in the picture; the metrics have it. Nor has one so large
        // that a sum of them might not be.
        if loss.abs() > 1e30 || loss.is_nan() {
            return;
        }
        self.pending = (self.pending.0 + step as f64, self.pending.1 + loss, self.pending.2 + 1);
        if self.pending.2 < self.stride {
            return;
        }
        self.points.push(mean(self.pending));
        self.pending = (0.0, 0.0, 0);
        if self.points.len() == MOST_POINTS {
            let halve = |pair: &[(f64, f64)]| mean((pair[0].0 + pair[1].0, pair[0].1 + pair[1].1, 2));
            self.points = self.points.chunks_exact(2).map(halve).collect();
            self.stride *= 2;
        }
    }

    fn points(&self) -> impl Iterator<Item = (f64, f64)> {
        let last = (self.pending.2 > 0).then(|| mean(self.pending));
        self.points.iter().copied().chain(last)
    }
}

fn mean((step, loss, count): (f64, f64, usize)) -> (f64, f64) {
    (step / count as f64, loss / count as f64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::metrics::tests::{evaluation, step};

    #[test]
    fn the_picture_has_lines_labels_and_a_legend() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("loss.svg");
        let mut curve = Curve::new(&path);
        for n in 0..5000 {
            curve.record(&step(n, 4.0 / (1.0 + n as f32 / 500.0))).unwrap();
            if n % 250 == 0 {
                curve.record(&evaluation(n, 3.0, 3.5)).unwrap();
            }
        }
        curve.finish().unwrap();
        let svg = std::fs::read_to_string(&path).unwrap();
        assert!(svg.starts_with("<svg") && svg.trim_end().ends_with("</svg>"));
        assert!(svg.matches("<polyline").count() >= 6, "three lines and three keys");
        for label in ["step", "loss (nats per token)", "training batches", "evaluation, validation split", "4000"] {
            assert!(svg.contains(label), "{label} is not in the picture");
        }
        assert!(svg.len() < 100_000, "{} bytes", svg.len());
    }

    #[test]
    fn any_losses_can_be_drawn() {
        let cases: [&[f32]; 8] = [
            &[],
            &[1.0],
            &[2.0, 2.0],
            &[0.0, 0.0],
            &[f32::NAN, f32::INFINITY],
            &[1.0, f32::NAN, f32::NEG_INFINITY, 0.5],
            &[f32::MAX, f32::MIN, 1e-30],
            &[1e29, 1.0, 1.000_000_1],
        ];
        for losses in cases {
            let mut curve = Curve::new(Path::new("unused.svg"));
            losses.iter().enumerate().for_each(|(n, &loss)| curve.add(&step(n as u64, loss)));
            assert!(curve.svg().unwrap().contains("nats per token"), "{losses:?}");
        }
        let mut curve = Curve::new(Path::new("unused.svg"));
        [u64::MAX - 1, u64::MAX].iter().for_each(|&n| curve.add(&step(n, 1e-40)));
        curve.svg().unwrap();
    }

    #[test]
    fn a_long_line_keeps_its_means() {
        let mut series = Series::default();
        (0..100_000).for_each(|n| series.add(n, n as f64));
        let points: Vec<_> = series.points().collect();
        assert!((MOST_POINTS / 2..=MOST_POINTS).contains(&points.len()), "{}", points.len());
        assert!(points.iter().all(|&(step, loss)| step == loss));
        assert!(points.windows(2).all(|pair| pair[0].0 < pair[1].0));
        assert!(points[points.len() - 1].0 > 99_000.0);
    }
}
