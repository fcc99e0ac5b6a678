use super::*;

use image::imageops::FilterType;
use image::{ImageFormat, Rgba, RgbaImage};

use crate::data::testing::real_mnist;
use crate::data::{Digits, generate};
use crate::print::message;

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
        let (_, _, width, height) = inked(&digit, 1).unwrap();
        assert_eq!(width.max(height), 20, "{index}: {width}x{height}");
        let (x, y) = centre_of_mass(&digit);
        let off = (x - 14.5).abs().max((y - 14.5).abs());
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

/// A picture on black paper with a margin.
fn padded(digit: &GrayImage, margin: u32) -> GrayImage {
    let mut padded = GrayImage::new(28 + 2 * margin, 28 + 2 * margin);
    imageops::replace(&mut padded, digit, i64::from(margin), i64::from(margin));
    padded
}

fn enlarged(digit: &GrayImage, times: u32, filter: FilterType) -> GrayImage {
    imageops::resize(digit, 28 * times, 28 * times, filter)
}

fn inverted(page: &GrayImage) -> GrayImage {
    GrayImage::from_fn(page.width(), page.height(), |x, y| {
        Luma([255 - page.get_pixel(x, y).0[0]])
    })
}

/// Mean difference of two digits' pixels, of 255.
fn difference(a: &[u8; PIXELS], b: &[u8; PIXELS]) -> f64 {
    let sum: u64 = a
        .iter()
        .zip(b)
        .map(|(a, b)| u64::from(a.abs_diff(*b)))
        .sum();
    sum as f64 / PIXELS as f64
}

type Change = Box<dyn Fn(&GrayImage) -> GrayImage>;

/// MNIST's own digits, as they are and in the pictures that people make of them: byte by byte where
/// the pixels are still there, and nearly where they were smoothed.
#[test]
fn mnist_digits_come_back_from_other_pictures_of_them() {
    let Some(real) = real_mnist() else { return };
    let [images, labels] =
        ["images-idx3", "labels-idx1"].map(|name| real.join(format!("t10k-{name}-ubyte.gz")));
    let digits = Digits::read(&images, &labels).unwrap();
    let changes: [(&str, f64, Change); 8] = [
        ("nothing", 0.0, Box::new(GrayImage::clone)),
        (
            "1 pixel of padding",
            0.0,
            Box::new(|digit| padded(digit, 1)),
        ),
        (
            "3 pixels of padding",
            0.0,
            Box::new(|digit| padded(digit, 3)),
        ),
        (
            "10 pixels of padding",
            0.0,
            Box::new(|digit| padded(digit, 10)),
        ),
        (
            "2 times",
            0.0,
            Box::new(|digit| enlarged(digit, 2, FilterType::Nearest)),
        ),
        (
            "4 times",
            0.0,
            Box::new(|digit| enlarged(digit, 4, FilterType::Nearest)),
        ),
        (
            "4 times, smooth",
            12.0,
            Box::new(|digit| enlarged(digit, 4, FilterType::Triangle)),
        ),
        (
            "4 times, sharp",
            12.0,
            Box::new(|digit| enlarged(digit, 4, FilterType::CatmullRom)),
        ),
    ];
    for (name, bound, change) in changes {
        let mut total = 0.0;
        for index in 0..1000 {
            let page = change(&as_image(digits.image(index)));
            let normalized = digit(page.clone());
            assert_eq!(
                digit(inverted(&page)),
                normalized,
                "{index}, inverted, {name}"
            );
            total += difference(&normalized, digits.image(index));
        }
        let mean = total / 1000.0;
        assert!(mean <= bound, "{name}: {mean} off, {bound} allowed");
    }
}

#[test]
fn what_mnist_could_have_made_stays() {
    let made = as_image(&digit(page(4, 6, 255, 0)));
    let same = |page: GrayImage| assert_eq!(as_image(&digit(page)), made);
    same(made.clone());
    same(inverted(&made));
    // But not off its place.
    let mut moved = GrayImage::new(28, 28);
    imageops::replace(&mut moved, &made, 2, -1);
    same(moved);
}

/// Half of the frame is ink, so that its median lies between ink and background.
#[test]
fn a_digit_on_the_frame_is_the_same_inverted() {
    let mut half = GrayImage::from_fn(30, 30, |x, _| Luma([if x < 15 { 200 } else { 0 }]));
    half.put_pixel(20, 20, Luma([200]));
    assert_eq!(digit(half.clone()), digit(inverted(&half)));
    // As much lighter as darker than its background: more of it is dark.
    let mut both = GrayImage::from_pixel(30, 30, Luma([100]));
    for (x, value) in [(8, 200), (10, 0), (11, 0)] {
        for y in 5..25 {
            both.put_pixel(x, y, Luma([value]));
        }
    }
    assert_eq!(digit(both.clone()), digit(inverted(&both)));
}

#[test]
fn dirt_moves_no_digit() {
    let clean = page(3, 5, 0, 255);
    let wanted = digit(clean.clone());
    // Specks far from the digit, and paper that is nowhere quite black.
    let mut specks = clean.clone();
    for (x, y) in [(2, 3), (190, 160), (5, 170)] {
        specks.put_pixel(x, y, Luma([25]));
    }
    assert_eq!(digit(specks), wanted);
    let rough = GrayImage::from_fn(clean.width(), clean.height(), |x, y| {
        let noise = ((x * 7 + y * 13) % 11) as u8;
        Luma([clean.get_pixel(x, y).0[0].max(noise)])
    });
    let off = difference(&digit(rough), &wanted);
    assert!(off < 2.0, "{off}");
    // Faint edges of a stroke are a part of it, on clean paper.
    let stroke = GrayImage::from_fn(60, 60, |x, y| {
        let edge = (19..41).contains(&x) && (9..51).contains(&y);
        let core = (20..40).contains(&x) && (10..50).contains(&y);
        Luma([if core {
            255
        } else if edge {
            20
        } else {
            0
        }])
    });
    let (.., width, height) = inked(&cleaned(&stroke), 1).unwrap();
    assert_eq!((width, height), (22, 42));
}

#[test]
fn areas_are_averaged() {
    let picture = GrayImage::from_fn(50, 30, |x, _| Luma([if x % 5 < 2 { 250 } else { 0 }]));
    // Two and a half pixels to one: 2 of them white, and then none.
    let small = scaled(&picture, 50);
    assert_eq!(small.dimensions(), (20, 12));
    assert!(
        small
            .enumerate_pixels()
            .all(|(x, _, pixel)| pixel.0[0] == [200, 0][x as usize % 2])
    );
    // A block cut off at the border counts its missing pixels as 0.
    let odd = scaled(&GrayImage::from_pixel(40, 21, Luma([200])), 40);
    assert_eq!(odd.dimensions(), (20, 11));
    assert_eq!(
        (odd.get_pixel(3, 9).0[0], odd.get_pixel(3, 10).0[0]),
        (200, 100)
    );
    // Enlarged, pixels are repeated.
    let large = scaled(&GrayImage::from_fn(5, 5, |x, _| Luma([40 * x as u8])), 5);
    assert_eq!(large.dimensions(), (20, 20));
    assert!(
        large
            .enumerate_pixels()
            .all(|(x, _, pixel)| u32::from(pixel.0[0]) == x / 4 * 40)
    );
}

#[test]
fn a_stroke_keeps_its_shape() {
    let stroke = GrayImage::from_fn(200, 300, |x, y| {
        let inside = (90..110).contains(&x) && (50..250).contains(&y);
        Luma([if inside { 0 } else { 255 }])
    });
    let digit = as_image(&digit(stroke));
    assert_eq!(inked(&digit, 1), Some((14, 5, 2, 20)));
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
    let (x, _, width, _) = inked(&digit, 1).unwrap();
    assert_eq!((x, width), (8, 20));
}

#[test]
fn empty_pages_are_refused() {
    for page in [
        GrayImage::from_pixel(30, 30, Luma([255])),
        GrayImage::from_fn(30, 30, |x, _| Luma([100 + x as u8])),
        GrayImage::from_pixel(1, 1, Luma([7])),
    ] {
        let refused = normalize(&DynamicImage::ImageLuma8(page)).unwrap_err();
        assert!(refused.to_string().starts_with("is empty"), "{refused}");
    }
}

#[test]
fn a_folder_is_read_by_names() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    fs::write(path("notes.txt"), "no picture").unwrap();
    fs::create_dir(path("folder.png")).unwrap();
    let text = read_folder(folder.path()).unwrap_err().to_string();
    assert!(
        text.contains("none of its 1 files") && text.contains(".png"),
        "{text}"
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
    type Read = Vec<(String, Result<Option<[u8; PIXELS]>, String>)>;
    let read = || -> Read {
        let pictures = read_folder(folder.path()).unwrap().into_iter();
        let shown =
            |picture: Picture| (picture.name, picture.digit.map_err(|error| message(&error)));
        pictures.map(shown).collect()
    };
    let names = |pictures: &[(String, _)]| -> Vec<String> {
        pictures
            .iter()
            .map(|(name, _): &(String, Result<_, _>)| name.clone())
            .collect()
    };
    let pictures = read();
    assert_eq!(
        names(&pictures),
        ["a.pgm", "b.PNG", "c.png", "d.png", "notes.txt"]
    );
    let digits: Vec<_> = pictures.into_iter().map(|(_, digit)| digit).collect();
    assert!(digits[0].as_ref().unwrap().is_some());
    assert_eq!(digits[0], digits[1]);
    let damage = digits[2].as_ref().unwrap_err();
    assert!(damage.starts_with("cannot be decoded"), "{damage}");
    assert!(digits[3].as_ref().unwrap().is_some());
    // Neither by ending nor by content.
    assert_eq!(digits[4], Ok(None));

    // By content alone, and of a format that is not read.
    fs::rename(path("b.PNG"), path("b")).unwrap();
    fs::write(path("c.png"), b"\xff\xd8\xff\xe0\0\x10JFIF\0").unwrap();
    fs::write(path("e.jpg"), "").unwrap();
    let pictures = read();
    assert_eq!(
        names(&pictures),
        ["a.pgm", "b", "c.png", "d.png", "e.jpg", "notes.txt"]
    );
    assert!(pictures[1].1.as_ref().unwrap().is_some());
    for (_, jpeg) in [&pictures[2], &pictures[4]] {
        let reason = jpeg.as_ref().unwrap_err();
        assert!(
            reason.starts_with("is of a format that is not read here"),
            "{reason}"
        );
    }

    let absent = message(&read_folder(&path("absent")).unwrap_err());
    assert!(absent.starts_with("cannot read the folder"), "{absent}");
}
