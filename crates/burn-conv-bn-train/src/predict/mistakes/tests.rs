use super::*;

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
        "40 of 132 mistakes on 10000 digits of synthetic, highest loss first".to_string(),
        "mobilenet-v2, unfused, epoch 12 (f64)".to_string(),
    ]
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
fn the_height_is_that_of_the_rows() {
    for count in [0, 1, 9, 60] {
        let (digits, mistakes) = mistakes(count);
        let svg = draw(&heading(), &digits, &mistakes);
        let rows = count.min(SHOWN).div_ceil(COLUMNS) as u32;
        let height = 2 * MARGIN + 2 * LINE + 12 + rows * DOWN;
        let size = format!("viewBox=\"0 0 {WIDTH} {height}\"");
        assert!(svg.contains(&size), "{count}: no {size}");
    }
}

#[test]
fn the_drawing_says_the_same() {
    let (digits, mistakes) = mistakes(60);
    let svg = draw(&heading(), &digits, &mistakes);
    assert!(svg.contains(">40 of 132 mistakes on 10000 digits"), "{svg}");
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
