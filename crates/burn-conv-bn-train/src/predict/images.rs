//! From pictures of digits to digits as MNIST has them.

use std::fs;
use std::ops::RangeInclusive;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use image::imageops;
use image::{DynamicImage, GrayImage, ImageError, ImageFormat, ImageReader, Luma};

use crate::data::{PIXELS, SIDE};

/// Ends of the names of files that are read: PNG, and Netpbm's formats.
const ENDINGS: &str = ".png .pgm .ppm .pbm .pnm";

/// Longer side of MNIST's digits, in pixels.
const BOX: u32 = 20;

/// Longer sides that are left as they are: scaling by a tenth would blur more than it gains.
const UNSCALED: RangeInclusive<u32> = 18..=BOX;

/// Centre of mass of MNIST's digits, in pixels from the upper left corner.
const CENTRE: f64 = 14.5;

/// Least difference between ink and background, of 255: less is taken for an empty page.
const CONTRAST: u8 = 32;

/// Least ink, of 255, that counts anywhere; less is dirt, except at the edge of a stroke.
const STRONG: u8 = 32;

/// Strongest ink of a picture, of 255, that is not stretched.
const FULL: u32 = 240;

/// A file of a folder.
#[derive(Debug)]
pub(super) struct Picture {
    /// Its name in the folder.
    pub(super) name: String,
    /// The digit in it as MNIST has it, white on black, scaled and centred, or why it cannot be read. None
    /// if the file is no picture.
    pub(super) digit: Result<Option<[u8; PIXELS]>>,
}

/// The files of a folder, sorted by name, each with its digit or the reason why there is none.
///
/// A regular file is a picture if its ending or its content names a picture format, also one that is
/// not read here. Subfolders are left out; FIFOs, devices and dangling links are not.
///
/// # Errors
///
/// If the folder cannot be read, or has no pictures.
pub(super) fn read_folder(path: &Path) -> Result<Vec<Picture>> {
    let failed = || format!("cannot read the folder {}", path.display());
    let mut pictures = Vec::new();
    for entry in fs::read_dir(path).with_context(failed)? {
        let file = entry.with_context(failed)?.path();
        if !file.is_dir() {
            pictures.push(Picture {
                name: file
                    .file_name()
                    .unwrap_or_default()
                    .to_string_lossy()
                    .into_owned(),
                digit: read(&file),
            });
        }
    }
    ensure!(
        pictures
            .iter()
            .any(|picture| !matches!(picture.digit, Ok(None))),
        "the folder {} has no pictures: none of its {} files is one of {ENDINGS}",
        path.display(),
        pictures.len()
    );
    pictures.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(pictures)
}

/// The digit in a file; none if it is no picture.
fn read(file: &Path) -> Result<Option<[u8; PIXELS]>> {
    const UNREADABLE: &str = "cannot be read";

    // Opening a FIFO would wait for whoever writes to it.
    let is_file = fs::metadata(file).context(UNREADABLE)?.is_file();
    ensure!(is_file, "is no regular file");
    // By content: the names of Netpbm's files are often wrong about which of the formats it is.
    let reader = ImageReader::open(file).and_then(ImageReader::with_guessed_format);
    let reader = reader.context(UNREADABLE)?;
    if ImageFormat::from_path(file).is_err() && reader.format().is_none() {
        return Ok(None);
    }
    let picture = match reader.decode() {
        Err(ImageError::Unsupported(_)) => {
            bail!("is of a format that is not read here, which are {ENDINGS}")
        }
        Err(ImageError::IoError(error)) => return Err(error).context(UNREADABLE),
        picture => picture.context("cannot be decoded")?,
    };
    normalize(&picture).map(Some)
}

/// Makes of a picture of one digit what MNIST would have made of it.
///
/// - Colours become grey, and transparent parts the opposite of what is drawn on them.
/// - The median of the frame, one pixel wide, is taken for background. Ink is what differs from it
///   towards the side, darker or lighter, on which something differs most. Black on white and white
///   on black give the same digit.
/// - Ink whose strongest pixel is faint is stretched to white on black. Faint ink apart from strong
///   ink, or within the frame's noise, is dirt and goes.
/// - The smallest box around the ink is scaled to 20 pixels in its longer direction, by averages
///   over areas, unless it has 18 to 20; its centre of mass is put where MNIST has it.
///
/// A digit of MNIST stays as it is, byte by byte.
///
/// # Errors
///
/// If nothing stands out from the background.
pub(super) fn normalize(picture: &DynamicImage) -> Result<[u8; PIXELS]> {
    let ink = ink(&grey(picture))?;
    if is_in_place(&ink) {
        return Ok(pixels(&ink));
    }
    let ink = cleaned(&ink);
    let (x, y, width, height) = inked(&ink, 1).expect("strong ink stays");
    let cut = imageops::crop_imm(&ink, x, y, width, height).to_image();
    let longer = width.max(height);
    if UNSCALED.contains(&longer) {
        return Ok(centred(&cut));
    }
    // Averages make thin strokes faint.
    Ok(centred(&stretched(scaled(&cut, longer))))
}

/// Grey, with what is transparent filled in.
fn grey(picture: &DynamicImage) -> GrayImage {
    if !picture.color().has_alpha() {
        return picture.to_luma8();
    }
    let picture = picture.to_luma_alpha8();
    let (mut sum, mut weight) = (0u64, 0u64);
    for pixel in picture.pixels() {
        let [value, alpha] = pixel.0.map(u64::from);
        sum += value * alpha;
        weight += alpha;
    }
    // Behind dark ink there is white paper, behind light ink a black board.
    let paper = if 2 * sum < 255 * weight { 255 } else { 0 };
    GrayImage::from_fn(picture.width(), picture.height(), |x, y| {
        let [value, alpha] = picture.get_pixel(x, y).0.map(u32::from);
        Luma([((value * alpha + paper * (255 - alpha) + 127) / 255) as u8])
    })
}

/// White ink on black, stretched to all of the range where it is faint.
fn ink(grey: &GrayImage) -> Result<GrayImage> {
    let background = background(grey);
    let values = || grey.iter().copied().chain([background]);
    let darker = background - values().min().unwrap_or(background);
    let lighter = values().max().unwrap_or(background) - background;
    let strongest = darker.max(lighter);
    ensure!(
        strongest >= CONTRAST,
        "is empty: nothing in it differs from its background by more than {strongest} of 255"
    );
    let dark =
        darker > lighter || (darker == lighter && sum(grey) < area(grey) * u64::from(background));
    Ok(stretched(mapped(grey.clone(), |value| {
        if dark {
            background.saturating_sub(value)
        } else {
            value.saturating_sub(background)
        }
    })))
}

fn mapped(mut picture: GrayImage, of: impl Fn(u8) -> u8) -> GrayImage {
    picture.iter_mut().for_each(|value| *value = of(*value));
    picture
}

/// Median of the frame. Of an even number's two middle values it is the one nearer to the picture's
/// mean, so that an inverted picture has the inverted background.
fn background(grey: &GrayImage) -> u8 {
    let frame = frame(grey);
    let middle = |at: usize| frame.get(at).copied().unwrap_or(0);
    let (low, high) = (
        middle(frame.len().saturating_sub(1) / 2),
        middle(frame.len() / 2),
    );
    let off = |value: u8| sum(grey).abs_diff(area(grey) * u64::from(value));
    if off(low) <= off(high) { low } else { high }
}

/// The outermost pixels' values, in ascending order.
fn frame(picture: &GrayImage) -> Vec<u8> {
    let (width, height) = picture.dimensions();
    let mut frame: Vec<u8> = picture
        .enumerate_pixels()
        .filter(|(x, y, _)| [0, width - 1].contains(x) || [0, height - 1].contains(y))
        .map(|(_, _, pixel)| pixel.0[0])
        .collect();
    frame.sort_unstable();
    frame
}

fn sum(picture: &GrayImage) -> u64 {
    picture.iter().map(|&value| u64::from(value)).sum()
}

fn area(picture: &GrayImage) -> u64 {
    u64::from(picture.width()) * u64::from(picture.height())
}

/// The ink with its strongest pixel white, unless that is nearly white.
fn stretched(ink: GrayImage) -> GrayImage {
    let strongest = u32::from(ink.iter().copied().max().unwrap_or(0));
    if strongest == 0 || strongest >= FULL {
        return ink;
    }
    mapped(ink, |value| {
        ((255 * u32::from(value) + strongest / 2) / strongest) as u8
    })
}

/// Whether a digit is scaled and placed as MNIST's are.
fn is_in_place(ink: &GrayImage) -> bool {
    // Half a pixel by MNIST's own rounding, and a little for the tools that made it.
    let near = |centre: f64| (centre - CENTRE).abs() <= 0.6;
    let (x, y) = centre_of_mass(ink);
    let is_scaled = inked(ink, 1).is_some_and(|(.., w, h)| UNSCALED.contains(&w.max(h)));
    ink.dimensions() == (SIDE as u32, SIDE as u32) && is_scaled && near(x) && near(y)
}

/// Without dirt: of ink that is not strong, only the edges of strokes stay.
fn cleaned(ink: &GrayImage) -> GrayImage {
    let frame = frame(ink);
    let noise = frame[frame.len() * 9 / 10].saturating_mul(3);
    let (left, top, width, height) = inked(ink, STRONG).expect("there is strong ink");
    // Cells as large as a pixel of the scaled digit, with one more all around the strong ink.
    let cell = width.max(height).div_ceil(BOX);
    let [columns, rows] = [width, height].map(|length| length.div_ceil(cell) + 2);
    let cell_at = |x: u32, y: u32| {
        let column = (x + cell).checked_sub(left)? / cell;
        let row = (y + cell).checked_sub(top)? / cell;
        (column < columns && row < rows).then_some((column, row))
    };
    let mut near = GrayImage::new(columns, rows);
    let strong = ink
        .enumerate_pixels()
        .filter(|(.., pixel)| pixel.0[0] >= STRONG);
    for (column, row) in strong.filter_map(|(x, y, _)| cell_at(x, y)) {
        // Strong ink is within its box, and has a cell on every side.
        for (x, y) in (0..9).map(|at| (column - 1 + at % 3, row - 1 + at / 3)) {
            near.put_pixel(x, y, Luma([1]));
        }
    }
    GrayImage::from_fn(ink.width(), ink.height(), |x, y| {
        let value = ink.get_pixel(x, y).0[0];
        let is_near = || cell_at(x, y).is_some_and(|(x, y)| near.get_pixel(x, y).0[0] == 1);
        let stays = value >= STRONG || value > noise && is_near();
        Luma([if stays { value } else { 0 }])
    })
}

/// Corner, width and height of the smallest box around ink of at least `least`.
fn inked(ink: &GrayImage, least: u8) -> Option<(u32, u32, u32, u32)> {
    let (mut low, mut high) = ([u32::MAX; 2], [0; 2]);
    for (x, y, pixel) in ink.enumerate_pixels() {
        if pixel.0[0] >= least {
            for (axis, at) in [x, y].into_iter().enumerate() {
                low[axis] = low[axis].min(at);
                high[axis] = high[axis].max(at);
            }
        }
    }
    let [x, y] = low;
    let [last_x, last_y] = high;
    (x <= last_x).then(|| (x, y, last_x - x + 1, last_y - y + 1))
}

/// Scales by [`BOX`] / `longer`: each pixel is the mean of the area that it covers.
fn scaled(ink: &GrayImage, longer: u32) -> GrayImage {
    // Lengths in 1/BOX of the picture's pixels.
    let [part, side] = [BOX, longer].map(u64::from);
    let length = |length: u32| (u64::from(length) * part).div_ceil(side) as u32;
    let covered = |at: u32, length: u32| {
        let (start, end) = (u64::from(at) * side, u64::from(at + 1) * side);
        let last = end.div_ceil(part).min(u64::from(length));
        (start / part..last).map(move |i| (i as u32, end.min((i + 1) * part) - start.max(i * part)))
    };
    let area = side * side;
    GrayImage::from_fn(length(ink.width()), length(ink.height()), |x, y| {
        let mut sum = 0;
        for (row, high) in covered(y, ink.height()) {
            for (column, wide) in covered(x, ink.width()) {
                sum += wide * high * u64::from(ink.get_pixel(column, row).0[0]);
            }
        }
        Luma([((sum + area / 2) / area) as u8])
    })
}

/// In pixels from the upper left corner; the middle if there is no ink.
fn centre_of_mass(ink: &GrayImage) -> (f64, f64) {
    let (mut mass, mut moments) = (0.0, [0.0; 2]);
    for (x, y, pixel) in ink.enumerate_pixels() {
        let value = f64::from(pixel.0[0]);
        mass += value;
        moments[0] += value * (f64::from(x) + 0.5);
        moments[1] += value * (f64::from(y) + 0.5);
    }
    if mass > 0.0 {
        (moments[0] / mass, moments[1] / mass)
    } else {
        (f64::from(ink.width()) / 2.0, f64::from(ink.height()) / 2.0)
    }
}

/// Puts a digit of at most [`BOX`] pixels on 28x28 black ones, by its centre of mass.
fn centred(small: &GrayImage) -> [u8; PIXELS] {
    let place = |centre: f64, length: u32| {
        let first = (CENTRE - centre).round().max(0.0) as u32;
        // A digit with all its weight at one end keeps its other end.
        first.min(SIDE as u32 - length)
    };
    let (x, y) = centre_of_mass(small);
    let (x, y) = (place(x, small.width()), place(y, small.height()));
    let mut canvas = GrayImage::new(SIDE as u32, SIDE as u32);
    imageops::replace(&mut canvas, small, i64::from(x), i64::from(y));
    pixels(&canvas)
}

/// Of a picture of 28x28.
fn pixels(picture: &GrayImage) -> [u8; PIXELS] {
    let bytes = picture.as_raw().as_slice();
    bytes.try_into().expect("the picture is of 28x28")
}

#[cfg(test)]
mod tests;
