//! The picture of the misclassified digits, as SVG.

use std::fmt::Write as _;

use crate::data::{Digits, PIXELS, SIDE};
use crate::measure::report::MistakeReport;
use crate::print::number;

/// Most digits of a picture.
pub(super) const SHOWN: usize = COLUMNS * 5;

/// Digits in a row.
const COLUMNS: usize = 8;

/// Points in the picture for a pixel of a digit.
const ZOOM: u32 = 4;

/// Height and width of a digit.
const DIGIT: u32 = SIDE as u32 * ZOOM;

/// Width of a letter, and from one line to the next.
const LETTER: u32 = 8;
const LINE: u32 = 22;

/// From one digit to the next, right and down, with room for its three lines.
const RIGHT: u32 = DIGIT + 20;
const DOWN: u32 = DIGIT + 3 * LINE + 18;

/// Around everything.
const MARGIN: u32 = 20;

/// Width of a picture.
const WIDTH: u32 = 2 * MARGIN + COLUMNS as u32 * RIGHT;

/// Letters that fit a line across the picture.
pub(super) const LETTERS: usize = ((WIDTH - 2 * MARGIN) / LETTER) as usize;

/// What stands below a misclassified digit.
fn lines(mistake: &MistakeReport) -> [String; 3] {
    [
        format!("{} read as {}", mistake.label, mistake.prediction),
        format!("{:.2} %", 100.0 * mistake.probability),
        format!("loss {}", number(mistake.loss, 6, 3).trim_start()),
    ]
}

/// Draws the first [`SHOWN`] of `mistakes` on `digits`, below lines of text that are cut off where the
/// picture ends.
pub(super) fn draw(heading: &[String], digits: &Digits, mistakes: &[MistakeReport]) -> String {
    let mistakes = &mistakes[..mistakes.len().min(SHOWN)];
    let top = MARGIN + heading.len() as u32 * LINE + 12;
    let rows = mistakes.len().div_ceil(COLUMNS) as u32;
    let height = top + rows * DOWN + MARGIN;
    // A letter of such a font is 0.6 of its size wide, a little less than `LETTER`.
    let size = f64::from(LETTER) / 0.63;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{height}\" \
         viewBox=\"0 0 {WIDTH} {height}\" font-family=\"monospace\" font-size=\"{size:.1}\">\n\
         <rect width=\"{WIDTH}\" height=\"{height}\" fill=\"#fff\"/>\n"
    );
    for (line, y) in heading.iter().zip((MARGIN..).step_by(LINE as usize)) {
        let cut: String = line.chars().take(LETTERS).collect();
        add_text(&mut svg, MARGIN, y, &cut);
    }
    for (index, mistake) in mistakes.iter().enumerate() {
        let left = MARGIN + (index % COLUMNS) as u32 * RIGHT;
        let y = top + (index / COLUMNS) as u32 * DOWN;
        let x = left + (RIGHT - DIGIT) / 2;
        let bars = bars(digits.image(mistake.index));
        let _ = writeln!(
            svg,
            "<g transform=\"translate({x} {y}) scale({ZOOM})\" shape-rendering=\"crispEdges\">\
             <rect width=\"{SIDE}\" height=\"{SIDE}\"/>{bars}</g>"
        );
        for (line, text) in (0..).zip(lines(mistake)) {
            let x = left + (RIGHT - width(&text)) / 2;
            add_text(&mut svg, x, y + DIGIT + 6 + line * LINE, &text);
        }
    }
    svg + "</svg>\n"
}

/// Width of a text, in letters that are all of the same width.
fn width(text: &str) -> u32 {
    text.chars().count() as u32 * LETTER
}

/// Adds a text by its upper left corner.
fn add_text(svg: &mut String, x: u32, y: u32, text: &str) {
    let baseline = y + 13;
    let text = text.replace('&', "&amp;").replace('<', "&lt;");
    let _ = writeln!(svg, "<text x=\"{x}\" y=\"{baseline}\">{text}</text>");
}

/// A digit on black, as a bar for each run of pixels of one shade in a row.
fn bars(image: &[u8; PIXELS]) -> String {
    let mut svg = String::new();
    for (y, row) in image.chunks_exact(SIDE).enumerate() {
        let mut x = 0;
        for bar in row.chunk_by(|a, b| a == b) {
            let (grey, length) = (bar[0], bar.len());
            if grey > 0 {
                let _ = write!(
                    svg,
                    "<path fill=\"rgb({grey},{grey},{grey})\" d=\"M{x} {y}h{length}v1h-{length}z\"/>"
                );
            }
            x += length;
        }
    }
    svg
}

#[cfg(test)]
mod tests;
