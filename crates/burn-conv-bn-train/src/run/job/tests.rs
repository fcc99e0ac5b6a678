use super::*;

use crate::data::DatasetChoice;

/// A job on drawn digits.
pub(crate) fn job(epochs: usize, batch_size: usize) -> Job {
    Job {
        epochs,
        setup: Setup {
            model: ModelChoice::Tutorial,
            norm: Norm::Burn,
            optimizer: OptimizerChoice::Adadelta,
            lr: None,
            batch_size,
            data: DataRequest {
                dataset: DatasetChoice::Synthetic,
                train_limit: Some(64),
                seed: 1,
                ..DataRequest::default()
            },
            device: DeviceChoice::Flex,
            precision: Precision::F32,
            threads: None,
            recompute: RecomputePolicy::Conv,
            max_workspace: None,
        },
        learning: Learning {
            dropout: Some(0.5),
            gamma: 0.7,
            test_limit: Some(32),
            log_interval: 0,
        },
    }
}

/// The same of a network and a precision, without dropout.
pub(crate) fn job_of(model: ModelChoice, precision: Precision, batch_size: usize) -> Job {
    let mut job = job(1, batch_size);
    job.setup.model = model;
    job.setup.precision = precision;
    job.learning.dropout = None;
    job
}

/// Bytes of the tutorial's network for a batch of two, with activations of `size` bytes.
fn saved_by_tutorial(size: usize) -> [usize; 2] {
    let [first, second] = [2 * 32 * 26 * 26, 2 * 64 * 24 * 24];
    let pooled = second / 4;
    let statistics = 2 * (32 + 64) * size.max(4);
    // The linear layers stay in f32 where the blocks are in half: dropout's draws, ReLU's input, the
    // second one's, and log-softmax's two.
    let wide = size.max(4);
    let head = wide * 2 * (3 * 128 + 10 + 1);
    let cast = if size < wide { wide * pooled } else { 0 };
    let fused = size * (first + pooled) + pooled;
    // Batch norm's input is in f32 in Burn's own layers. Indices have 32 bits.
    let unfused = (wide + 2 * size) * first + (wide + 2 * size) * second + 4 * pooled;
    let handle = if cast == 0 { size * pooled } else { 0 };
    [fused, unfused + handle].map(|blocks| blocks + statistics + head + cast)
}

#[test]
fn what_is_saved_is_listed_in_every_precision() {
    for (precision, size) in [
        (Precision::F16, 2),
        (Precision::BF16, 2),
        (Precision::F32, 4),
        (Precision::F64, 8),
    ] {
        let mut job = job(1, 2);
        job.setup.precision = precision;
        let saved = [Variant::Fused, Variant::Unfused].map(|variant| job.saved_bytes(variant));
        assert_eq!(saved, saved_by_tutorial(size), "{precision:?}");
    }
}

#[test]
fn what_the_images_of_a_padded_network_take_is_counted() {
    let job = job_of(ModelChoice::Resnet18, Precision::F32, 2);
    job.check().expect("there is such a network");
    let [fused, unfused] =
        [Variant::Fused, Variant::Unfused].map(|variant| job.saved_bytes(variant));
    assert!(
        2 * 32 * 32 * 4 < fused && fused < unfused,
        "{fused}, {unfused}"
    );
}

#[test]
fn an_epoch_has_the_last_steps_too() {
    let job = job(1, 32);
    assert_eq!([64, 65, 1].map(|digits| job.steps(digits)), [2, 3, 1]);
}
