//! Fine-tunes a ResNet of torchvision's on folders of images, as users of torchvision do: weights from a
//! PyTorch file, another head, at first with everything but the head frozen, norms included, then all of it
//! at a lower rate.
//!
//! Without options the program draws the images, and pretrains a shallow ResNet on other drawn images,
//! which it saves and loads like a file of torchvision's.

mod data;
mod draw;

use std::fmt::Arguments;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use burn::data::dataloader::DataLoader;
use burn::lr_scheduler::constant::ConstantLr;
use burn::module::Module;
use burn::nn::LinearConfig;
use burn::nn::loss::CrossEntropyLossConfig;
use burn::optim::AdamConfig;
use burn::tensor::Device;
use burn::train::logger::InMemoryMetricLogger;
use burn::train::metric::{AccuracyMetric, LossMetric};
use burn::train::{
    ClassificationOutput, ExecutionStrategy, InferenceStep, Learner, SupervisedTraining,
    TrainOutput, TrainStep,
};
use burn_conv_bn_models::{Form, ResNet, ResNetBlockKind, ResNetConfig, weights};
use burn_conv_bn_train::renderer::LineRenderer;
use clap::{Parser, value_parser};
use data::{Batch, Images};
use stripes::say;

/// Images of a step.
const BATCH: usize = 16;

/// Fine-tune a ResNet on folders of images.
#[derive(Parser, Debug)]
struct Args {
    /// State dict of a torchvision ResNet, by torch.save or as .safetensors. Default: a shallow ResNet's,
    /// trained here on drawn images.
    #[arg(long, value_name = "FILE")]
    weights: Option<PathBuf>,
    /// Folder with the folders `train` and `val`, which have a folder of images for each class. Default:
    /// drawn images.
    #[arg(long, value_name = "FOLDER")]
    images: Option<PathBuf>,
    /// Height and width of the images for the network. From 33 on, the last layers normalize more than one
    /// pixel of an image.
    #[arg(long, default_value_t = 40, value_parser = value_parser!(u32).range(33..=512))]
    size: u32,
    /// New file for the trained network, named .safetensors: torchvision's names, which PyTorch loads.
    #[arg(long, value_name = "FILE", value_parser = new_file)]
    save: Option<PathBuf>,
    /// Epochs of each training.
    #[arg(long, default_value_t = 5, value_parser = value_parser!(u16).range(1..))]
    epochs: u16,
}

/// Refuses a file that could not be written when all is trained.
fn new_file(name: &str) -> Result<PathBuf, String> {
    let file = PathBuf::from(name);
    if file.exists() {
        return Err("it exists already".into());
    }
    if !file
        .extension()
        .is_some_and(|ending| ending.eq_ignore_ascii_case("safetensors"))
    {
        return Err("name it .safetensors".into());
    }
    let folder = file.parent().filter(|folder| *folder != Path::new(""));
    if folder.is_some_and(|folder| !folder.is_dir()) {
        return Err("its folder does not exist".into());
    }
    Ok(file)
}

#[derive(Module, Debug)]
struct Classifier {
    network: ResNet,
}

impl Classifier {
    fn classify(&self, batch: Batch) -> ClassificationOutput {
        let scores = self.network.forward(batch.images);
        let loss = CrossEntropyLossConfig::new().init(&scores.device());
        let loss = loss.forward(scores.clone(), batch.classes.clone());
        ClassificationOutput::new(loss, scores, batch.classes)
    }

    /// Share of the images that are classified right.
    fn accuracy(&self, images: &dyn DataLoader<Batch>) -> Result<f64> {
        let network = self.network.valid();
        let mut right = 0.0;
        for batch in images.iter() {
            let batch = batch?;
            let count = batch.classes.dims()[0] as f64;
            right += count * stripes::accuracy(network.forward(batch.images), batch.classes);
        }
        Ok(right / images.num_items() as f64)
    }
}

impl TrainStep for Classifier {
    type Input = Batch;
    type Output = ClassificationOutput;

    fn step(&self, batch: Batch) -> TrainOutput<ClassificationOutput> {
        let output = self.classify(batch);
        TrainOutput::new(self, output.loss.backward(), output)
    }
}

impl InferenceStep for Classifier {
    type Input = Batch;
    type Output = ClassificationOutput;

    fn step(&self, batch: Batch) -> ClassificationOutput {
        self.classify(batch)
    }
}

/// A line of progress. That nobody reads it ends no training, which would leave the temporary folder behind.
fn note(line: Arguments<'_>) {
    let _ = writeln!(io::stdout(), "{line}");
}

/// Trains by Burn's learner, at a constant rate, and returns the classifier for evaluation.
fn fit(
    classifier: Classifier,
    images: &Images,
    epochs: u16,
    rate: f64,
    device: &Device,
) -> Result<Classifier> {
    // Nothing is written there: metrics are kept in memory, and there are no checkpoints.
    let nowhere = Path::new(".");
    let training =
        SupervisedTraining::<Classifier>::new(nowhere, images.train.clone(), images.valid.clone())
            .with_training_strategy(ExecutionStrategy::single(device.clone()).into())
            .with_application_logger(None)
            .with_metric_logger(InMemoryMetricLogger::new())
            .metrics((LossMetric::new(), AccuracyMetric::new()))
            .renderer(Box::new(LineRenderer::new(0)))
            .num_epochs(epochs.into());
    let learner = Learner::new(classifier, AdamConfig::new().init(), ConstantLr::new(rate));
    let result = training.launch(learner);
    if let Some(error) = result.error {
        bail!("the training failed: {error}");
    }
    Ok(result.model)
}

/// Trains a ResNet of one block a layer on drawn images, and saves it to the folder as torchvision's are.
fn pretrain(args: &Args, folder: &Path, device: &Device) -> Result<PathBuf> {
    note(format_args!(
        "no --weights: pretraining a ResNet of one block a layer on drawn images, in place of \
         torchvision's"
    ));
    let file = folder.join("resnet.safetensors");
    let folder = folder.join("source");
    draw::folders(&folder, &draw::SOURCE, [80, 10], args.size, 1)?;
    let images = Images::open(&folder, args.size, BATCH)?;
    let network = ResNetConfig::new(Form::Fused, ResNetBlockKind::Basic, [1; 4])
        .with_classes(images.classes.len())
        .init(device);
    let trained = fit(Classifier { network }, &images, args.epochs, 1e-3, device)?;
    weights::save(&trained.network, ResNet::TO_PYTORCH_KEYS, &file)?;
    Ok(file)
}

/// Accuracies on the images for validation: with the new head, once that is trained, and once all is.
fn fine_tune(args: &Args, folder: &Path) -> Result<[f64; 3]> {
    let device = Device::flex().autodiff();
    device.seed(1);
    let file = match &args.weights {
        Some(file) => file.clone(),
        None => pretrain(args, folder, &device)?,
    };
    let folder = match &args.images {
        Some(folder) => folder.clone(),
        None => {
            note(format_args!("no --images: drawing images of four textures"));
            let folder = folder.join("target");
            draw::folders(&folder, &draw::TARGET, [40, 25], args.size, 2)?;
            folder
        }
    };
    let images = Images::open(&folder, args.size, BATCH)?;
    let valid = images.valid.to_device(&device.clone().inner());

    // Frozen norms normalize with the file's statistics and leave them alone.
    let mut network = weights::load_resnet(&file, &device)?.freeze();
    let [features, before] = network.fc.weight.dims();
    let classes = images.classes.len();
    note(format_args!(
        "a new head: {classes} classes in place of {before}"
    ));
    network.fc = LinearConfig::new(features, classes).init(&device);
    let classifier = Classifier { network };
    let new = classifier.accuracy(&*valid)?;

    note(format_args!("training the head, all else frozen:"));
    let classifier = fit(classifier, &images, args.epochs, 3e-3, &device)?;
    let head = classifier.accuracy(&*valid)?;

    note(format_args!("training all of it, norms included:"));
    let classifier = classifier.unfreeze().train();
    let classifier = fit(classifier, &images, args.epochs, 3e-4, &device)?;
    let all = classifier.accuracy(&*valid)?;
    if let Some(file) = &args.save {
        weights::save(&classifier.network, ResNet::TO_PYTORCH_KEYS, file)?;
    }
    Ok([new, head, all])
}

fn main() -> Result<()> {
    let args = Args::parse();
    let folder = tempfile::tempdir()?;
    let accuracies = fine_tune(&args, folder.path())?;
    // Removed before the last lines, which end the program if nobody reads them.
    folder.close()?;
    let moments = ["with the new head", "head trained", "all trained"];
    for (moment, accuracy) in moments.into_iter().zip(accuracies) {
        say!("accuracy, {moment}: {:.1} %", 100.0 * accuracy);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_stage_learns() {
        let folder = tempfile::tempdir().unwrap();
        let mut args = Args::parse_from(["pretrained", "--epochs", "3"]);
        let file = folder.path().join("trained.safetensors");
        args.save = Some(file.clone());
        let [new, head, all] = fine_tune(&args, folder.path()).unwrap();
        assert!(new < 0.75, "{new}");
        assert!(head > new + 0.15, "{new} then {head}");
        assert!(all > 0.8 && all > head - 0.05, "{head} then {all}");
        let saved = weights::load_resnet(&file, &Device::flex()).unwrap();
        assert_eq!(saved.fc.weight.dims()[1], draw::TARGET.len());
    }
}
