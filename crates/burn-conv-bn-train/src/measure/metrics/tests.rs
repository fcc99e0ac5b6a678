use super::*;

use std::time::Duration;

use burn::data::dataloader::Progress;
use burn::tensor::Device;

use crate::measure::memory::StepMemory;

fn metadata() -> MetricMetadata {
    MetricMetadata {
        progress: Progress::new(1, 1, None),
        iteration: None,
        lr: None,
    }
}

fn measure(mebibytes: usize) -> StepMeasure {
    StepMeasure {
        memory: StepMemory {
            forward_end_bytes: mebibytes << 20,
            peak_bytes: mebibytes << 21,
        },
        duration: Duration::from_millis(250),
    }
}

fn input(losses: &[f32], scores: &[[f32; 2]], targets: &[i64]) -> StepOutput {
    let device = Device::flex();
    let scores: Vec<f32> = scores.iter().flatten().copied().collect();
    StepOutput {
        loss: Tensor::from_data(losses, &device),
        scores: Tensor::<1>::from_data(scores.as_slice(), &device).reshape([targets.len(), 2]),
        targets: Tensor::from_data(targets, &device),
        measure: Some(measure(3)),
    }
}

#[test]
fn an_epoch_has_the_mean_at_the_end_of_forward_and_the_highest_peak() {
    // The peak is twice as high as the end of forward.
    for (mut metric, current, epoch, text) in [
        (
            StepMetric::forward_memory(),
            10.0,
            15.0,
            "epoch 15.00 MiB - batch 10.00 MiB",
        ),
        (
            StepMetric::peak_memory(),
            20.0,
            40.0,
            "epoch 40.00 MiB - batch 20.00 MiB",
        ),
    ] {
        // The second epoch knows nothing of the first.
        for first in [90, 20] {
            metric.clear();
            for mebibytes in [first, 10] {
                metric
                    .update(&measure(mebibytes), &metadata())
                    .expect("nothing is read from a device");
            }
        }
        assert_eq!(metric.value().expect("updated").current(), current);
        assert_eq!(metric.running_value().expect("updated").current(), epoch);
        assert_eq!(metric.final_value().current(), epoch);
        let entry = metric.compute().expect("nothing is read from a device");
        assert_eq!(entry.formatted, text);
        assert_eq!(entry.serialized, format!("{epoch},final"));
    }
}

#[test]
fn a_tally_is_exact_over_batches_of_unequal_size() {
    let history = History::new(Vec::new());
    let mut metric = TallyMetric::train(&history);
    let mut test = TallyMetric::test(&history);
    let batches = [
        input(
            &[0.5, 1.5, 4.0],
            &[[0.9, 0.1], [0.2, 0.8], [0.7, 0.3]],
            &[0, 1, 1],
        ),
        input(&[2.0], &[[0.0, 1.0]], &[1]),
    ];
    for batch in &batches {
        metric
            .update(batch, &metadata())
            .expect("the values are on the host");
    }

    let expected = Evaluation {
        loss_sum: 8.0,
        correct: 3,
        total: 4,
    };
    assert_eq!(
        expected.to_string(),
        "Average loss: 2.0000, Accuracy: 3/4 (75%)"
    );

    metric.compute().expect("nothing is read");
    metric.clear();
    let epochs = history.epochs();
    assert_eq!(epochs.len(), 1);
    assert_eq!(epochs[0].train.evaluation, expected);
    assert_eq!(epochs[0].train.steps.len(), 2);
    assert_eq!(epochs[0].train.steps[1].evaluation.loss_sum, 2.0);
    assert!(history.finished().is_empty(), "it is not tested");
    test.update(&batches[0], &metadata())
        .expect("the values are on the host");
    test.compute().expect("nothing is read");
    assert_eq!(history.finished()[0].test.map(|test| test.total), Some(3));
    // The next pass begins anew.
    metric
        .update(&batches[1], &metadata())
        .expect("the values are on the host");
    metric.compute().expect("nothing is read");
    assert_eq!(history.epochs()[1].train.evaluation.total, 1);
    assert_eq!(history.finished().len(), 1);
}
