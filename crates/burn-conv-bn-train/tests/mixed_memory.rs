//! What a training step in mixed precision keeps for its backward pass, counted by the allocator.
//!
//! One test, so that no other allocates at the same time.

use burn::data::dataloader::batcher::Batcher;
use burn::train::TrainStep;
use burn_conv_bn_memory::CountingAllocator;
use burn_conv_bn_train::data::{DigitItem, MnistBatcher, generate};
use burn_conv_bn_train::job::{Job, Precision, Variant};
use burn_conv_bn_train::memory::MemoryProbe;
use burn_conv_bn_train::model::ModelChoice;
use burn_dataset::Dataset;
use serde_json::json;

#[global_allocator]
static ALLOCATOR: CountingAllocator = CountingAllocator::new();

/// Digits more in the second run than in the first. What does not depend on their number, graph
/// nodes, casts of weights and what belongs to channels, comes out of the difference.
const MORE: usize = 8;

/// What tables may grow by meanwhile.
const OVERHEAD: usize = 48 << 10;

fn job(model: ModelChoice, precision: Precision, batch_size: usize) -> Job {
    serde_json::from_value(json!({
        "epochs": 1, "model": model, "norm": "burn", "optimizer": "sgd", "batch-size": batch_size,
        "dataset": "synthetic", "no-download": true, "seed": 1, "device": "flex", "precision": precision,
        "recompute": "conv",
    }))
    .unwrap()
}

/// Bytes at the end of forward, above the level before it.
fn kept(job: &Job, variant: Variant) -> usize {
    let classifier = job.classifier(variant, MemoryProbe::host(&ALLOCATOR));
    let digits = generate(job.setup.batch_size, 5);
    let items: Vec<DigitItem> = digits
        .get_many((0..job.setup.batch_size).collect())
        .unwrap();
    let batch = MnistBatcher::new(classifier.activations()).batch(items, &job.device());
    // The first run pays for running statistics, and any may for what a thread keeps from then on:
    // the least is without. The batch stays, though a network that pads it lets it go.
    let runs = (0..3).map(|_| {
        let output = TrainStep::step(&classifier, batch.clone());
        output.item.measure.unwrap().memory.forward_end_bytes
    });
    runs.min().unwrap_or_default()
}

/// Of `MORE` digits.
fn more(bytes: impl Fn(usize) -> usize) -> usize {
    bytes(2 * MORE).saturating_sub(bytes(MORE))
}

#[track_caller]
fn assert_bytes(what: &str, got: usize, listed: usize) {
    println!("{what}: {got} bytes for {MORE} digits more, {listed} listed");
    assert!(
        got.abs_diff(listed) < OVERHEAD,
        "{what}: got {got} bytes, {listed} are listed"
    );
}

#[test]
fn activations_are_kept_in_half() {
    for precision in [Precision::F16, Precision::BF16] {
        fused_blocks_keep_their_inputs_in_half(precision);
        unfused_blocks_keep_less_than_in_single_precision(precision);
    }
}

fn fused_blocks_keep_their_inputs_in_half(precision: Precision) {
    let job = |digits| job(ModelChoice::MobilenetV2, precision, digits);
    let got = more(|digits| kept(&job(digits), Variant::Fused));
    let listed = more(|digits| job(digits).saved_bytes(Variant::Fused));
    assert_bytes(&format!("fused, {precision:?}"), got, listed);
}

/// The tutorial's network in Burn's own layers, whose norms' inputs stay in f32.
fn unfused_blocks_keep_less_than_in_single_precision(precision: Precision) {
    let job = |precision, digits| job(ModelChoice::Tutorial, precision, digits);
    let [single, half] = [Precision::F32, precision].map(|precision| {
        let got = more(|digits| kept(&job(precision, digits), Variant::Unfused));
        let listed = more(|digits| job(precision, digits).saved_bytes(Variant::Unfused));
        assert_bytes(&format!("unfused, {precision:?}"), got, listed);
        got
    });
    // The same but for two of four bytes of ReLU's input and output, and of the second block's input.
    let values = MORE * (2 * 32 * 26 * 26 + 2 * 64 * 24 * 24);
    assert_bytes(
        &format!("unfused, F32 above {precision:?}"),
        single.saturating_sub(half),
        2 * values,
    );
}
