use super::*;

use std::path::Path;

use crate::data::generate;

fn mistakes(count: usize) -> (Digits, Vec<MistakeReport>) {
    let digits = generate(count, 5);
    let mistake = |index| MistakeReport {
        index,
        label: digits.label(index),
        prediction: 9 - digits.label(index),
        probability: 1.0 - index as f64 / 1000.0,
        loss: 16.0 - index as f64 / 10.0,
    };
    let mistakes = (0..count).map(mistake).collect();
    (digits, mistakes)
}

fn heading() -> Vec<String> {
    vec![
        "The 40 with the highest loss of 132 mistakes on 10000 digits".to_string(),
        "mobilenet-v2, unfused, epoch 12 (f64)".to_string(),
    ]
}

fn decoded(heading: &[String], (digits, mistakes): &(Digits, Vec<MistakeReport>)) -> GrayImage {
    let png = draw(PictureFormat::Png, heading, digits, mistakes).unwrap();
    image::load_from_memory(&png).unwrap().to_luma8()
}

#[test]
fn every_text_fits() {
    for mistake in &mistakes(60).1 {
        for line in lines(mistake) {
            assert!(width(&line) < RIGHT, "{line}");
        }
    }
    for line in heading() {
        assert!(width(&line) <= WIDTH - 2 * MARGIN, "{line}");
    }
}

#[test]
fn letters_are_as_in_the_font() {
    let picture = decoded(&["L\u{df}".to_string()], &mistakes(0));
    let ink = |x: u32, y: u32| picture.get_pixel(MARGIN + x, MARGIN + y).0[0] == 0;
    let dots = |y: u32| -> String { (0..8).map(|x| if ink(x, y) { '#' } else { '.' }).collect() };
    // A stem on the left, and a foot.
    assert_eq!((dots(4), dots(12)), (".##.....".into(), "#######.".into()));
    assert!(
        (0..16).all(|y| ink(8, y) && ink(15, y)),
        "a block for what there is not"
    );
}

#[test]
fn nothing_reaches_into_the_margin() {
    for count in [0, 1, 9, 60] {
        let picture = decoded(&heading(), &mistakes(count));
        let (width, height) = picture.dimensions();
        assert_eq!(width, WIDTH);
        let rows = count.min(SHOWN).div_ceil(COLUMNS) as u32;
        assert_eq!(height, 2 * MARGIN + 2 * LINE + 12 + rows * DOWN, "{count}");
        for (x, y, pixel) in picture.enumerate_pixels() {
            let inside = |at: u32, length: u32| (MARGIN..length - MARGIN).contains(&at);
            let margin = !inside(x, width) || !inside(y, height);
            assert!(!margin || pixel.0[0] == 255, "{count}: ink at {x}, {y}");
        }
    }
}

#[test]
fn the_digit_is_shown_as_it_is() {
    let one = mistakes(1);
    let picture = decoded(&[], &one);
    let (left, top) = (MARGIN + (RIGHT - DIGIT) / 2, MARGIN + 12);
    for (at, &pixel) in one.0.image(0).iter().enumerate() {
        let x = left + (at % SIDE) as u32 * ZOOM + ZOOM / 2;
        let y = top + (at / SIDE) as u32 * ZOOM + ZOOM / 2;
        assert_eq!(picture.get_pixel(x, y).0[0], pixel, "pixel {at}");
    }
}

#[test]
fn the_drawing_says_the_same() {
    let (digits, mistakes) = mistakes(60);
    let svg = draw(PictureFormat::Svg, &heading(), &digits, &mistakes).unwrap();
    let svg = String::from_utf8(svg).unwrap();
    assert!(
        svg.contains("The 40 with the highest loss of 132 mistakes"),
        "{svg}"
    );
    assert!(svg.ends_with("</svg>\n"));
    assert_eq!(svg.matches("<g ").count(), SHOWN);
    for (index, mistake) in mistakes.iter().enumerate() {
        let [what, probability, loss] = lines(mistake);
        let shown = index < SHOWN;
        assert!(!shown || svg.contains(&format!(">{what}</text>")), "{what}");
        let shows = svg.contains(&format!(">{probability}</text>"));
        assert_eq!(shows, shown, "{probability}");
        let shows = svg.contains(&format!(">{loss}</text>"));
        assert_eq!(shows, shown, "{loss}");
    }
}

/// Every pixel that is not black is under one bar, of its shade.
#[test]
fn bars_cover_the_digit() {
    let digit = *generate(1, 8).image(0);
    let mut drawn = [0u8; PIXELS];
    for bar in bars(&digit).split("<path ").skip(1) {
        let numbers: Vec<usize> = bar
            .split(|c: char| !c.is_ascii_digit())
            .filter_map(|number| number.parse().ok())
            .collect();
        let [shade, _, _, x, y, length, ..] = numbers[..] else {
            panic!("{bar}");
        };
        for pixel in &mut drawn[y * SIDE + x..y * SIDE + x + length] {
            assert_eq!(*pixel, 0, "two bars at {x}, {y}");
            *pixel = shade as u8;
        }
    }
    assert_eq!(drawn, digit);
}

#[test]
fn the_name_says_the_format() {
    let of = |name: &str| PictureFormat::of(Path::new(name));
    assert_eq!(of("a/b.svg").unwrap(), PictureFormat::Svg);
    assert_eq!(of("b.PNG").unwrap(), PictureFormat::Png);
    for name in ["b", "b.jpg", "svg"] {
        let error = of(name).unwrap_err().to_string();
        assert!(error.contains(name) && error.contains(".svg"), "{error}");
    }
}
