//! Estimates of a job's time and memory, from steps on its first digits.

use std::time::{Duration, Instant};

use burn::data::dataloader::batcher::Batcher;
use burn::module::Module;
use burn::tensor::Device;
use burn::train::{InferenceStep, TrainStep};
use burn_conv_bn_memory::CountingAllocator;
use burn_dataset::Dataset;

use crate::data::{DigitItem, MnistBatch, MnistBatcher, MnistData};
use crate::device::DeviceChoice;
use crate::measure::memory::MemoryProbe;
use crate::run::job::{Job, Variant};

/// Most digits of a measured step. Scratch that grows with small batches is at its full size by half of it.
const SAMPLE: usize = 512;

/// Most bytes of a recomputed output that Flex stores, by
/// [`ConvBnOptions::max_workspace`](burn_conv_bn::ConvBnOptions::max_workspace).
const LARGEST_STORED: usize = 128 << 20;

/// Time and memory of one variant, from a measured step of a whole batch, or of a few hundred digits and in
/// proportion.
#[derive(Clone, Copy, Debug)]
pub struct Estimate {
    /// Time for training and testing, all epochs.
    pub duration: Duration,
    /// Most bytes of a training step.
    pub peak_bytes: usize,
}

/// Estimates one variant of a job.
///
/// Costs three steps of a batch, of up to 512 digits, and a test of as many. The peak of a larger batch is
/// on the line through those of 256 and 512: parameters' gradients and scratch do not grow with the batch.
///
/// # Panics
///
/// If the network cannot be trained on so few digits.
pub fn estimate(
    job: &Job,
    variant: Variant,
    data: &MnistData,
    allocator: &'static CountingAllocator,
) -> Estimate {
    let batch = job.setup.batch_size.min(data.train.len());
    let sample = SAMPLE.min(batch);
    let items: Vec<DigitItem> = (0..sample).filter_map(|i| data.train.get(i).ok()).collect();
    let batcher = MnistBatcher::new(job.setup.precision.activations());
    let digits = |count: usize, device: &Device| -> MnistBatch {
        batcher.batch(items.iter().take(count).cloned().collect(), device)
    };

    let device = job.device();
    let mut sampled = job.clone();
    // It bounds what is stored of a batch: as much for each digit.
    sampled.setup.max_workspace = workspace(job).map(|bytes| bytes / batch * sample);
    let classifier = sampled.classifier(variant, MemoryProbe::of(&device, allocator));
    let step = |count| {
        let step = TrainStep::step(&classifier, digits(count, &device));
        step.item.measure.expect("a training step is measured")
    };
    // The first step pays for what is set up once.
    let first = if sample < batch { sample / 2 } else { sample };
    step(first);
    let [less, measure] = [first, sample].map(step);
    let started = Instant::now();
    InferenceStep::step(
        &classifier.valid(),
        digits(sample, &device.without_autodiff()),
    );
    let test = started.elapsed();

    let times = |count: usize| count as f64 / sample as f64;
    let epoch =
        measure.duration.mul_f64(times(data.train.len())) + test.mul_f64(times(data.test.len()));
    let peak = measure.memory.peak_bytes;
    Estimate {
        duration: epoch.mul_f64(job.epochs as f64),
        peak_bytes: match sample - first {
            0 => peak,
            more => {
                let growth = peak.saturating_sub(less.memory.peak_bytes);
                peak + (growth as f64 * (batch - sample) as f64 / more as f64) as usize
            }
        },
    }
}

/// The bound on the workspace of a whole batch, Flex's own included.
fn workspace(job: &Job) -> Option<usize> {
    let own = (job.setup.device == DeviceChoice::Flex).then_some(LARGEST_STORED);
    own.into_iter().chain(job.setup.max_workspace).min()
}
