//! The picture of the misclassified digits.

use std::fmt::Write as _;
use std::io::Cursor;

use image::{GrayImage, ImageFormat, Luma};

use super::font;
use crate::data::{PIXELS, SIDE};
use crate::persist::output::PictureFormat;
use crate::print::number;

/// Most digits of a picture.
pub(super) const SHOWN: usize = COLUMNS * 5;

/// Digits in a row.
const COLUMNS: usize = 8;

/// Points in the picture for a pixel of a digit, and for a dot of a letter.
const ZOOM: u32 = 4;
const DOT: u32 = 2;

/// From one letter to the next.
const ADVANCE: u32 = (font::WIDTH + 1) * DOT;

/// From one line to the next.
const LINE: u32 = 22;

/// Height and width of a digit.
const DIGIT: u32 = SIDE as u32 * ZOOM;

/// From one digit to the next, right and down, with room for its three lines.
const RIGHT: u32 = 12 * ADVANCE + 4;
const DOWN: u32 = DIGIT + GAP + 3 * LINE + 12;

/// Between a digit and the line below it.
const GAP: u32 = 6;

/// Around everything.
const MARGIN: u32 = 20;

/// Width of a picture.
const WIDTH: u32 = 2 * MARGIN + COLUMNS as u32 * RIGHT;

/// Letters that fit a line across the picture.
pub(super) const LETTERS: usize = ((WIDTH - 2 * MARGIN) / ADVANCE) as usize;

/// A misclassified digit.
#[derive(Clone, Debug)]
pub(super) struct Tile {
    /// The digit, white on black.
    pub(super) image: [u8; PIXELS],
    /// Its class.
    pub(super) label: u8,
    /// The predicted class.
    pub(super) prediction: u8,
    /// Probability of the prediction, from 0 to 1.
    pub(super) probability: f64,
    /// Loss of the digit, which orders them.
    pub(super) loss: f64,
}

impl Tile {
    /// What stands below the digit.
    fn lines(&self) -> [String; 3] {
        [
            format!("{} read as {}", self.label, self.prediction),
            format!("{:.2} %", 100.0 * self.probability),
            format!("loss {}", number(self.loss, 6, 3).trim_start()),
        ]
    }
}

/// An element of a picture. Coordinates are of the upper left corner.
enum Mark<'a> {
    Digit {
        x: u32,
        y: u32,
        image: &'a [u8; PIXELS],
    },
    Text {
        x: u32,
        y: u32,
        text: String,
    },
}

/// Draws the first [`SHOWN`] of `tiles`, below lines of text that are cut off where the picture
/// ends.
///
/// # Errors
///
/// If the PNG encoder fails.
pub(super) fn draw(
    format: PictureFormat,
    heading: &[String],
    tiles: &[Tile],
) -> anyhow::Result<Vec<u8>> {
    let tiles = &tiles[..tiles.len().min(SHOWN)];
    let top = MARGIN + heading.len() as u32 * LINE + 12;
    let rows = tiles.len().div_ceil(COLUMNS) as u32;
    let height = top + rows * DOWN + MARGIN;

    let mut marks = Vec::new();
    for (line, y) in heading.iter().zip((MARGIN..).step_by(LINE as usize)) {
        marks.push(Mark::Text {
            x: MARGIN,
            y,
            text: line.to_lowercase().chars().take(LETTERS).collect(),
        });
    }
    for (index, tile) in tiles.iter().enumerate() {
        let left = MARGIN + (index % COLUMNS) as u32 * RIGHT;
        let y = top + (index / COLUMNS) as u32 * DOWN;
        marks.push(Mark::Digit {
            x: left + (RIGHT - DIGIT) / 2,
            y,
            image: &tile.image,
        });
        for (line, text) in (0..).zip(tile.lines()) {
            marks.push(Mark::Text {
                x: left + (RIGHT - width(&text)) / 2,
                y: y + DIGIT + GAP + line * LINE,
                text,
            });
        }
    }
    match format {
        PictureFormat::Svg => Ok(svg(height, &marks).into_bytes()),
        PictureFormat::Png => png(height, &marks),
    }
}

/// Width of a text, in letters that are all of the same width.
fn width(text: &str) -> u32 {
    text.chars().count() as u32 * ADVANCE - DOT
}

fn svg(height: u32, marks: &[Mark]) -> String {
    // A letter of such a font is 0.6 of its size wide, a little less than a letter of dots.
    let size = f64::from(ADVANCE) / 0.63;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{height}\" \
         viewBox=\"0 0 {WIDTH} {height}\" font-family=\"monospace\" font-size=\"{size:.1}\">\n\
         <rect width=\"{WIDTH}\" height=\"{height}\" fill=\"#fff\"/>\n"
    );
    for mark in marks {
        match mark {
            Mark::Digit { x, y, image } => {
                let _ = writeln!(
                    svg,
                    "<g transform=\"translate({x} {y}) scale({ZOOM})\" \
                     shape-rendering=\"crispEdges\">\
                     <rect width=\"{SIDE}\" height=\"{SIDE}\"/>{}</g>",
                    paths(image)
                );
            }
            Mark::Text { x, y, text } => {
                let baseline = y + font::HEIGHT * DOT;
                let text = text.replace('&', "&amp;").replace('<', "&lt;");
                let _ = writeln!(svg, "<text x=\"{x}\" y=\"{baseline}\">{text}</text>");
            }
        }
    }
    svg.push_str("</svg>\n");
    svg
}

/// A digit on black as one path for each of 15 shades, of bars as long as a shade goes on.
fn paths(image: &[u8; PIXELS]) -> String {
    const STEP: u8 = 17;

    let shade = |pixel: u8| (u32::from(pixel) + u32::from(STEP) / 2) / u32::from(STEP);
    let mut svg = String::new();
    for wanted in 1..=u32::from(u8::MAX / STEP) {
        let mut path = String::new();
        for (y, row) in image.chunks_exact(SIDE).enumerate() {
            let mut x = 0;
            for bar in row.chunk_by(|a, b| shade(*a) == shade(*b)) {
                let length = bar.len();
                if shade(bar[0]) == wanted {
                    let _ = write!(path, "M{x} {y}h{length}v1h-{length}z");
                }
                x += length;
            }
        }
        if !path.is_empty() {
            let grey = wanted * u32::from(STEP);
            let _ = write!(
                svg,
                "<path fill=\"rgb({grey},{grey},{grey})\" d=\"{path}\"/>"
            );
        }
    }
    svg
}

fn png(height: u32, marks: &[Mark]) -> anyhow::Result<Vec<u8>> {
    let mut picture = GrayImage::from_pixel(WIDTH, height, Luma([255]));
    for mark in marks {
        match mark {
            Mark::Digit { x, y, image } => {
                for (at, &pixel) in image.iter().enumerate() {
                    let (row, column) = ((at / SIDE) as u32, (at % SIDE) as u32);
                    fill(
                        &mut picture,
                        [x + column * ZOOM, y + row * ZOOM],
                        ZOOM,
                        pixel,
                    );
                }
            }
            Mark::Text { x, y, text } => {
                for (letter, left) in text.chars().zip((*x..).step_by(ADVANCE as usize)) {
                    for (column, row) in (0..font::HEIGHT)
                        .flat_map(|row| (0..font::WIDTH).map(move |column| (column, row)))
                        .filter(|&(column, row)| font::has_dot(letter, column, row))
                    {
                        fill(&mut picture, [left + column * DOT, y + row * DOT], DOT, 0);
                    }
                }
            }
        }
    }
    let mut bytes = Cursor::new(Vec::new());
    picture.write_to(&mut bytes, ImageFormat::Png)?;
    Ok(bytes.into_inner())
}

/// Fills a square.
fn fill(picture: &mut GrayImage, [left, top]: [u32; 2], side: u32, shade: u8) {
    for y in top..top + side {
        for x in left..left + side {
            picture.put_pixel(x, y, Luma([shade]));
        }
    }
}

#[cfg(test)]
mod tests;
