//! Perplexity over context length, as papers on length extrapolation show it.

use std::path::Path;

use plotters::prelude::*;

use super::contexts::Row;
use crate::files::{FileError, write_atomically};

const SIZE: (u32, u32) = (900, 560);

/// Why there is no picture.
#[derive(Debug, thiserror::Error)]
pub enum FigureError {
    /// It cannot be written.
    #[error(transparent)]
    File(#[from] FileError),
    /// It cannot be drawn.
    #[error("the figure cannot be drawn: {0}")]
    Drawing(String),
}

/// Writes the picture; `trained` is the context length of training, which is marked.
///
/// # Errors
/// If it cannot be drawn or written.
pub fn save(path: &Path, name: &str, rows: &[Row], trained: Option<usize>) -> Result<(), FigureError> {
    let svg = svg(name, rows, trained).map_err(|e| FigureError::Drawing(e.to_string()))?;
    Ok(write_atomically(path, |file| std::io::Write::write_all(file, svg.as_bytes()))?)
}

fn svg(name: &str, rows: &[Row], trained: Option<usize>) -> Result<String, Box<dyn std::error::Error>> {
    let mut points: Vec<(f64, f64)> =
        rows.iter().filter_map(|row| Some(((row.block as f64).log2(), row.perplexity?))).collect();
    points.retain(|p| p.1.is_finite());
    points.sort_by(|a, b| a.0.total_cmp(&b.0));
    let mut svg = String::new();
    {
        let area = SVGBackend::with_string(&mut svg, SIZE).into_drawing_area();
        area.fill(&WHITE)?;
        let ends = |values: &mut dyn Iterator<Item = f64>, least: f64| {
            let (low, high) = values.fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), x| (l.min(x), h.max(x)));
            if low > high {
                (0.0, 1.0)
            } else {
                (low - least.max(0.05 * (high - low)), high + least.max(0.05 * (high - low)))
            }
        };
        let trained = trained.map(|block| (block as f64).log2());
        let (left, right) = ends(&mut points.iter().map(|p| p.0).chain(trained), 0.25);
        let (low, high) = ends(&mut points.iter().map(|p| p.1), 0.01);
        let mut chart = ChartBuilder::on(&area)
            .margin(16)
            .caption(name, ("sans-serif", 22))
            .x_label_area_size(48)
            .y_label_area_size(72)
            .build_cartesian_2d(left..right, low..high)?;
        chart
            .configure_mesh()
            .x_desc("context length (tokens)")
            .y_desc("perplexity")
            .x_label_formatter(&|x| format!("{:.0}", x.exp2()))
            .light_line_style(WHITE)
            .bold_line_style(RGBColor(225, 225, 225))
            .axis_desc_style(("sans-serif", 19))
            .label_style(("sans-serif", 17))
            .draw()?;
        let blue = RGBColor(31, 90, 180);
        chart
            .draw_series(LineSeries::new(points.iter().copied(), blue.stroke_width(2)))?
            .label("validation")
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 20, y)], blue.stroke_width(2)));
        chart.draw_series(points.iter().map(|p| Circle::new(*p, 4, blue.filled())))?;
        if let Some(x) = trained {
            let gray = RGBColor(120, 120, 120);
            chart
                .draw_series(LineSeries::new([(x, low), (x, high)], gray.stroke_width(1)))?
                .label("trained with")
                .legend(move |(x, y)| PathElement::new([(x, y), (x + 20, y)], gray.stroke_width(1)));
        }
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::UpperRight)
            .background_style(WHITE)
            .border_style(RGBColor(200, 200, 200))
            .label_font(("sans-serif", 17))
            .draw()?;
        area.present()?;
    }
    Ok(svg)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_rows_make_a_picture() {
        let row = |block, perplexity: Option<f64>| Row {
            block,
            loss: perplexity.map(f64::ln),
            perplexity,
            tokens: 1,
            ends: None,
        };
        let rows = [row(256, Some(4.0)), row(512, Some(3.9)), row(1024, Some(f64::INFINITY)), row(2048, None)];
        for rows in [&rows[..], &rows[..1], &rows[2..], &[]] {
            for trained in [None, Some(256)] {
                let svg = svg("longhorn", rows, trained).unwrap();
                assert!(svg.starts_with("<svg") && svg.contains("perplexity") && svg.contains("longhorn"));
            }
        }
    }
}
