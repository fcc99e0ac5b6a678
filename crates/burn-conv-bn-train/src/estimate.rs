//! What a job will take, from a step on a few digits.

use std::time::{Duration, Instant};

use burn::data::dataloader::batcher::Batcher;
use burn::data::dataset::Dataset;
use burn::module::Module;
use burn::tensor::Device;
use burn::train::{InferenceStep, TrainStep};
use burn_conv_bn_memory::CountingAllocator;

use crate::batch::{DigitItem, MnistBatch, MnistBatcher};
use crate::data::MnistData;
use crate::job::{Job, Variant};
use crate::memory::MemoryProbe;

/// Digits of the step that is measured.
const SAMPLE: usize = 64;

/// What one variant will take, by a measured step on a few digits and in proportion.
///
/// [`Job`] has an example.
#[derive(Clone, Copy, Debug)]
pub struct Estimate {
    /// Time for training and testing, all epochs.
    pub duration: Duration,
    /// Most bytes of a training step.
    pub peak_bytes: usize,
}

/// Estimates one variant of a job.
///
/// Costs two small steps and a test of as many digits.
///
/// # Panics
///
/// If the network cannot be trained on so few digits; see [`Job::check_digits`].
///
/// # Examples
///
/// [`Job`] has one.
pub fn estimate(
    job: &Job,
    variant: Variant,
    data: &MnistData,
    allocator: &'static CountingAllocator,
) -> Estimate {
    let sample = SAMPLE.min(data.train.len()).min(job.batch_size);
    let items: Vec<DigitItem> = (0..sample).filter_map(|i| data.train.get(i).ok()).collect();
    let batcher = MnistBatcher::new(job.precision.activations());
    let batch = |device: &Device| -> MnistBatch { batcher.batch(items.clone(), device) };

    let device = job.device();
    let classifier = job.classifier(variant, MemoryProbe::of(&device, allocator));
    // The first step pays for what is set up once.
    let mut step = None;
    for _ in 0..2 {
        step = Some(TrainStep::step(&classifier, batch(&device)).item.measure);
    }
    let started = Instant::now();
    InferenceStep::step(&classifier.valid(), batch(&device.without_autodiff()));
    let test = started.elapsed();

    let measure = step.expect("two steps were made");
    let times = |count: usize| count as f64 / sample as f64;
    let epoch =
        measure.duration.mul_f64(times(data.train.len())) + test.mul_f64(times(data.test.len()));
    let fixed = classifier.fixed_bytes().min(measure.memory.peak_bytes);
    let growing = (measure.memory.peak_bytes - fixed) as f64;
    let batch = job.batch_size.min(data.train.len());
    Estimate {
        duration: epoch.mul_f64(job.epochs as f64),
        peak_bytes: fixed + (growing * times(batch)) as usize,
    }
}
