//! From pictures of digits to digits as MNIST has them.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use image::imageops::{self, FilterType};
use image::{DynamicImage, GrayImage, ImageError, ImageFormat, ImageReader, Luma};

use crate::data::{PIXELS, SIDE};

/// Ends of the names of files that are read: PNG, and Netpbm's formats.
///
/// ```
/// use burn_conv_bn_train::predict::images::EXTENSIONS;
///
/// assert!(EXTENSIONS.contains(&"png"));
/// ```
pub const EXTENSIONS: [&str; 5] = ["png", "pgm", "ppm", "pbm", "pnm"];

/// Height and width of the box that MNIST scales a digit to.
const BOX: u32 = 20;

/// Least height or width of a digit that was scaled like that already.
const SCALED: u32 = 16;

/// Least difference between ink and background, of 255: less is taken for an empty page.
const CONTRAST: u8 = 32;

/// Ink, of 255, that is taken for dirt on the background.
const DIRT: u8 = 32;

/// A digit from a file.
///
/// [`read_folder`] has an example.
#[derive(Debug)]
pub struct Picture {
    /// Name of the file in its folder.
    pub name: String,
    /// As MNIST has it: white on black, scaled and centred.
    pub digit: Result<[u8; PIXELS], PictureError>,
}

/// Why a picture is left out.
///
/// [`read_folder`] has an example.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PictureError {
    /// The file cannot be opened or read.
    #[error("cannot be read: {0}")]
    Io(#[from] io::Error),
    /// A FIFO, a socket or a device.
    #[error("is no regular file")]
    NotAFile,
    /// A picture of another format.
    #[error("is of a format that is not read here, which are {}", endings())]
    Format,
    /// A damaged picture.
    #[error("cannot be decoded: {0}")]
    Decode(ImageError),
    /// Nothing stands out from the background.
    #[error("is empty: nothing in it differs from its background by more than {found} of 255")]
    Empty {
        /// The largest difference.
        found: u8,
    },
}

/// Why a folder cannot be classified.
///
/// [`read_folder`] has an example.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FolderError {
    /// The folder cannot be read.
    #[error("cannot read the folder {}: {source}", .path.display())]
    Io {
        /// The folder.
        path: PathBuf,
        /// What the system reported.
        source: io::Error,
    },
    /// The folder has no pictures.
    #[error(
        "the folder {} has no pictures: none of its {files} files is one of {}", .path.display(),
        endings()
    )]
    NoPictures {
        /// The folder.
        path: PathBuf,
        /// Number of files in it.
        files: usize,
    },
}

fn endings() -> String {
    EXTENSIONS
        .map(|extension| format!(".{extension}"))
        .join(" ")
}

/// The pictures of a folder, sorted by name, each with its digit or the reason why there is none.
///
/// A regular file is a picture if its ending or its content is that of a picture format, also of one
/// that is not read here. Subfolders are left out; FIFOs, devices and dangling links are not.
///
/// # Errors
///
/// [`FolderError`].
///
/// # Examples
///
/// ```
/// use burn_conv_bn_train::predict::images::{FolderError, PictureError, read_folder};
/// use image::{GrayImage, Luma};
///
/// let folder = tempfile::tempdir()?;
/// assert!(matches!(
///     read_folder(folder.path()),
///     Err(FolderError::NoPictures { files: 0, .. })
/// ));
///
/// let stroke = |x: u32| Luma([if (40..60).contains(&x) { 0 } else { 255 }]);
/// let one = GrayImage::from_fn(100, 100, |x, y| match (20..80).contains(&y) {
///     true => stroke(x),
///     false => Luma([255]),
/// });
/// one.save(folder.path().join("one.png"))?;
/// GrayImage::new(100, 100).save(folder.path().join("nothing.png"))?;
///
/// let pictures = read_folder(folder.path())?;
/// assert_eq!(pictures[0].name, "nothing.png");
/// assert!(matches!(pictures[0].digit, Err(PictureError::Empty { found: 0 })));
/// assert_eq!(pictures[1].name, "one.png");
/// assert!(pictures[1].digit.is_ok());
/// # Ok::<(), anyhow::Error>(())
/// ```
pub fn read_folder(path: &Path) -> Result<Vec<Picture>, FolderError> {
    let failed = |source| FolderError::Io {
        path: path.to_path_buf(),
        source,
    };
    let mut files = 0;
    let mut pictures = Vec::new();
    for entry in fs::read_dir(path).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let file = entry.path();
        if file.is_dir() {
            continue;
        }
        files += 1;
        if let Some(digit) = read(&file).transpose() {
            pictures.push((entry.file_name(), digit));
        }
    }
    if pictures.is_empty() {
        return Err(FolderError::NoPictures {
            path: path.to_path_buf(),
            files,
        });
    }
    pictures.sort_by(|(a, _), (b, _)| a.cmp(b));
    let pictures = pictures.into_iter().map(|(name, digit)| Picture {
        name: name.to_string_lossy().into_owned(),
        digit,
    });
    Ok(pictures.collect())
}

/// The digit in a file; none if it is no picture.
fn read(file: &Path) -> Result<Option<[u8; PIXELS]>, PictureError> {
    // Opening a FIFO would wait for whoever writes to it.
    if !fs::metadata(file)?.is_file() {
        return Err(PictureError::NotAFile);
    }
    // By content: the names of Netpbm's files are often wrong about which of the formats it is.
    let reader = ImageReader::open(file)?.with_guessed_format()?;
    let named = ImageFormat::from_path(file).is_ok();
    if !named && reader.format().is_none() {
        return Ok(None);
    }
    let picture = reader.decode().map_err(|error| match error {
        ImageError::Unsupported(_) => PictureError::Format,
        ImageError::IoError(error) => PictureError::Io(error),
        error => PictureError::Decode(error),
    })?;
    normalize(&picture).map(Some)
}

/// Makes of a picture of one digit what MNIST would have made of it.
///
/// - Colours become grey, and transparent parts the opposite of what is drawn on them.
/// - The frame, one pixel wide, is taken for background. Ink is what differs from it towards the
///   side, darker or lighter, on which something differs most: black on white and white on black
///   come out the same.
/// - The ink is stretched to white on black, the smallest box around it scaled to 20 pixels in its
///   longer direction, and its centre of mass put in the middle of 28x28.
///
/// A picture that is like that already stays as it is.
///
/// ```
/// use burn_conv_bn_train::predict::images::{PictureError, normalize};
/// use image::{DynamicImage, GrayImage, Luma};
///
/// // A black stroke on white paper.
/// let stroke = GrayImage::from_fn(200, 300, |x, y| {
///     let ink = (90..110).contains(&x) && (50..250).contains(&y);
///     Luma([if ink { 0 } else { 255 }])
/// });
/// let digit = normalize(&DynamicImage::ImageLuma8(stroke))?;
/// let row = &digit[14 * 28..15 * 28];
/// assert_eq!(row.iter().filter(|&&pixel| pixel > 0).count(), 2);
/// # Ok::<(), PictureError>(())
/// ```
///
/// # Errors
///
/// [`PictureError::Empty`].
pub fn normalize(picture: &DynamicImage) -> Result<[u8; PIXELS], PictureError> {
    let grey = grey(picture);
    if let Some(digit) = as_in_mnist(&grey) {
        return Ok(digit);
    }
    let ink = ink(&grey)?;
    let (x, y, width, height) = inked(&ink).expect("there is ink");
    let cut = imageops::crop_imm(&ink, x, y, width, height).to_image();
    let longer = width.max(height);
    let scaled = |length: u32| {
        let scaled = f64::from(length) * f64::from(BOX) / f64::from(longer);
        (scaled.round() as u32).clamp(1, BOX)
    };
    // Averages where it shrinks.
    let small = imageops::resize(&cut, scaled(width), scaled(height), FilterType::Triangle);
    // Thin strokes are faint by now.
    let strongest = small.pixels().map(|pixel| pixel.0[0]).max().unwrap_or(0);
    Ok(centred(&stretched(&small, strongest)))
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

/// The picture itself, if MNIST could have made it.
fn as_in_mnist(grey: &GrayImage) -> Option<[u8; PIXELS]> {
    if grey.dimensions() != (SIDE as u32, SIDE as u32) || background(grey) != 0 {
        return None;
    }
    let (_, _, width, height) = inked(grey)?;
    let fits = (SCALED..=BOX).contains(&width.max(height));
    let middle = SIDE as f64 / 2.0;
    let (x, y) = centre_of_mass(grey);
    let centred = (x - middle).abs() <= 1.0 && (y - middle).abs() <= 1.0;
    match fits && centred {
        true => Some(pixels(grey)),
        false => None,
    }
}

/// White ink on black, stretched to all of the range.
fn ink(grey: &GrayImage) -> Result<GrayImage, PictureError> {
    let background = background(grey);
    let values = || grey.pixels().map(|pixel| pixel.0[0]);
    let darker = background - values().min().unwrap_or(background).min(background);
    let lighter = values().max().unwrap_or(background).max(background) - background;
    let strongest = darker.max(lighter);
    if strongest < CONTRAST {
        return Err(PictureError::Empty { found: strongest });
    }
    let ink = GrayImage::from_fn(grey.width(), grey.height(), |x, y| {
        let value = grey.get_pixel(x, y).0[0];
        Luma([match darker >= lighter {
            true => background.saturating_sub(value),
            false => value.saturating_sub(background),
        }])
    });
    let mut ink = stretched(&ink, strongest);
    for pixel in ink.pixels_mut() {
        if pixel.0[0] < DIRT {
            pixel.0[0] = 0;
        }
    }
    Ok(ink)
}

/// Median of the outermost pixels.
fn background(grey: &GrayImage) -> u8 {
    let (width, height) = grey.dimensions();
    let mut frame: Vec<u8> = grey
        .enumerate_pixels()
        .filter(|(x, y, _)| [0, width - 1].contains(x) || [0, height - 1].contains(y))
        .map(|(_, _, pixel)| pixel.0[0])
        .collect();
    frame.sort_unstable();
    frame.get(frame.len() / 2).copied().unwrap_or(0)
}

fn stretched(ink: &GrayImage, strongest: u8) -> GrayImage {
    let (strongest, half) = (u32::from(strongest.max(1)), u32::from(strongest) / 2);
    GrayImage::from_fn(ink.width(), ink.height(), |x, y| {
        let value = u32::from(ink.get_pixel(x, y).0[0]);
        Luma([((255 * value + half) / strongest).min(255) as u8])
    })
}

/// Corner, width and height of the smallest box around all ink.
fn inked(ink: &GrayImage) -> Option<(u32, u32, u32, u32)> {
    let (mut low, mut high) = ([u32::MAX; 2], [0; 2]);
    for (x, y, pixel) in ink.enumerate_pixels() {
        if pixel.0[0] > 0 {
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

/// In pixels from the upper left corner; the middle if there is no ink.
fn centre_of_mass(ink: &GrayImage) -> (f64, f64) {
    let (mut mass, mut moments) = (0.0, [0.0; 2]);
    for (x, y, pixel) in ink.enumerate_pixels() {
        let value = f64::from(pixel.0[0]);
        mass += value;
        moments[0] += value * (f64::from(x) + 0.5);
        moments[1] += value * (f64::from(y) + 0.5);
    }
    match mass > 0.0 {
        true => (moments[0] / mass, moments[1] / mass),
        false => (f64::from(ink.width()) / 2.0, f64::from(ink.height()) / 2.0),
    }
}

/// Puts a digit of at most [`BOX`] pixels on 28x28 black ones, by its centre of mass.
fn centred(small: &GrayImage) -> [u8; PIXELS] {
    let middle = SIDE as f64 / 2.0;
    let place = |centre: f64, length: u32| {
        let first = (middle - centre).round().max(0.0) as u32;
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
mod tests {
    use super::*;

    use image::{ImageFormat, Rgba, RgbaImage};

    use crate::data::generate;

    /// A drawn digit in one tone, enlarged and put somewhere on a page.
    fn page(index: usize, scale: u32, paper: u8, pen: u8) -> GrayImage {
        let digits = generate(index + 1, 3);
        let image = digits.image(index);
        GrayImage::from_fn(60 + scale * 28, 40 + scale * 28, |x, y| {
            let inside = |at: u32, margin: u32| {
                let at = at.checked_sub(margin)? / scale;
                (at < 28).then_some(at as usize)
            };
            let ink = match (inside(x, 45), inside(y, 7)) {
                (Some(x), Some(y)) => image[y * SIDE + x] >= 128,
                _ => false,
            };
            Luma([if ink { pen } else { paper }])
        })
    }

    fn digit(page: GrayImage) -> [u8; PIXELS] {
        normalize(&DynamicImage::ImageLuma8(page)).unwrap()
    }

    fn as_image(digit: &[u8; PIXELS]) -> GrayImage {
        GrayImage::from_raw(28, 28, digit.to_vec()).unwrap()
    }

    #[test]
    fn a_digit_is_scaled_and_centred() {
        for index in 0..20 {
            let digit = as_image(&digit(page(index, 5, 0, 255)));
            let (_, _, width, height) = inked(&digit).unwrap();
            assert_eq!(width.max(height), 20, "{index}: {width}x{height}");
            let (x, y) = centre_of_mass(&digit);
            let off = (x - 14.0).abs().max((y - 14.0).abs());
            assert!(off <= 0.5 + 1e-9, "{index}: {x}, {y}");
            assert_eq!(digit.pixels().map(|pixel| pixel.0[0]).max(), Some(255));
        }
    }

    #[test]
    fn polarity_and_contrast_make_no_difference() {
        for index in 0..10 {
            let wanted = digit(page(index, 4, 0, 255));
            for (paper, pen) in [(255, 0), (230, 30), (40, 200)] {
                let got = digit(page(index, 4, paper, pen));
                assert_eq!(got, wanted, "{index}, {pen} on {paper}");
            }
        }
    }

    #[test]
    fn what_is_transparent_is_background() {
        for (pen, paper) in [(0, 255), (255, 0)] {
            let opaque = page(2, 4, paper, pen);
            let transparent = RgbaImage::from_fn(opaque.width(), opaque.height(), |x, y| {
                let value = opaque.get_pixel(x, y).0[0];
                Rgba([pen, pen, pen, value.abs_diff(paper)])
            });
            let got = normalize(&DynamicImage::ImageRgba8(transparent)).unwrap();
            assert_eq!(got, digit(opaque), "{pen} on {paper}");
        }
    }

    #[test]
    fn what_mnist_could_have_made_stays() {
        let made = digit(page(4, 6, 255, 0));
        let again = digit(as_image(&made));
        assert_eq!(again, made);
        // But not on paper, nor off the middle.
        let inverted = GrayImage::from_fn(28, 28, |x, y| Luma([255 - made[(y * 28 + x) as usize]]));
        assert!(as_in_mnist(&inverted).is_none());
        let mut moved = GrayImage::new(28, 28);
        imageops::replace(&mut moved, &as_image(&made), 3, 0);
        assert!(as_in_mnist(&moved).is_none());
    }

    #[test]
    fn a_stroke_keeps_its_shape() {
        let stroke = GrayImage::from_fn(200, 300, |x, y| {
            let inside = (90..110).contains(&x) && (50..250).contains(&y);
            Luma([if inside { 0 } else { 255 }])
        });
        let digit = as_image(&digit(stroke));
        assert_eq!(inked(&digit), Some((13, 4, 2, 20)));
    }

    #[test]
    fn a_lopsided_digit_is_all_there() {
        // A heavy block with a thin tail: by its centre of mass the tail would leave the picture.
        let block = GrayImage::from_fn(120, 60, |x, y| {
            let heavy = (10..40).contains(&x) && (10..50).contains(&y);
            let tail = (40..110).contains(&x) && (28..32).contains(&y);
            Luma([if heavy || tail { 255 } else { 0 }])
        });
        let digit = as_image(&digit(block));
        let (x, _, width, _) = inked(&digit).unwrap();
        assert_eq!((x, width), (8, 20));
    }

    #[test]
    fn empty_pages_are_refused() {
        for page in [
            GrayImage::from_pixel(30, 30, Luma([255])),
            GrayImage::from_fn(30, 30, |x, _| Luma([100 + x as u8])),
            GrayImage::from_pixel(1, 1, Luma([7])),
        ] {
            let refused = normalize(&DynamicImage::ImageLuma8(page));
            assert!(
                matches!(refused, Err(PictureError::Empty { .. })),
                "{refused:?}"
            );
        }
    }

    #[test]
    fn a_folder_is_read_by_names() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        fs::write(path("notes.txt"), "no picture").unwrap();
        fs::create_dir(path("folder.png")).unwrap();
        let none = read_folder(folder.path()).unwrap_err();
        let text = none.to_string();
        assert!(
            text.contains("none of its 1 files") && text.contains(".png"),
            "{text}"
        );
        assert!(
            matches!(none, FolderError::NoPictures { files: 1, .. }),
            "{none}"
        );

        let sound = page(0, 2, 255, 0);
        sound
            .save_with_format(path("b.PNG"), ImageFormat::Png)
            .unwrap();
        sound
            .save_with_format(path("a.pgm"), ImageFormat::Pnm)
            .unwrap();
        fs::write(path("c.png"), "no picture").unwrap();
        // A bitmap of text, and with the name of another format.
        fs::write(
            path("d.png"),
            "P1 4 4\n1 0 0 1\n0 0 0 0\n0 0 0 0\n0 0 0 0\n",
        )
        .unwrap();
        let pictures = read_folder(folder.path()).unwrap();
        let names: Vec<&str> = pictures.iter().map(|p| p.name.as_str()).collect();
        assert_eq!(names, ["a.pgm", "b.PNG", "c.png", "d.png"]);
        let digits: Vec<_> = pictures.iter().map(|p| p.digit.as_ref()).collect();
        assert_eq!(digits[0].unwrap(), digits[1].unwrap());
        assert!(matches!(digits[2], Err(PictureError::Decode(_))));
        assert!(digits[3].is_ok(), "{:?}", digits[3]);

        // By content alone, and of a format that is not read.
        fs::rename(path("b.PNG"), path("b")).unwrap();
        fs::write(path("c.png"), b"\xff\xd8\xff\xe0\0\x10JFIF\0").unwrap();
        fs::write(path("e.jpg"), "").unwrap();
        let pictures = read_folder(folder.path()).unwrap();
        let names: Vec<&str> = pictures.iter().map(|p| p.name.as_str()).collect();
        assert_eq!(names, ["a.pgm", "b", "c.png", "d.png", "e.jpg"]);
        assert!(pictures[1].digit.is_ok(), "{:?}", pictures[1]);
        for jpeg in [&pictures[2], &pictures[4]] {
            assert!(matches!(jpeg.digit, Err(PictureError::Format)), "{jpeg:?}");
        }

        let absent = read_folder(&path("absent")).unwrap_err();
        assert!(matches!(absent, FolderError::Io { .. }), "{absent}");
    }
}
