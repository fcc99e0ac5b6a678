//! A trained network, and its prediction for a digit.

use std::path::{Path, PathBuf};

use burn::data::dataloader::batcher::Batcher;
use burn::module::Module;
use burn::store::RecordError;
use burn::tensor::{Device, FloatDType, Tensor, TensorReadError};
use burn_conv_bn::{FoldError, NormVariant, RunningVariance};
use burn_conv_bn_models::{Form, Net};
use burn_dataset::{Dataset, DatasetError};
use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use super::images::FolderError;
use crate::data::{CLASSES, DigitItem, Digits, MnistBatcher};
use crate::measure::memory::MemoryProbe;
use crate::model::Network;
use crate::persist::checkpoint::{self, Damaged, listed};
use crate::persist::output::PictureFormatError;
use crate::run::job::{Job, Norm, Variant};

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

impl PredictForm {
    /// As on the command line.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Fused => "fused",
            Self::Folded => "folded",
            Self::Unfused => "unfused",
        }
    }
}

impl From<Variant> for PredictForm {
    fn from(variant: Variant) -> Self {
        match variant {
            Variant::Fused => Self::Fused,
            Variant::Unfused => Self::Unfused,
        }
    }
}

/// Why nothing can be predicted.
#[derive(Debug, thiserror::Error)]
pub(super) enum PredictError {
    /// There is no checkpoint of a finished epoch that can be read.
    #[error(
        "{} has no complete checkpoint of a trained model{}", .directory.display(),
        listed(.damaged)
    )]
    NoCheckpoint {
        /// The folder of the run.
        directory: PathBuf,
        /// Checkpoints that are there and cannot be read, the newest first.
        damaged: Vec<Damaged>,
    },
    /// There is no complete checkpoint of the epoch that was asked for.
    #[error(
        "{} has no complete checkpoint of epoch {epoch}, but {}", .directory.display(),
        checkpoint::named(.kept)
    )]
    NoEpoch {
        /// The folder of the run.
        directory: PathBuf,
        /// The epoch.
        epoch: usize,
        /// Epochs with a complete checkpoint.
        kept: Vec<usize>,
    },
    /// The folder of the checkpoints cannot be read.
    #[error("cannot read {}: {source}", .path.display())]
    Folder {
        /// The folder.
        path: PathBuf,
        /// What the system reported.
        source: std::io::Error,
    },
    /// The checkpoint is of another network than the run's.
    #[error("{} does not fit the model {model}: {source}", .path.display())]
    Checkpoint {
        /// The file.
        path: PathBuf,
        /// The network.
        model: &'static str,
        /// What does not fit.
        source: RecordError,
    },
    /// The checkpoint is of another type than the run's.
    #[error("{} is of type {found:?}, the run of type {expected:?}", .path.display())]
    CheckpointType {
        /// The file.
        path: PathBuf,
        /// The run's type.
        expected: FloatDType,
        /// The checkpoint's type.
        found: FloatDType,
    },
    /// The network cannot be folded.
    #[error("the model {model} cannot be folded: {source}; use --form fused")]
    Fold {
        /// The network.
        model: &'static str,
        /// Why.
        source: FoldError,
    },
    /// Single pictures need fixed statistics, which this form of the norm cannot take.
    #[error(
        "the unfused form of the tutorial's norm takes statistics of whole batches alone, so that it \
         cannot classify single pictures; use --form fused"
    )]
    NoFixedStatistics,
    /// The network puts out something that is no number.
    #[error("the network's output for digit {index} is not a number: its training has diverged")]
    NotANumber {
        /// Position of the digit, from 0.
        index: usize,
    },
    /// Digits could not be loaded.
    #[error("cannot load the digits: {0}")]
    Dataset(#[from] DatasetError),
    /// A result could not be read from the device.
    #[error("cannot read from the device: {0}")]
    Read(#[from] TensorReadError),
    /// The pictures' folder cannot be read.
    #[error(transparent)]
    Pictures(#[from] FolderError),
    /// A picture's file has no name that says how to store it.
    #[error(transparent)]
    PictureFormat(#[from] PictureFormatError),
}

/// A trained network, ready to predict.
#[derive(Debug)]
pub(super) struct Predictor {
    network: Network,
    device: Device,
    activations: FloatDType,
    /// Epochs that it was trained for.
    pub(super) epoch: usize,
}

/// Prediction for one digit.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Prediction {
    /// The class with the highest probability, the first of several.
    pub(super) digit: u8,
    /// Logarithms of the probabilities of all classes.
    pub(super) log_probabilities: [f64; CLASSES],
}

impl Prediction {
    /// Probabilities of all classes.
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
        let mut best = 0;
        for (digit, value) in log_probabilities.iter().enumerate() {
            if *value > log_probabilities[best] {
                best = digit;
            }
        }
        Some(Self {
            digit: best as u8,
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
    /// [`PredictError`].
    pub(super) fn load(
        job: &Job,
        directory: &Path,
        epoch: Option<usize>,
        form: PredictForm,
        statistics: Option<&Digits>,
    ) -> Result<Self, PredictError> {
        let model = job.model.name();
        let (records, epoch) = records(directory, epoch)?;
        let path = checkpoint::model_file(directory, epoch);
        let variant = match form {
            PredictForm::Fused | PredictForm::Folded => Variant::Fused,
            PredictForm::Unfused => Variant::Unfused,
        };
        let expected = job.precision.parameters();
        let mut classifier = job
            .classifier(variant, MemoryProbe::off())
            .try_load_record(records.model)
            .map_err(|source| PredictError::Checkpoint {
                path: path.clone(),
                model,
                source,
            })?;
        let found = classifier.dtype();
        if found != expected {
            return Err(PredictError::CheckpointType {
                path,
                expected,
                found,
            });
        }

        let network = match (form, statistics) {
            // Folded in the parameters' type, and rounded only then.
            (PredictForm::Folded, _) => {
                let folded = classifier.net.folded();
                classifier.net = folded.map_err(|source| PredictError::Fold { model, source })?;
                classifier.computing()
            }
            (_, None) => classifier.computing().valid(),
            (_, Some(digits)) => with_statistics(classifier.computing(), job, digits)?,
        };
        Ok(Self {
            network,
            device: job.device().without_autodiff(),
            activations: job.precision.activations(),
            epoch,
        })
    }

    /// Predicts the digits of one batch, with `first` for the position of the first one in errors.
    ///
    /// # Errors
    ///
    /// [`PredictError::Read`] or [`PredictError::NotANumber`].
    pub(super) fn predict(
        &self,
        items: Vec<DigitItem>,
        first: usize,
    ) -> Result<Vec<Prediction>, PredictError> {
        let batch = MnistBatcher::new(self.activations).batch(items, &self.device);
        let output = self
            .network
            .forward(batch.images)
            .try_into_vec_as::<f64>()?;
        output
            .chunks_exact(CLASSES)
            .zip(first..)
            .map(|(row, index)| Prediction::of(row).ok_or(PredictError::NotANumber { index }))
            .collect()
    }
}

/// The state of a training, and after which epoch it is.
fn records(
    directory: &Path,
    epoch: Option<usize>,
) -> Result<(checkpoint::Records, usize), PredictError> {
    let folder = |source| PredictError::Folder {
        path: checkpoint::folder(directory),
        source,
    };
    if let Some(epoch) = epoch {
        let kept = checkpoint::epochs(directory).map_err(folder)?;
        if !kept.contains(&epoch) {
            return Err(PredictError::NoEpoch {
                directory: directory.to_path_buf(),
                epoch,
                kept,
            });
        }
    }
    let (set, damaged) = match epoch {
        None => checkpoint::newest(directory).map_err(folder)?,
        Some(epoch) => match checkpoint::read(directory, epoch) {
            Ok(set) => (Some(set), Vec::new()),
            Err(damaged) => (None, vec![damaged]),
        },
    };
    // A run that has finished no epoch has a checkpoint without records.
    let found = set.and_then(|set| Some((set.records?, set.epoch)));
    found.ok_or_else(|| PredictError::NoCheckpoint {
        directory: directory.to_path_buf(),
        damaged,
    })
}

/// The network in evaluation mode, with the statistics of `digits` if it has none of its own.
fn with_statistics(network: Network, job: &Job, digits: &Digits) -> Result<Network, PredictError> {
    let Network::Tutorial(net) = network else {
        return Ok(network.valid());
    };
    if net.form() == Form::Unfused && job.norm == Norm::Tutorial {
        return Err(PredictError::NoFixedStatistics);
    }
    let items: Vec<DigitItem> = digits.get_many((0..digits.len()).collect())?;
    let images = MnistBatcher::new(job.precision.activations())
        .batch(items, &job.device())
        .images;
    Ok(Network::Tutorial(calibrated(net, images)))
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
