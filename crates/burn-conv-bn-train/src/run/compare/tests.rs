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
    report.variants[1].interrupted = false;
    report.variants.push(run("norm-conv", 0, 1, true));
    let text = interruption(&job, &options, &report);
    let wanted = "norm-conv was stopped in epoch 1 after 1 of its 4 training steps";
    assert!(text.contains(wanted), "{text}");
    report.variants.pop();

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

#[test]
fn a_variant_that_is_measured_stands_below_the_ratio() {
    let mut report = Report {
        variants: vec![run("fused", 1, 9, false), run("unfused", 1, 9, false)],
        ..Report::default()
    };
    report.variants.push(run("norm-conv", 0, 4, false));
    let text = summary(&report);
    let lines: Vec<&str> = text.lines().rev().take(6).collect();
    let starts = [
        "0 digits",
        "norm-conv is",
        "norm-conv ",
        "ratio ",
        "unfused ",
        "fused ",
    ];
    for (line, start) in lines.iter().zip(starts) {
        assert!(line.starts_with(start), "no {start:?} in {text}");
    }
    let cells: Vec<&str> = lines[2].split_whitespace().collect();
    assert_eq!(cells[cells.len() - 2..], ["-", "-"]);
    assert!(lines[1].contains("4 steps"), "{text}");
}

#[test]
fn a_measured_variant_takes_a_few_steps_of_the_job() {
    let mut job = crate::run::job::tests::job(3, 32);
    job.setup.data.train_limit = Some(1000);
    let measured = share(&job, Variant::NormConv);
    assert_eq!(
        (measured.setup.data.train_limit, measured.epochs),
        (Some(4 * 32), 1)
    );
    let mut few = job.clone();
    few.setup.data.train_limit = Some(40);
    let limit = |job, variant| share(job, variant).setup.data.train_limit;
    assert_eq!(limit(&few, Variant::NormConv), Some(40));
    assert_eq!(limit(&job, Variant::Fused), Some(1000));
}
