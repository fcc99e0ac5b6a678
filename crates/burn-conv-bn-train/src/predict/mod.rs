//! What a trained network makes of digits: those of the test set, and pictures in a folder.

mod folded;
mod font;
pub mod images;
pub mod mistakes;

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use burn::data::dataloader::batcher::Batcher;
use burn::data::dataset::{Dataset, DatasetError};
use burn::module::Module;
use burn::store::RecordError;
use burn::tensor::{Device, FloatDType, Tensor, TensorReadError};
use burn::train::Interrupter;
use burn_conv_bn::{FoldError, NormVariant, RunningVariance};
use burn_conv_bn_models::{Form, Net};
use clap::ValueEnum;
use serde::{Deserialize, Serialize};

pub use folded::FoldedNetwork;

use crate::data::{
    CLASSES, DataRequest, DigitItem, Digits, MnistBatcher, MnistData, PIXELS, resolve,
};
use crate::measure::memory::MemoryProbe;
use crate::measure::metrics::Evaluation;
use crate::measure::report::{
    ImageReport, MistakeReport, PredictionReport, SkippedReport, TestReport,
};
use crate::model::Network;
use crate::persist::checkpoint::{self, Damaged, listed};
use crate::persist::output;
use crate::print::{escaped, say, warn};
use crate::run::job::{Job, Norm, Variant};
use images::{FolderError, Picture, read_folder};
use mistakes::{PictureFormat, PictureFormatError, SHOWN, Tile, draw};

/// In which form a trained network predicts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PredictForm {
    /// Each block one op.
    Fused,
    /// Norms folded into their convolutions, which are Burn's. For networks that keep running
    /// statistics: all but the tutorial's.
    Folded,
    /// Burn's own convolution, batch norm and ReLU.
    Unfused,
}

impl PredictForm {
    /// As on the command line.
    pub fn name(self) -> &'static str {
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
#[non_exhaustive]
pub enum PredictError {
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
pub struct Predictor {
    runner: Runner,
    device: Device,
    activations: FloatDType,
    /// Epochs that it was trained for.
    epoch: usize,
}

#[allow(clippy::large_enum_variant, reason = "there is one of it")]
#[derive(Debug)]
enum Runner {
    Network(Network),
    Folded(FoldedNetwork),
}

/// What a network makes of one digit.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Prediction {
    /// The class with the highest probability, the first of several.
    pub digit: u8,
    /// Logarithms of the probabilities of all classes.
    pub log_probabilities: [f64; CLASSES],
}

impl Prediction {
    /// Probabilities of all classes.
    pub fn probabilities(&self) -> [f64; CLASSES] {
        self.log_probabilities.map(f64::exp)
    }

    /// Probability of the digit, from 0 to 1.
    pub fn probability(&self) -> f64 {
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
    /// Loads a checkpoint of a run of `job`: that of an epoch, counted from 1, or the newest one
    /// that is complete and can be read.
    ///
    /// Given `statistics`, a network that normalizes with each batch's own statistics takes up
    /// those of these digits once and for all, and what it predicts for a digit no longer depends
    /// on the digits beside it. Other networks have statistics from their training, and keep them.
    ///
    /// # Errors
    ///
    /// [`PredictError`].
    pub fn load(
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
        let classifier = job
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

        let activations = job.precision.activations();
        let runner = match (form, statistics) {
            // Folded in the parameters' type, and rounded only then.
            (PredictForm::Folded, _) => match FoldedNetwork::of(&classifier.net.valid()) {
                Ok(folded) => Runner::Folded(folded.with_activations(activations)),
                Err(source) => return Err(PredictError::Fold { model, source }),
            },
            (_, None) => Runner::Network(classifier.computing().valid()),
            (_, Some(digits)) => {
                Runner::Network(with_statistics(classifier.computing(), job, digits)?)
            }
        };
        Ok(Self {
            runner,
            device: job.device().without_autodiff(),
            activations,
            epoch,
        })
    }

    /// Epochs that it was trained for.
    pub fn epoch(&self) -> usize {
        self.epoch
    }

    /// Predicts the digits of one batch, with `first` for the position of the first one in errors.
    ///
    /// # Errors
    ///
    /// [`PredictError::Read`] or [`PredictError::NotANumber`].
    pub fn predict(
        &self,
        items: Vec<DigitItem>,
        first: usize,
    ) -> Result<Vec<Prediction>, PredictError> {
        let batch = MnistBatcher::new(self.activations).batch(items, &self.device);
        let output = self.forward(batch.images).try_into_vec_as::<f64>()?;
        output
            .chunks_exact(CLASSES)
            .zip(first..)
            .map(|(row, index)| Prediction::of(row).ok_or(PredictError::NotANumber { index }))
            .collect()
    }

    fn forward(&self, images: Tensor<4>) -> Tensor<2> {
        match &self.runner {
            Runner::Network(network) => network.forward(images),
            Runner::Folded(network) => network.forward(images),
        }
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

/// What to classify.
#[derive(Clone, Debug)]
pub enum Source {
    /// The pictures in a folder.
    Images(PathBuf),
    /// The test set.
    TestSet,
}

/// How to predict.
#[derive(Clone, Debug)]
pub struct PredictOptions {
    /// Folder of the run.
    pub directory: PathBuf,
    /// The checkpoint's epoch; the newest one if not given.
    pub epoch: Option<usize>,
    /// In which form.
    pub form: PredictForm,
    /// What to classify.
    pub source: Source,
    /// The digits that the model was trained on, `mnist`, `synthetic` or `custom`.
    pub trained_on: String,
    /// Where the predictions go.
    pub json: Option<PathBuf>,
    /// Where the picture of the mistakes goes, as SVG or PNG.
    pub mistakes: Option<PathBuf>,
}

/// Predicts with the model of a run of `job`, and prints what it makes of each picture or of the
/// test set.
///
/// # Errors
///
/// A message for people; among others if a picture could not be read, after the others have been
/// classified and everything is written.
pub fn predict(job: &Job, options: &PredictOptions, interrupter: &Interrupter) -> Result<()> {
    let testing = matches!(options.source, Source::TestSet);
    if !testing && options.mistakes.is_some() {
        bail!("nobody knows what the pictures of a folder are; --mistakes needs --test-set");
    }
    let format = options.mistakes.as_deref().map(PictureFormat::of);
    let format = format.transpose().map_err(PredictError::from)?;
    output::check(&[
        ("--json", options.json.as_deref()),
        ("--mistakes", options.mistakes.as_deref()),
    ])?;
    let pictures = match &options.source {
        Source::Images(folder) => read_folder(folder).map_err(PredictError::from)?,
        Source::TestSet => Vec::new(),
    };
    // Folding is refused by the model itself, which says why.
    let needs_statistics =
        !testing && !job.model.tracks_statistics() && options.form != PredictForm::Folded;
    let unfused = options.form == PredictForm::Unfused;
    if needs_statistics && unfused && job.norm == Norm::Tutorial {
        return Err(PredictError::NoFixedStatistics.into());
    }
    let data = match testing || needs_statistics {
        true => Some(test_digits(job, &options.trained_on)?),
        false => None,
    };
    let reference = data.as_ref().filter(|_| needs_statistics).map(|data| {
        let mut digits = data.test.clone();
        digits.truncate(job.batch_size);
        digits
    });
    let predictor = Predictor::load(
        job,
        &options.directory,
        options.epoch,
        options.form,
        reference.as_ref(),
    )?;
    say!(
        "Model: {} of {} after epoch {}, {}, {}",
        job.model.name(),
        options.directory.display(),
        predictor.epoch(),
        options.form.name(),
        job.precision.describe()
    )?;
    if let Some(reference) = &reference {
        say!(
            "This model keeps no statistics for evaluation: each picture is normalized with those \
             of the first {} test digits, whatever else is in its folder.",
            reference.len()
        )?;
    }

    let mut report = PredictionReport {
        model: job.model.name().to_string(),
        form: options.form.name().to_string(),
        dtype: job.precision.dtype_name(),
        epoch: predictor.epoch(),
        dataset: data.as_ref().map(|data| data.origin.name().to_string()),
        test: None,
        images: Vec::new(),
        skipped: Vec::new(),
    };
    let mut files = Vec::new();
    let text = if let Some(data) = data.filter(|_| testing) {
        let (test, evaluation) = test_set(&predictor, job, &data, interrupter)?;
        if let (Some(format), Some(path)) = (format, &options.mistakes) {
            let tiles: Vec<Tile> = test.mistakes.iter().map(|m| tile(&data.test, m)).collect();
            let picture = draw(format, &heading(&report, &test), &tiles);
            files.push(("Mistakes", path.as_path(), picture));
        }
        let matrix = confusion_matrix(&test.confusion);
        report.test = Some(test);
        format!(
            "Test set ({}): {evaluation}\n\n{matrix}",
            data.origin.name()
        )
    } else {
        classify_pictures(&predictor, job, pictures, &mut report, interrupter)?;
        table(&report.images)
    };
    if let Some(path) = &options.json {
        files.push(("Predictions", path, output::json(&report)));
    }
    output::finish(Some(text), files)?;
    match report.skipped.len() {
        0 => Ok(()),
        skipped => bail!(
            "{skipped} of {} pictures could not be classified",
            skipped + report.images.len()
        ),
    }
}

/// The data, with no more training digits than must be.
fn test_digits(job: &Job, trained_on: &str) -> Result<MnistData> {
    let data = resolve(&DataRequest {
        train_limit: Some(1),
        ..job.data_request()
    })?;
    say!("Data: {}", data.origin)?;
    if data.origin.name() != trained_on {
        say!(
            "Note: the model was trained on {trained_on} digits, and these are {}.",
            data.origin.name()
        )?;
    }
    Ok(data)
}

/// Classifies the test set, in batches as large as those of the training: a network without
/// statistics of its own sees then what it saw in the tests between its epochs.
fn test_set(
    predictor: &Predictor,
    job: &Job,
    data: &MnistData,
    interrupter: &Interrupter,
) -> Result<(TestReport, Evaluation)> {
    let digits = &data.test;
    let mut confusion = [[0; CLASSES]; CLASSES];
    let mut evaluation = Evaluation::default();
    let mut mistakes: Vec<MistakeReport> = Vec::new();
    for first in (0..digits.len()).step_by(job.batch_size) {
        stop_if_asked(interrupter)?;
        let end = digits.len().min(first + job.batch_size);
        let items = digits.get_many((first..end).collect());
        let predictions = predictor.predict(items.map_err(PredictError::from)?, first)?;
        for (index, prediction) in (first..).zip(predictions) {
            let label = digits.label(index);
            let loss = -prediction.log_probabilities[usize::from(label)];
            confusion[usize::from(label)][usize::from(prediction.digit)] += 1;
            evaluation += Evaluation {
                loss_sum: loss,
                correct: usize::from(prediction.digit == label),
                total: 1,
            };
            if prediction.digit != label {
                mistakes.push(MistakeReport {
                    index,
                    label,
                    prediction: prediction.digit,
                    probability: prediction.probability(),
                    loss,
                });
            }
        }
    }
    mistakes.sort_by(|a, b| b.loss.total_cmp(&a.loss));
    let report = TestReport {
        digits: evaluation.total,
        correct: evaluation.correct,
        accuracy: evaluation.accuracy(),
        average_loss: evaluation.average_loss(),
        confusion,
        mistakes,
    };
    Ok((report, evaluation))
}

/// A table with a row for each class and a column for what its digits were taken for.
fn confusion_matrix(confusion: &[[usize; CLASSES]; CLASSES]) -> String {
    let columns: String = (0..CLASSES).map(|digit| format!("{digit:>6}")).collect();
    let mut lines = vec![
        format!("{:>5} taken for", ""),
        format!("digit{columns}{:>9}", "right"),
    ];
    for (digit, row) in confusion.iter().enumerate() {
        let counts: String = row.iter().map(|count| format!("{count:>6}")).collect();
        let total: usize = row.iter().sum();
        let right = match total {
            0 => "-".to_string(),
            _ => format!("{:.1} %", 100.0 * row[digit] as f64 / total as f64),
        };
        lines.push(format!("{digit:>5}{counts}{right:>9}"));
    }
    lines.join("\n")
}

fn tile(digits: &Digits, mistake: &MistakeReport) -> Tile {
    Tile {
        image: *digits.image(mistake.index),
        label: mistake.label,
        prediction: mistake.prediction,
        probability: mistake.probability,
        loss: mistake.loss,
    }
}

/// What stands above the picture of the mistakes.
fn heading(report: &PredictionReport, test: &TestReport) -> [String; 2] {
    let digits = format!(
        "{} digits of {}",
        test.digits,
        report.dataset.as_deref().unwrap_or_default()
    );
    let what = match test.mistakes.len() {
        0 => format!("no mistakes on {digits}"),
        1 => format!("1 mistake on {digits}"),
        all if all <= SHOWN => format!("{all} mistakes on {digits}, highest loss first"),
        all => format!("the {SHOWN} with the highest loss of {all} mistakes on {digits}"),
    };
    let of = format!(
        "{}, {}, epoch {} (below: probability of the class read, loss of the digit)",
        report.model, report.form, report.epoch
    );
    [what, of]
}

fn classify_pictures(
    predictor: &Predictor,
    job: &Job,
    pictures: Vec<Picture>,
    report: &mut PredictionReport,
    interrupter: &Interrupter,
) -> Result<()> {
    let mut read: Vec<(String, [u8; PIXELS])> = Vec::new();
    for Picture { name, digit } in pictures {
        match digit {
            Ok(digit) => read.push((name, digit)),
            Err(error) => {
                warn(format_args!("skipped: {} {error}", escaped(&name, &[])));
                report.skipped.push(SkippedReport {
                    file: name,
                    reason: error.to_string(),
                });
            }
        }
    }
    for (first, chunk) in (0..)
        .step_by(job.batch_size)
        .zip(read.chunks(job.batch_size))
    {
        stop_if_asked(interrupter)?;
        let items = chunk.iter().map(|(_, image)| DigitItem {
            image: *image,
            label: 0,
        });
        let predictions = predictor.predict(items.collect(), first)?;
        for ((file, _), prediction) in chunk.iter().zip(predictions) {
            report.images.push(ImageReport {
                file: file.clone(),
                prediction: prediction.digit,
                probability: prediction.probability(),
                probabilities: prediction.probabilities(),
            });
        }
    }
    Ok(())
}

/// A line for each picture.
fn table(images: &[ImageReport]) -> String {
    let mut lines = vec![format!("\n{:>5} {:>12}  file", "digit", "probability")];
    for image in images {
        let percent = 100.0 * image.probability;
        lines.push(format!(
            "{:>5} {percent:>10.2} %  {}",
            image.prediction,
            escaped(&image.file, &[])
        ));
    }
    lines.join("\n")
}

fn stop_if_asked(interrupter: &Interrupter) -> Result<()> {
    if interrupter.should_stop() {
        bail!("interrupted: no prediction was printed, and no file was written");
    }
    Ok(())
}

#[cfg(test)]
mod tests;
