use super::*;
use crate::measure::report::Divergence;
use crate::measure::timeline::Point;

fn variant(name: &str, seconds: f64, bytes: usize) -> VariantReport {
    VariantReport {
        name: name.to_string(),
        step_losses: vec![2.3, 1.1, 0.5],
        timeline: Some(Timeline {
            points: vec![
                Point {
                    seconds: 0.0,
                    bytes: 0,
                },
                Point {
                    seconds: seconds / 2.0,
                    bytes,
                },
            ],
            forward_end: seconds / 3.0,
            backward_end: 0.9 * seconds,
            optimizer_end: seconds,
        }),
        ..VariantReport::default()
    }
}

fn report(variants: Vec<VariantReport>) -> Report {
    Report {
        dataset: "synthetic".to_string(),
        batch_size: 7,
        variants,
        ..Report::default()
    }
}

#[test]
fn a_picture_names_what_it_shows() {
    let variants = vec![
        variant("fused", 1.0, 300 << 20),
        variant("unfused", 2.0, 700 << 20),
    ];
    let svg = picture(&report(variants)).unwrap();
    for text in [
        "fused: peak 300 MiB",
        "unfused: peak 700 MiB",
        "step of 7 digits",
        "forward",
        "backward",
        "optimizer",
        "seconds from the start",
        "mean loss of a digit",
        "synthetic",
    ] {
        assert!(svg.contains(text), "{text} is missing in {svg}");
    }
}

#[test]
fn a_curve_has_a_gap_where_the_loss_is_not_finite() {
    let drawn = |losses: &[f64]| {
        let mut variant = variant("fused", 1.0, 300 << 20);
        variant.timeline = None;
        variant.step_losses = losses.to_vec();
        let step = losses.iter().position(|loss| !loss.is_finite());
        variant.diverged = step.map(|step| Divergence {
            epoch: 1,
            step: Some(step + 1),
        });
        picture(&report(vec![variant])).unwrap()
    };
    let colour = "stroke=\"#0072B2\" stroke-width=\"2\"";
    let curves = |svg: &str| -> usize {
        let lines = svg.lines().filter(|line| line.starts_with("<polyline"));
        lines.filter(|line| line.contains(colour)).count()
    };
    let whole = drawn(&[3.0, 2.0, 1.0, 2.0, 1.0]);
    let gap = drawn(&[3.0, 2.0, f64::NAN, 2.0, 1.0]);
    assert_eq!(curves(&gap), curves(&whole) + 1, "{gap}");
    assert!(
        gap.contains("fused (diverged in epoch 1 at step 3)"),
        "{gap}"
    );
    assert!(!whole.contains("diverged"), "{whole}");
    // A loss between two others that are not finite is a dot.
    let dots = |svg: &str| svg.matches("<circle").count();
    let alone = drawn(&[f64::NAN, 2.0, f64::INFINITY, 2.0, 1.0]);
    assert_eq!((dots(&alone), dots(&gap)), (1, 0), "{alone}");
    for losses in [[f64::NAN; 2], [f64::MAX, 1.0]] {
        assert!(drawn(&losses).contains("</svg>"));
    }
}

#[test]
fn what_was_interrupted_can_be_drawn() {
    let mut nothing = variant("fused", 0.0, 0);
    nothing.step_losses.clear();
    nothing.timeline = None;
    for variants in [Vec::new(), vec![nothing]] {
        assert!(picture(&report(variants)).unwrap().contains("</svg>"));
    }
}
