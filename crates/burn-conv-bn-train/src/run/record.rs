//! The memory of one training step, recorded over time.

use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use burn::data::dataloader::batcher::Batcher;
use burn_conv_bn_memory::CountingAllocator;
use burn_dataset::{Dataset, DatasetError};

use crate::data::{DigitItem, MnistBatcher, MnistData};
use crate::measure::memory::MemoryProbe;
use crate::measure::timeline::{Point, Timeline};
use crate::run::job::{Job, Variant};

/// Time between two points.
const PERIOD: Duration = Duration::from_millis(1);

/// Points for which there is room from the start, so that writing them down is not measured: a
/// minute's.
const ROOM: usize = 60_000;

/// Records the memory of a training step on the first digits of `data`, of the size of a batch.
///
/// The step is the second of two: the first sets up what is set up once, as the optimizer's state. On the
/// host no peak is missed. A device's pool is read once a millisecond.
///
/// # Errors
///
/// If the data cannot be read.
pub(crate) fn record(
    job: &Job,
    variant: Variant,
    data: &MnistData,
    allocator: &'static CountingAllocator,
) -> Result<Timeline, DatasetError> {
    let device = job.device();
    let count = job.setup.batch_size.min(data.train.len());
    let items: Vec<DigitItem> = data.train.get_many((0..count).collect())?;
    let batcher = MnistBatcher::new(job.setup.precision.activations());
    let probe = MemoryProbe::of(&device, allocator);
    let mut classifier = job.classifier(variant, MemoryProbe::off());
    let mut optimizer = job.setup.optimizer.init();
    let mut timeline = Timeline::default();
    for _ in 0..2 {
        let batch = batcher.batch(items.clone(), &device);
        (timeline, classifier) = watch(&probe, |now| {
            let loss = classifier.classify(batch).loss.mean();
            let forward_end = now();
            let gradients = classifier.gradients(loss);
            let backward_end = now();
            let classifier = optimizer.step(job.setup.learning_rate(), classifier, gradients);
            ([forward_end, backward_end, now()], classifier)
        });
    }
    Ok(timeline)
}

/// Records while `step` runs. `step` returns the ends of its phases by the given clock: seconds since the
/// start, read when the device is done.
fn watch<R>(
    probe: &MemoryProbe,
    step: impl FnOnce(&dyn Fn() -> f64) -> ([f64; 3], R),
) -> (Timeline, R) {
    let mut points = Vec::with_capacity(ROOM);
    let (done, ended) = channel::<()>();
    let watcher = probe.clone();
    let level = probe.level();
    probe.take_peak();
    let started = Instant::now();
    thread::scope(|scope| {
        let watching = scope.spawn(move || {
            loop {
                // The end comes as the other side's being dropped, also where the step panicked.
                let over = ended.recv_timeout(PERIOD) != Err(RecvTimeoutError::Timeout);
                points.push(Point {
                    seconds: started.elapsed().as_secs_f64(),
                    bytes: watcher.take_peak().saturating_sub(level),
                });
                if over {
                    return points;
                }
            }
        });
        let ([forward_end, backward_end, optimizer_end], result) = step(&|| {
            probe.level();
            started.elapsed().as_secs_f64()
        });
        drop(done);
        let points = watching.join().expect("the watcher does not panic");
        let timeline = Timeline {
            points,
            forward_end,
            backward_end,
            optimizer_end,
        };
        (timeline, result)
    })
}
