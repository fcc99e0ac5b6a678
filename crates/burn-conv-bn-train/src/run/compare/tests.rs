use super::*;
use crate::measure::report::EpochReport;

fn run(name: &str, epochs: usize, steps: usize, interrupted: bool) -> VariantReport {
    VariantReport {
        name: name.to_string(),
        epochs: vec![
            EpochReport {
                train_loss: 1.0,
                test_loss: 1.0,
                test_accuracy: 0.5,
            };
            epochs
        ],
        step_losses: vec![1.0; steps],
        step_seconds_median: 0.1,
        forward_end_bytes: 1,
        peak_bytes: 2,
        saved_bytes: 1,
        interrupted,
        ..VariantReport::default()
    }
}

#[test]
fn an_interruption_says_what_became_of_each_variant() {
    let job = crate::run::job::tests::job(3, 32);
    let mut options = CompareOptions {
        json: None,
        plot: None,
        time_limit: None,
        threads: None,
    };
    let mut report = Report {
        train_digits: 100,
        ..Report::default()
    };
    let text = interruption(&job, &options, &report);
    for part in [
        "fused was not begun, unfused was not begun",
        "nothing was measured",
    ] {
        assert!(text.contains(part), "no {part:?} in {text}");
    }

    report.variants.push(run("fused", 3, 12, false));
    report.variants.push(run("unfused", 1, 7, true));
    let text = interruption(&job, &options, &report);
    for part in [
        "fused is finished",
        "unfused was stopped in epoch 2 after 3 of its 4 training steps",
        "the table above",
        "no weights are kept",
    ] {
        assert!(text.contains(part), "no {part:?} in {text}");
    }

    // In the test after the last epoch.
    report.variants[1] = run("unfused", 2, 12, true);
    options.json = Some(PathBuf::from("out.json"));
    let text = interruption(&job, &options, &report);
    for part in [
        "stopped in epoch 3 after 4 of its 4 training steps",
        "out.json has what was measured",
    ] {
        assert!(text.contains(part), "no {part:?} in {text}");
    }
}
