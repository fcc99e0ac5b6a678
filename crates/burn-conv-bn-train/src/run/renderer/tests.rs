use super::*;

use std::sync::Arc;

use burn::train::metric::{AccuracyMetric, LossMetric, Metric, MetricEntry, SerializedEntry};

fn id<M: Metric>(metric: &M) -> MetricId {
    MetricId::new(metric.name())
}

fn state(id: &MetricId, value: NumericEntry) -> MetricState {
    let text = SerializedEntry::new(String::new(), value.serialize());
    MetricState::Numeric(MetricEntry::new(id.clone(), text), Some(value))
}

fn batch(value: f64) -> NumericEntry {
    NumericEntry::Aggregated {
        aggregated_value: value,
        count: 2048,
    }
}

/// A renderer that knows Burn's loss and accuracy and has started `epochs` epochs.
fn renderer(log_interval: usize, epochs: usize) -> LineRenderer<Vec<u8>> {
    let mut renderer = LineRenderer::with_output(Vec::new(), log_interval);
    let (loss, accuracy) = (LossMetric::new(), AccuracyMetric::new());
    renderer.register_metric(MetricDefinition::new(id(&loss), &loss));
    renderer.register_metric(MetricDefinition::new(id(&accuracy), &accuracy));
    renderer.start(epochs, 1, None, None);
    renderer
}

/// Trains one epoch, `losses` being those of the batches.
fn train(renderer: &mut LineRenderer<Vec<u8>>, items: usize, losses: &[f64]) {
    let (loss, accuracy) = (id(&LossMetric::new()), id(&AccuracyMetric::new()));
    renderer.start_split("train", items);
    for (index, &value) in losses.iter().enumerate() {
        renderer.update_train(state(&accuracy, batch(50.0)));
        renderer.update_train(state(&loss, batch(value)));
        renderer.update_split(items.min((index + 1) * 2048));
    }
    renderer.update_train(state(&loss, NumericEntry::Final(1.25)));
    renderer.end_split();
}

fn output(renderer: LineRenderer<Vec<u8>>) -> String {
    String::from_utf8(renderer.out).expect("lines are text")
}

#[test]
fn prints_the_lines_of_the_tutorial() {
    let mut renderer = renderer(2, 1);
    let losses: Vec<f64> = (0..30).map(f64::from).collect();
    train(&mut renderer, 60_000, &losses);

    let output = output(renderer);
    let lines: Vec<&str> = output.lines().collect();
    assert_eq!(lines.len(), 15);
    assert_eq!(lines[0], "Train Epoch: 1 [0/60000 (0%)]\tLoss: 0.000000");
    assert_eq!(lines[1], "Train Epoch: 1 [4096/60000 (7%)]\tLoss: 2.000000");
    assert_eq!(
        lines[14],
        "Train Epoch: 1 [57344/60000 (93%)]\tLoss: 28.000000"
    );
}

#[test]
fn devices_that_share_steps_end_at_all_items() {
    for devices in [1, 2, 7] {
        let mut renderer = renderer(1, 1).with_last_line();
        let loss = id(&LossMetric::new());
        renderer.start_split("train", 4096);
        let step = 32 * devices;
        for items in (0..4096_usize).step_by(step) {
            for _ in 0..devices {
                renderer.update_train(state(&loss, batch(1.0)));
                renderer.update_split(4096.min(items + step));
            }
        }
        renderer.end_split();
        let output = output(renderer);
        let lines: Vec<&str> = output.lines().collect();
        assert_eq!(lines.len(), 4096_usize.div_ceil(step) + 1);
        assert_eq!(lines[0], "Train Epoch: 1 [0/4096 (0%)]\tLoss: 1.000000");
        let percents: Vec<u32> = lines
            .iter()
            .map(|line| {
                let (_, rest) = line.split_once('(').unwrap();
                rest.split_once('%').unwrap().0.parse().unwrap()
            })
            .collect();
        assert!(percents.is_sorted(), "{percents:?}");
        assert!(percents[percents.len() - 2] < 100, "{percents:?}");
        assert_eq!(*lines.last().unwrap(), "Train Epoch: 1 [4096/4096 (100%)]");
    }
}

#[test]
fn sums_up_every_epoch() {
    let mut renderer = renderer(0, 2);
    let (loss, accuracy) = (id(&LossMetric::new()), id(&AccuracyMetric::new()));
    for epoch in 1..=2 {
        train(&mut renderer, 4096, &[3.0, 2.0]);
        renderer.start_split("valid", 100);
        renderer.update_valid(state(&loss, batch(0.5)));
        renderer.update_split(100);
        renderer.update_valid(state(&accuracy, NumericEntry::Final(87.5)));
        renderer.end_split();
        renderer.update_epoch(epoch);
    }

    assert_eq!(
        output(renderer),
        "Epoch 1/2: train Loss 1.2500; test Accuracy 87.5000 %\n\
         Epoch 2/2: train Loss 1.2500; test Accuracy 87.5000 %\n"
    );
}

#[test]
fn counts_on_from_a_resumed_epoch() {
    let mut renderer = renderer(1, 5);
    renderer.start(5, 4, None, None);
    train(&mut renderer, 2048, &[1.5]);
    assert_eq!(
        output(renderer),
        "Train Epoch: 4 [0/2048 (0%)]\tLoss: 1.500000\n"
    );
}

#[test]
fn survives_a_closed_pipe() {
    struct Closed;
    impl Write for Closed {
        fn write(&mut self, _: &[u8]) -> std::io::Result<usize> {
            Err(std::io::ErrorKind::BrokenPipe.into())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Err(std::io::ErrorKind::BrokenPipe.into())
        }
    }
    let mut renderer = LineRenderer::with_output(Closed, 1);
    renderer.line(format_args!("lost"));
    let _: Arc<dyn MetricsRenderer> = Arc::new(renderer);
}
