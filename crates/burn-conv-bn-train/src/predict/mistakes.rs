//! The picture of the misclassified digits.

use std::fmt::Write as _;
use std::io::Cursor;

use font8x8::legacy::BASIC_LEGACY;
use image::{GrayImage, ImageFormat, Luma, imageops};

use crate::data::{Digits, PIXELS, SIDE};
use crate::measure::report::MistakeReport;
use crate::persist::output::PictureFormat;
use crate::print::number;

/// Most digits of a picture.
pub(super) const SHOWN: usize = COLUMNS * 5;

/// Digits in a row.
const COLUMNS: usize = 8;

/// Points in the picture for a pixel of a digit.
const ZOOM: u32 = 4;

/// Width and height of a letter: those of the font, whose dots are two points high.
const LETTER: [u32; 2] = [8, 16];

/// In the place of a letter that the font does not have: a block.
const UNKNOWN: [u8; 8] = [0xff; 8];

/// From one line to the next.
const LINE: u32 = 22;

/// Height and width of a digit.
const DIGIT: u32 = SIDE as u32 * ZOOM;

/// From one digit to the next, right and down, with room for its three lines.
const RIGHT: u32 = DIGIT + 20;
const DOWN: u32 = DIGIT + GAP + 3 * LINE + 12;

/// Between a digit and the line below it.
const GAP: u32 = 6;

/// Around everything.
const MARGIN: u32 = 20;

/// Width of a picture.
const WIDTH: u32 = 2 * MARGIN + COLUMNS as u32 * RIGHT;

/// Letters that fit a line across the picture.
pub(super) const LETTERS: usize = ((WIDTH - 2 * MARGIN) / LETTER[0]) as usize;

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
///
/// # Errors
///
/// If the PNG encoder fails.
pub(super) fn draw(
    format: PictureFormat,
    heading: &[String],
    digits: &Digits,
    mistakes: &[MistakeReport],
) -> anyhow::Result<Vec<u8>> {
    let mistakes = &mistakes[..mistakes.len().min(SHOWN)];
    let top = MARGIN + heading.len() as u32 * LINE + 12;
    let rows = mistakes.len().div_ceil(COLUMNS) as u32;
    let height = top + rows * DOWN + MARGIN;

    let mut canvas = Canvas::new(format, height);
    for (line, y) in heading.iter().zip((MARGIN..).step_by(LINE as usize)) {
        let cut: String = line.chars().take(LETTERS).collect();
        canvas.text(MARGIN, y, &cut);
    }
    for (index, mistake) in mistakes.iter().enumerate() {
        let left = MARGIN + (index % COLUMNS) as u32 * RIGHT;
        let y = top + (index / COLUMNS) as u32 * DOWN;
        canvas.digit(left + (RIGHT - DIGIT) / 2, y, digits.image(mistake.index));
        for (line, text) in (0..).zip(lines(mistake)) {
            let x = left + (RIGHT - width(&text)) / 2;
            canvas.text(x, y + DIGIT + GAP + line * LINE, &text);
        }
    }
    canvas.finish()
}

/// Width of a text, in letters that are all of the same width.
fn width(text: &str) -> u32 {
    text.chars().count() as u32 * LETTER[0]
}

/// A white picture. Coordinates are of the upper left corner of what is drawn.
enum Canvas {
    Svg(String),
    Png(GrayImage),
}

impl Canvas {
    fn new(format: PictureFormat, height: u32) -> Self {
        if format == PictureFormat::Png {
            return Self::Png(GrayImage::from_pixel(WIDTH, height, Luma([255])));
        }
        // A letter of such a font is 0.6 of its size wide, a little less than one of the picture's.
        let size = f64::from(LETTER[0]) / 0.63;
        Self::Svg(format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{height}\" \
             viewBox=\"0 0 {WIDTH} {height}\" font-family=\"monospace\" font-size=\"{size:.1}\">\n\
             <rect width=\"{WIDTH}\" height=\"{height}\" fill=\"#fff\"/>\n"
        ))
    }

    fn digit(&mut self, x: u32, y: u32, image: &[u8; PIXELS]) {
        match self {
            Self::Svg(svg) => {
                let _ = writeln!(
                    svg,
                    "<g transform=\"translate({x} {y}) scale({ZOOM})\" \
                     shape-rendering=\"crispEdges\">\
                     <rect width=\"{SIDE}\" height=\"{SIDE}\"/>{}</g>",
                    bars(image)
                );
            }
            Self::Png(picture) => {
                let digit = GrayImage::from_fn(DIGIT, DIGIT, |x, y| {
                    let [column, row] = [x, y].map(|at| (at / ZOOM) as usize);
                    Luma([image[row * SIDE + column]])
                });
                imageops::replace(picture, &digit, x.into(), y.into());
            }
        }
    }

    fn text(&mut self, x: u32, y: u32, text: &str) {
        match self {
            Self::Svg(svg) => {
                let baseline = y + LETTER[1] - 3;
                let text = text.replace('&', "&amp;").replace('<', "&lt;");
                let _ = writeln!(svg, "<text x=\"{x}\" y=\"{baseline}\">{text}</text>");
            }
            Self::Png(picture) => {
                for (letter, left) in text
                    .chars()
                    .zip((i64::from(x)..).step_by(LETTER[0] as usize))
                {
                    let dots = BASIC_LEGACY.get(letter as usize).unwrap_or(&UNKNOWN);
                    let letter = GrayImage::from_fn(LETTER[0], LETTER[1], |x, y| {
                        // The lowest bit is the leftmost dot.
                        let is_ink = (dots[y as usize / 2] >> x) & 1 == 1;
                        Luma([if is_ink { 0 } else { 255 }])
                    });
                    imageops::replace(picture, &letter, left, y.into());
                }
            }
        }
    }

    fn finish(self) -> anyhow::Result<Vec<u8>> {
        match self {
            Self::Svg(svg) => Ok((svg + "</svg>\n").into_bytes()),
            Self::Png(picture) => {
                let mut bytes = Cursor::new(Vec::new());
                picture.write_to(&mut bytes, ImageFormat::Png)?;
                Ok(bytes.into_inner())
            }
        }
    }
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
