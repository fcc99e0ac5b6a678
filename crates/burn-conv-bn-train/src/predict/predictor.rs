//! A trained network, and its prediction for a digit.

use std::path::Path;

use anyhow::{Context, Result, anyhow, ensure};
use burn::data::dataloader::batcher::Batcher;
use burn::module::Module;
use burn::tensor::{Device, FloatDType, Tensor};
use burn_conv_bn::{NormVariant, RunningVariance};
use burn_conv_bn_models::{AnyNetwork, Net};
use burn_dataset::Dataset;
use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use crate::choice::Choice;
use crate::data::{CLASSES, DigitItem, Digits, MnistBatcher};
use crate::measure::memory::MemoryProbe;
use crate::model::forward;
use crate::persist::checkpoint::{self, Records};
use crate::run::job::{Job, Variant};

/// In which form a trained network predicts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum PredictForm {
    /// Each block one op.
    Fused,
    /// Norms folded into their convolutions. For networks that keep running statistics: all but the
    /// tutorial's.
    Folded,
    /// Burn's own convolution, batch norm and ReLU.
    Unfused,
}

#[derive(Debug)]
pub(super) struct Predictor {
    network: AnyNetwork,
    device: Device,
    activations: FloatDType,
    /// Epochs that it was trained for.
    pub(super) epoch: usize,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Prediction {
    /// The class with the highest probability, the first of several.
    pub(super) digit: u8,
    /// Logarithms of the probabilities of all classes.
    pub(super) log_probabilities: [f64; CLASSES],
}

impl Prediction {
    pub(super) fn probabilities(&self) -> [f64; CLASSES] {
        self.log_probabilities.map(f64::exp)
    }

    /// Probability of the digit, from 0 to 1.
    pub(super) fn probability(&self) -> f64 {
        self.log_probabilities[usize::from(self.digit)].exp()
    }

    /// Of a row of a network's output; none if something in it is not a number.
    fn of(row: &[f64]) -> Option<Self> {
        let log_probabilities: [f64; CLASSES] = row.try_into().ok()?;
        if log_probabilities.iter().any(|value| value.is_nan()) {
            return None;
        }
        // The last of equals counts as the greatest.
        let classes = (0..CLASSES).rev();
        let digit =
            classes.max_by(|&a, &b| log_probabilities[a].total_cmp(&log_probabilities[b]))?;
        Some(Self {
            digit: digit as u8,
            log_probabilities,
        })
    }
}

impl Predictor {
    /// Loads a checkpoint of a run of `job`: an epoch's, counted from 1, or the newest one
    /// that is complete and can be read.
    ///
    /// Given `statistics`, a network that normalizes with each batch's own statistics takes up
    /// those of these digits once and for all, and what it predicts for a digit no longer depends
    /// on the digits beside it. Other networks have statistics from their training, and keep them.
    ///
    /// # Errors
    ///
    /// If there is no such checkpoint, if it is of another network, or if the network has no such form.
    pub(super) fn load(
        job: &Job,
        directory: &Path,
        epoch: Option<usize>,
        form: PredictForm,
        statistics: Option<&Digits>,
    ) -> Result<Self> {
        let model = job.setup.model.name();
        let (records, epoch) = records(directory, epoch)?;
        let variant = match form {
            PredictForm::Unfused => Variant::Unfused,
            _ => Variant::Fused,
        };
        let classifier = job.classifier(variant, MemoryProbe::off());
        let mut classifier = classifier.restored(records.model).with_context(|| {
            let path = checkpoint::model_file(directory, epoch);
            format!("{} does not fit the model {model}", path.display())
        })?;

        let network = match (form, statistics) {
            // Folded in the parameters' type, and rounded only then.
            (PredictForm::Folded, _) => {
                classifier.net = classifier.net.folded().map_err(|error| {
                    anyhow!("the model {model} cannot be folded: {error}; use --form fused")
                })?;
                classifier.computing()
            }
            (_, None) => classifier.computing().valid(),
            (_, Some(digits)) => with_statistics(classifier.computing(), job, digits)?,
        };
        Ok(Self {
            network,
            device: job.device().without_autodiff(),
            activations: job.setup.precision.activations(),
            epoch,
        })
    }

    /// Predicts the digits of one batch, with `first` for the position of the first one in errors.
    ///
    /// # Errors
    ///
    /// If the device fails, or the network puts out something that is no number.
    pub(super) fn predict(&self, items: Vec<DigitItem>, first: usize) -> Result<Vec<Prediction>> {
        let batch = MnistBatcher::new(self.activations).batch(items, &self.device);
        let output = forward(&self.network, batch.images);
        let output = output
            .try_into_vec_as::<f64>()
            .context("cannot read from the device")?;
        let rows = output.chunks_exact(CLASSES).zip(first..);
        rows.map(|(row, index)| {
            Prediction::of(row).with_context(|| {
                format!(
                    "the network's output for digit {index} is not a number: its training has \
                     diverged"
                )
            })
        })
        .collect()
    }
}

/// The state of a training, and after which epoch it is.
fn records(directory: &Path, epoch: Option<usize>) -> Result<(Records, usize)> {
    let named = directory.display();
    let (set, damaged) = if let Some(epoch) = epoch {
        let kept = checkpoint::epochs(directory)?;
        ensure!(
            kept.contains(&epoch),
            "{named} has no complete checkpoint of epoch {epoch}, but {}",
            checkpoint::named(&kept)
        );
        (Some(checkpoint::read(directory, epoch)?), Vec::new())
    } else {
        checkpoint::newest(directory)?
    };
    // A run that has finished no epoch has a checkpoint without records.
    let found = set.and_then(|set| Some((set.records?, set.epoch)));
    found.with_context(|| {
        let damaged: String = damaged.iter().map(|(_, why)| format!("; {why}")).collect();
        format!("{named} has no complete checkpoint of a trained model{damaged}")
    })
}

/// The network in evaluation mode, with the statistics of `digits` if it has none of its own.
fn with_statistics(network: AnyNetwork, job: &Job, digits: &Digits) -> Result<AnyNetwork> {
    let AnyNetwork::Tutorial(net) = network else {
        return Ok(network.valid());
    };
    let items: Vec<DigitItem> = digits.get_many((0..digits.len()).collect())?;
    let batcher = MnistBatcher::new(job.setup.precision.activations());
    let images = batcher.batch(items, &job.device()).images;
    Ok(calibrated(net, images).into())
}

/// Takes up the statistics of `images`, which are on an autodiff device, instead of each batch's.
fn calibrated(mut net: Net, images: Tensor<4>) -> Net {
    for block in [&mut net.conv1, &mut net.conv2] {
        let settings = &mut block.settings;
        settings.track_running_stats = true;
        // Those that the norm normalizes with.
        settings.running_variance = match settings.norm_variant {
            NormVariant::Tutorial => RunningVariance::Unbiased,
            _ => RunningVariance::Biased,
        };
        // The newest batch is all that counts.
        block.norm.momentum = 1.0;
    }
    net.forward(images);
    net.valid()
}

#[cfg(test)]
mod tests;
