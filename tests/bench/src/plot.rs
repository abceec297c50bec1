//! A bar chart of the deciding figure as SVG, written by hand: bars, a line from the lowest to the highest round, values.

use std::fmt::Write;

use crate::figures::{Outcome, number};

const WIDTH: f64 = 760.0;
const LABELS: f64 = 210.0;
const BAR: f64 = 22.0;
const STEP: f64 = 32.0;
const TOP: f64 = 48.0;

/// One bar for each contestant that was measured.
pub fn bars(outcome: &Outcome) -> String {
    let measured: Vec<_> = outcome
        .contestants
        .iter()
        .filter_map(|c| {
            Some((
                c.name.as_str(),
                c.sorted(outcome.headline)?,
                c.median(outcome.headline)?,
            ))
        })
        .collect();
    let highest = measured
        .iter()
        .filter_map(|(_, values, _)| values.last().copied())
        .fold(f64::MIN_POSITIVE, f64::max);
    let scale = (WIDTH - LABELS - 110.0) / highest;
    let height = TOP + STEP * measured.len() as f64 + 8.0;
    let mut svg = String::new();
    // Writing to a String cannot fail.
    let _ = writeln!(
        svg,
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{height}\" viewBox=\"0 0 {WIDTH} {height}\" \
         font-family=\"sans-serif\" font-size=\"13\">\n<rect width=\"100%\" height=\"100%\" fill=\"#ffffff\"/>\n\
         <text x=\"12\" y=\"20\" font-weight=\"bold\">{}</text>\n<text x=\"12\" y=\"38\" fill=\"#666666\">{}: median, line from \
         lowest to highest round</text>",
        escape(&outcome.title),
        outcome.headline.name
    );
    for (i, (name, values, median)) in measured.iter().enumerate() {
        let y = TOP + STEP * i as f64;
        let middle = y + BAR / 2.0;
        let colour = if i == 0 { "#c0392b" } else { "#7f8c9b" };
        let end = LABELS + median * scale;
        let (low, high) = (
            values[0] * scale + LABELS,
            values[values.len() - 1] * scale + LABELS,
        );
        let _ = writeln!(
            svg,
            "<text x=\"{}\" y=\"{}\" text-anchor=\"end\">{}</text>\n\
             <rect x=\"{LABELS}\" y=\"{y}\" width=\"{:.1}\" height=\"{BAR}\" fill=\"{colour}\"/>\n\
             <line x1=\"{low:.1}\" y1=\"{middle}\" x2=\"{high:.1}\" y2=\"{middle}\" stroke=\"#000000\"/>\n\
             <text x=\"{:.1}\" y=\"{}\">{}</text>",
            LABELS - 8.0,
            middle + 4.5,
            escape(name),
            end - LABELS,
            high.max(end) + 6.0,
            middle + 4.5,
            number(*median, outcome.headline.digits)
        );
    }
    svg.push_str("</svg>\n");
    svg
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
}
