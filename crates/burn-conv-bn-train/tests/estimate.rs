//! The estimate before a run, held against a step of the whole batch.
//!
//! One test, so that no other allocates at the same time.

use burn::data::dataloader::batcher::Batcher;
use burn::train::TrainStep;
use burn_conv_bn_memory::CountingAllocator;
use burn_conv_bn_train::data::MnistBatcher;
use burn_conv_bn_train::estimate::estimate;
use burn_conv_bn_train::job::{Job, Variant};
use burn_conv_bn_train::memory::MemoryProbe;
use burn_dataset::Dataset;
use serde_json::json;

#[global_allocator]
static ALLOCATOR: CountingAllocator = CountingAllocator::new();

#[test]
fn the_estimated_peak_is_that_of_a_step() {
    // One that is measured as a whole, and one that is more than the largest sample.
    for batch_size in [96, 1024] {
        let job: Job = serde_json::from_value(json!({
            "epochs": 1, "model": "tutorial", "norm": "burn", "optimizer": "adadelta", "lr": 1.0, "dropout": 0.5,
            "batch-size": batch_size, "dataset": "synthetic", "no-download": true, "seed": 1,
            "train-limit": batch_size, "test-limit": 8, "device": "flex", "precision": "f32", "recompute": "conv",
        }))
        .unwrap();
        let data = job.data().unwrap();
        let items = data.train.get_many((0..batch_size).collect()).unwrap();
        for variant in [Variant::Fused, Variant::Unfused] {
            let estimated = estimate(&job, variant, &data, &ALLOCATOR).peak_bytes;

            let device = job.device();
            let classifier = job.classifier(variant, MemoryProbe::of(&device, &ALLOCATOR));
            let batcher = MnistBatcher::new(classifier.activations());
            // The first step pays for what is set up once.
            let [_, measured] = [(); 2].map(|()| {
                let batch = batcher.batch(items.clone(), &device);
                let step = TrainStep::step(&classifier, batch);
                step.item.measure.unwrap().memory.peak_bytes
            });
            let what = format!("{variant:?} of {batch_size}: {estimated} for {measured} bytes");
            println!("{what}");
            assert!(estimated.abs_diff(measured) < measured / 10, "{what}");
        }
    }
}
