//! Trains on several devices at once, through Burn's own strategies.
//!
//! Each device takes a part of every step with the same weights. `main` gathers the gradients on the
//! first device, `sharded` spreads the optimizer over all of them, and `all-reduce` exchanges the
//! gradients among CUDA devices. The layer needs nothing of its own for it; each device normalizes
//! with the statistics of its own part, as Burn's batch norm does.

use std::io::Write;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Result, bail, ensure};
use burn::data::dataloader::batcher::Batcher;
use burn::data::dataloader::{DataLoader, DataLoaderBuilder};
use burn::data::dataset::InMemDataset;
use burn::lr_scheduler::constant::ConstantLr;
use burn::module::Module;
use burn::nn::loss::CrossEntropyLossConfig;
use burn::nn::{Linear, LinearConfig};
use burn::optim::AdamConfig;
use burn::tensor::{Device, Int, Tensor};
use burn::train::metric::LossMetric;
use burn::train::{
    ClassificationOutput, ExecutionStrategy, InferenceStep, Learner, MultiDeviceOptim,
    SupervisedTraining, TrainOutput, TrainStep,
};
use burn_conv_bn::{Activation, ConvBn2d, ConvBn2dConfig};
use burn_conv_bn_train::renderer::LineRenderer;
use clap::{Parser, ValueEnum};
use stripes::{CLASSES, say};

const CHANNELS: usize = 16;

/// Train on several devices.
#[derive(Parser, Debug)]
struct Args {
    /// Number of devices. On the CPU each is a thread that takes its part.
    #[arg(long, default_value_t = 2)]
    devices: usize,
    /// How they work together.
    #[arg(long, value_enum, default_value = "main")]
    strategy: Strategy,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Strategy {
    /// The first device gathers the gradients and optimizes.
    Main,
    /// Each device optimizes a part of the parameters.
    Sharded,
    /// The devices exchange their gradients; on CUDA alone.
    AllReduce,
}

#[derive(Module, Debug)]
struct Network {
    block1: ConvBn2d,
    block2: ConvBn2d,
    head: Linear,
}

impl Network {
    fn new(device: &Device) -> Self {
        let block = |channels| {
            ConvBn2dConfig::new(channels, [3, 3])
                .with_activation(Activation::Relu)
                .init(device)
        };
        Self {
            block1: block([1, CHANNELS]),
            block2: block([CHANNELS, CHANNELS]),
            head: LinearConfig::new(CHANNELS, CLASSES).init(device),
        }
    }

    fn forward(&self, images: Tensor<4>) -> Tensor<2> {
        let x = self.block2.forward(self.block1.forward(images));
        self.head
            .forward(x.mean_dims(&[2, 3]).squeeze_dims(&[2, 3]))
    }

    fn classify(&self, batch: Batch) -> ClassificationOutput {
        let scores = self.forward(batch.images);
        let loss = CrossEntropyLossConfig::new().init(&scores.device());
        let loss = loss.forward(scores.clone(), batch.classes.clone());
        ClassificationOutput::new(loss, scores, batch.classes)
    }
}

/// A part of a step's images.
#[derive(Clone, Debug)]
struct Batch {
    images: Tensor<4>,
    classes: Tensor<1, Int>,
}

#[derive(Clone)]
struct StripesBatcher;

impl Batcher<stripes::Example, Batch> for StripesBatcher {
    fn batch(&self, items: Vec<stripes::Example>, device: &Device) -> Batch {
        let (images, classes) = stripes::batch(&items, device);
        Batch { images, classes }
    }
}

impl TrainStep for Network {
    type Input = Batch;
    type Output = ClassificationOutput;

    fn step(&self, batch: Batch) -> TrainOutput<ClassificationOutput> {
        let output = self.classify(batch);
        TrainOutput::new(self, output.loss.backward(), output)
    }
}

impl InferenceStep for Network {
    type Input = Batch;
    type Output = ClassificationOutput;

    fn step(&self, batch: Batch) -> ClassificationOutput {
        self.classify(batch)
    }
}

fn devices(count: usize) -> Vec<Device> {
    #[cfg(feature = "cuda")]
    let device = |index| Device::cuda(index);
    #[cfg(not(feature = "cuda"))]
    let device = |_| Device::flex();
    (0..count).map(|index| device(index).autodiff()).collect()
}

fn execution(strategy: Strategy, devices: Vec<Device>) -> Result<ExecutionStrategy> {
    Ok(match strategy {
        Strategy::Main => ExecutionStrategy::multi(devices, MultiDeviceOptim::OptimMainDevice),
        Strategy::Sharded => ExecutionStrategy::multi(devices, MultiDeviceOptim::OptimSharded),
        #[cfg(feature = "cuda")]
        Strategy::AllReduce => {
            use burn::tensor::distributed::{DistributedConfig, ReduceOperation};
            let config = DistributedConfig {
                all_reduce_op: ReduceOperation::Mean,
            };
            ExecutionStrategy::ddp(devices, config)
        }
        #[cfg(not(feature = "cuda"))]
        Strategy::AllReduce => bail!(
            "all-reduce is for CUDA devices, and these are {:?}; build with --features cuda, or \
             choose --strategy main or sharded",
            devices[0]
        ),
    })
}

/// Trains an epoch, with logs in that folder and lines of progress to `out`, and returns the accuracy
/// on images not seen.
fn train(args: &Args, folder: &Path, out: impl Write + Send + Sync + 'static) -> Result<f64> {
    ensure!(args.devices > 0, "at least one device, got --devices 0");
    let devices = devices(args.devices);
    let first = devices[0].clone();
    first.seed(1);
    let loader = |count, seed| -> Arc<dyn DataLoader<Batch>> {
        DataLoaderBuilder::new(StripesBatcher)
            .batch_size(32)
            .shuffle(seed)
            .build(InMemDataset::new(stripes::examples(count, seed)))
    };
    let training = SupervisedTraining::new(folder, loader(4096, 1), loader(256, 2))
        .with_training_strategy(execution(args.strategy, devices)?.into())
        .metrics((LossMetric::new(),))
        .renderer(Box::new(
            LineRenderer::with_output(out, 16).with_last_line(),
        ))
        .num_epochs(1);
    let learner = Learner::new(
        Network::new(&first),
        AdamConfig::new().init(),
        ConstantLr::new(5e-3),
    );
    let result = training.launch(learner);
    if let Some(error) = result.error {
        bail!("the training failed: {error}");
    }
    let (images, classes) = stripes::batch(&stripes::examples(512, 3), &first.inner());
    Ok(stripes::accuracy(
        result.model.valid().forward(images),
        classes,
    ))
}

fn main() -> Result<()> {
    let args = Args::parse();
    #[cfg(feature = "cuda")]
    let _tuning = burn_conv_bn_train::tuning::print_tuning();
    let folder = tempfile::tempdir()?;
    let accuracy = train(&args, folder.path(), std::io::stdout())?;
    // Removed before the last line, which ends the program if nobody reads it.
    folder.close()?;
    say!(
        "accuracy on images that it has not seen, after training on {} devices: {:.1} %",
        args.devices,
        100.0 * accuracy
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    use std::io;
    use std::sync::{Mutex, PoisonError};

    /// A text that the renderer writes and the test reads.
    #[derive(Clone, Default)]
    struct Text(Arc<Mutex<Vec<u8>>>);

    impl Write for Text {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let mut text = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            text.write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn progress_ends_at_all_images() {
        for devices in [2, 7] {
            let folder = tempfile::tempdir().unwrap();
            let args = Args {
                devices,
                strategy: Strategy::Main,
            };
            let text = Text::default();
            train(&args, folder.path(), text.clone()).unwrap();
            let text = String::from_utf8(text.0.lock().unwrap().clone()).unwrap();
            let percents: Vec<u32> = text
                .lines()
                .filter_map(|line| line.split_once(" (")?.1.split_once("%)"))
                .map(|(percent, _)| percent.parse().unwrap())
                .collect();
            assert!(percents.len() > 1 && percents.is_sorted(), "{text}");
            assert_eq!(percents.last(), Some(&100), "{text}");
        }
    }

    #[test]
    fn two_devices_learn() {
        for strategy in [Strategy::Main, Strategy::Sharded] {
            let folder = tempfile::tempdir().unwrap();
            let args = Args {
                devices: 2,
                strategy,
            };
            let accuracy = train(&args, folder.path(), io::sink()).unwrap();
            assert!(accuracy > 0.8, "{strategy:?}: {accuracy}");
        }
    }

    #[cfg(not(feature = "cuda"))]
    #[test]
    fn all_reduce_elsewhere_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let args = Args {
            devices: 2,
            strategy: Strategy::AllReduce,
        };
        let error = train(&args, folder.path(), io::sink())
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("CUDA") && error.contains("sharded"),
            "{error}"
        );
    }
}
