use std::time::Duration;

use super::*;
use crate::measure::history::SplitRecord;

fn step(total: usize, millis: u64, bytes: usize) -> StepRecord {
    StepRecord {
        evaluation: Evaluation {
            total,
            ..Evaluation::default()
        },
        measure: StepMeasure {
            memory: StepMemory {
                forward_end_bytes: bytes,
                peak_bytes: 2 * bytes,
            },
            duration: Duration::from_millis(millis),
        },
    }
}

#[test]
fn a_smaller_last_batch_counts_for_the_peak_alone() {
    let steps = [
        step(8, 30, 100),
        step(8, 10, 200),
        step(8, 20, 300),
        step(3, 1, 9000),
    ];
    let of_all = summary(&steps, 8);
    assert_eq!(of_all.duration, Duration::from_millis(20));
    assert_eq!(of_all.memory.forward_end_bytes, 200);
    assert_eq!(of_all.memory.peak_bytes, 18000);
    assert_eq!(summary(&steps[..3], 8).memory.peak_bytes, 600);
    assert_eq!(summary(&steps[..2], 8).duration, Duration::from_millis(20));
    assert_eq!(summary(&steps[3..], 8).memory.peak_bytes, 18000);
    assert_eq!(summary(&[], 8), StepMeasure::default());
}

#[test]
fn a_report_of_a_run_that_diverged_survives_json() {
    let report = Report {
        schema: SCHEMA,
        seed: u64::MAX,
        variants: vec![VariantReport {
            epochs: vec![EpochReport {
                train_loss: f64::INFINITY,
                test_loss: 1.0 / 3.0,
                test_accuracy: 0.9,
            }],
            step_losses: vec![2.3, 1e-7, f64::NEG_INFINITY],
            diverged: Some(Divergence {
                epoch: 1,
                step: Some(3),
            }),
            ..VariantReport::default()
        }],
        ..Report::default()
    };
    let json = serde_json::to_string(&report).unwrap();
    assert_eq!(serde_json::from_str::<Report>(&json).unwrap(), report);
    // Only what was not there is null.
    assert!(!json.contains("null"), "{json}");
}

#[test]
fn a_run_diverges_at_its_first_loss_that_is_not_finite() {
    let evaluation = |loss_sum| Evaluation {
        loss_sum,
        ..Evaluation::default()
    };
    let epoch = |losses: [f64; 2]| SplitRecord {
        evaluation: evaluation(losses[0] + losses[1]),
        steps: losses
            .map(|loss| StepRecord {
                evaluation: evaluation(loss),
                ..step(8, 1, 1)
            })
            .to_vec(),
    };
    let at = |epoch, step| Some(Divergence { epoch, step });
    for (epochs, diverged) in [
        ([(2.0, 1.0, Some(1.0)), (1.0, 0.5, None)], None),
        (
            [(2.0, 1.0, Some(1.0)), (1.0, f64::NAN, None)],
            at(2, Some(2)),
        ),
        (
            [(f64::INFINITY, 1.0, None), (f64::NAN, 1.0, None)],
            at(1, Some(1)),
        ),
        (
            [(2.0, 1.0, Some(f64::NAN)), (f64::NAN, 1.0, None)],
            at(1, None),
        ),
    ] {
        let epochs = epochs.map(|(first, last, test)| Epoch {
            train: epoch([first, last]),
            test: test.map(evaluation),
        });
        assert_eq!(Divergence::of(&epochs), diverged, "{epochs:?}");
    }
}

#[test]
fn a_report_names_the_variants_that_diverged() {
    let variant = |name: &str, diverged| VariantReport {
        name: name.into(),
        diverged,
        ..VariantReport::default()
    };
    let mut report = Report {
        variants: vec![variant("fused", None)],
        ..Report::default()
    };
    report.check_finite().unwrap();
    let diverged = Divergence {
        epoch: 3,
        step: None,
    };
    report.variants.push(variant("unfused", Some(diverged)));
    let error = report.check_finite().unwrap_err().to_string();
    assert!(
        error.starts_with("unfused diverged in epoch 3, in the test: "),
        "{error}"
    );
}

#[test]
fn a_report_of_the_same_epochs_is_found() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("report.json");
    let mut report = Report {
        variants: vec![VariantReport {
            epochs: vec![EpochReport {
                train_loss: f64::NAN,
                test_loss: 1.0 / 3.0,
                test_accuracy: 0.9,
            }],
            ..VariantReport::default()
        }],
        ..Report::default()
    };
    assert!(!report.is_in(&path));
    fs::write(&path, serde_json::to_string(&report).unwrap()).unwrap();
    // Elsewhere it may have been computed by more threads.
    report.threads = 7;
    assert!(report.is_in(&path));
    report.variants[0].epochs[0].test_loss = 0.3;
    assert!(!report.is_in(&path));
    fs::write(&path, "notes").unwrap();
    assert!(!report.is_in(&path));
}
