use super::*;

use std::path::Path;

use crate::data::generate;

fn tiles(count: usize) -> Vec<Tile> {
    let digits = generate(count, 5);
    (0..count)
        .map(|index| Tile {
            image: *digits.image(index),
            label: digits.label(index),
            prediction: 9 - digits.label(index),
            probability: 1.0 - index as f64 / 1000.0,
            loss: 16.0 - index as f64 / 10.0,
        })
        .collect()
}

fn heading() -> Vec<String> {
    vec![
        "The 40 with the highest loss of 132 mistakes on 10000 digits".to_string(),
        "mobilenet-v2, unfused, epoch 12 (f64)".to_string(),
    ]
}

fn decoded(heading: &[String], tiles: &[Tile]) -> GrayImage {
    let png = draw(PictureFormat::Png, heading, tiles).unwrap();
    image::load_from_memory(&png).unwrap().to_luma8()
}

#[test]
fn every_text_fits_and_has_its_letters() {
    for tile in tiles(60) {
        for line in tile.lines() {
            assert!(width(&line) < RIGHT, "{line}");
            assert!(line.chars().all(font::knows), "{line}");
        }
    }
    for line in heading() {
        assert!(width(&line) <= WIDTH - 2 * MARGIN, "{line}");
        assert!(line.to_lowercase().chars().all(font::knows), "{line}");
    }
}

#[test]
fn nothing_reaches_into_the_margin() {
    for count in [0, 1, 9, 60] {
        let picture = decoded(&heading(), &tiles(count));
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
    let tile = &tiles(1)[0];
    let picture = decoded(&[], std::slice::from_ref(tile));
    let (left, top) = (MARGIN + (RIGHT - DIGIT) / 2, MARGIN + 12);
    for (at, &pixel) in tile.image.iter().enumerate() {
        let x = left + (at % SIDE) as u32 * ZOOM + ZOOM / 2;
        let y = top + (at / SIDE) as u32 * ZOOM + ZOOM / 2;
        assert_eq!(picture.get_pixel(x, y).0[0], pixel, "pixel {at}");
    }
}

#[test]
fn the_drawing_says_the_same() {
    let tiles = tiles(60);
    let svg = draw(PictureFormat::Svg, &heading(), &tiles).unwrap();
    let svg = String::from_utf8(svg).unwrap();
    assert!(
        svg.contains("the 40 with the highest loss of 132 mistakes"),
        "{svg}"
    );
    assert!(svg.ends_with("</svg>\n"));
    assert_eq!(svg.matches("<g ").count(), SHOWN);
    for (index, tile) in tiles.iter().enumerate() {
        let [what, probability, loss] = tile.lines();
        let shown = index < SHOWN;
        assert!(!shown || svg.contains(&format!(">{what}</text>")), "{what}");
        let shows = svg.contains(&format!(">{probability}</text>"));
        assert_eq!(shows, shown, "{probability}");
        let shows = svg.contains(&format!(">{loss}</text>"));
        assert_eq!(shows, shown, "{loss}");
    }
}

/// Every pixel that is not black is under one bar, of nearly its shade.
#[test]
fn bars_cover_the_digit() {
    let digit = *generate(1, 8).image(0);
    let mut drawn = [0u8; PIXELS];
    for path in paths(&digit).split("<path ").skip(1) {
        let (_, shade) = path.split_once("rgb(").unwrap();
        let shade: u8 = shade.split(',').next().unwrap().parse().unwrap();
        let (_, bars) = path.split_once("d=\"M").unwrap();
        for bar in bars.split('"').next().unwrap().split('M') {
            let numbers: Vec<usize> = bar
                .split(|c: char| !c.is_ascii_digit())
                .filter_map(|number| number.parse().ok())
                .collect();
            let [x, y, length, ..] = numbers[..] else {
                panic!("{bar}");
            };
            for pixel in &mut drawn[y * SIDE + x..y * SIDE + x + length] {
                assert_eq!(*pixel, 0, "two bars at {x}, {y}");
                *pixel = shade;
            }
        }
    }
    for (drawn, pixel) in drawn.iter().zip(digit) {
        assert!(drawn.abs_diff(pixel) <= 8, "{drawn} for {pixel}");
    }
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
