//! The options of every command, as clap reads them.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};
use serde::{Deserialize, Serialize};

use crate::choice::{ON_COMPUTATION, ON_NETWORK, ON_OUTPUT, ON_RUN};
use crate::data::DatasetChoice;
use crate::device::DeviceChoice;
use crate::predict::PredictForm;
use crate::run::compare::CompareOptions;
use crate::run::folder::{RUN, RunFolder};
use crate::run::job::{Learning, Setup, Variant};
use crate::run::worker::WORKER;

/// Headings of `predict`'s own options.
const ON_WHAT: &str = "What to classify";
const ON_TRAINED: &str = "Trained model";
const ON_DIGITS: &str = "Test digits";

const USAGE: &str = "\
mnist <COMMAND>
       mnist [OPTIONS of compare]";

/// What follows the options in the help of the program and of each command.
pub(super) const EXAMPLES: &str = include_str!("help/mnist.txt");
pub(super) const COMPARE_EXAMPLES: &str = include_str!("help/compare.txt");
pub(super) const TRAIN_EXAMPLES: &str = include_str!("help/train.txt");
pub(super) const PARITY_EXAMPLES: &str = include_str!("help/parity.txt");
pub(super) const PREDICT_EXAMPLES: &str = include_str!("help/predict.txt");

/// Trains the network of the PyTorch tutorial "Fusing Convolution and Batch Norm using Custom
/// Function" on MNIST, fused and unfused, and compares memory, time and accuracy.
///
/// Without a command it does the tutorial's job: `compare`, with its options, on as few digits as end
/// within 8 minutes.
#[derive(Parser, Debug)]
#[command(name = "mnist", version, after_help = EXAMPLES, override_usage = USAGE)]
pub(super) struct Cli {
    #[command(subcommand)]
    pub(super) command: Subcommands,
    #[command(flatten)]
    pub(super) config: ConfigArgs,
}

#[allow(clippy::large_enum_variant, reason = "there is one of it")]
#[derive(Subcommand, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Subcommands {
    /// Train fused, then unfused, measure fused with rebuilt outputs, each in a fresh process, and compare.
    #[command(after_help = COMPARE_EXAMPLES)]
    Compare(Compare),
    /// Train one variant, with checkpoints.
    #[command(after_help = TRAIN_EXAMPLES)]
    Train(Train),
    /// Check that both variants give the same losses from the same weights and batches.
    #[command(after_help = PARITY_EXAMPLES)]
    Parity(ParityArgs),
    /// Classify the test set, or pictures in a folder, with a model that `train` has trained.
    #[command(after_help = PREDICT_EXAMPLES)]
    Predict(Predict),
    #[command(name = WORKER, hide = true)]
    Worker,
}

impl Subcommands {
    /// Sets the options whose defaults depend on other options.
    pub(super) fn complete(&mut self) {
        let (setup, learning) = match self {
            Self::Compare(args) => (&mut args.setup, Some(&mut args.learning)),
            Self::Train(args) => (&mut args.setup, Some(&mut args.learning)),
            Self::Parity(args) => (&mut args.setup, None),
            Self::Predict(_) | Self::Worker => return,
        };
        setup.lr = Some(setup.learning_rate());
        if let Some(learning) = learning {
            let default = setup.model.default_dropout();
            learning.dropout.get_or_insert(default);
        }
    }
}

#[derive(Args, Debug)]
#[command(next_help_heading = "Options as a file")]
pub(super) struct ConfigArgs {
    /// Options from this TOML file, or JSON if it ends in .json: long names with values, true or
    /// false for a switch. The command line wins.
    #[arg(long, global = true, value_name = "FILE")]
    pub(super) config: Option<PathBuf>,
    /// Print the options in effect as such a file, and exit.
    #[arg(long, global = true)]
    pub(super) print_config: bool,
}

#[derive(Args, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) struct Compare {
    /// Epochs.
    #[arg(long, value_name = "N", default_value_t = 1, help_heading = ON_RUN)]
    pub(super) epochs: usize,
    #[command(flatten)]
    #[serde(flatten)]
    pub(super) setup: Setup,
    #[command(flatten)]
    #[serde(flatten)]
    pub(super) learning: Learning,
    #[command(flatten)]
    #[serde(flatten)]
    pub(super) options: CompareOptions,
}

#[derive(Args, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) struct Train {
    /// Epochs, those of a resumed run included.
    #[arg(long, value_name = "N", default_value_t = 5, help_heading = ON_RUN)]
    pub(super) epochs: usize,
    /// Stop when the test loss has not improved for N epochs.
    #[arg(long, value_name = "N", help_heading = ON_RUN)]
    pub(super) early_stopping: Option<usize>,
    #[command(flatten)]
    #[serde(flatten)]
    pub(super) folder: RunFolder,
    /// Which form of the network.
    #[arg(long, value_enum, default_value = "fused", help_heading = ON_NETWORK)]
    pub(super) variant: Variant,
    #[command(flatten)]
    #[serde(flatten)]
    pub(super) setup: Setup,
    #[command(flatten)]
    #[serde(flatten)]
    pub(super) learning: Learning,
    /// Print lines even on a terminal, where Burn's dashboard is shown otherwise.
    #[arg(long, help_heading = ON_OUTPUT)]
    pub(super) plain: bool,
    /// Write the results to this file.
    #[arg(long, value_name = "FILE", help_heading = ON_OUTPUT)]
    pub(super) json: Option<PathBuf>,
}

#[derive(Args, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) struct ParityArgs {
    /// Training steps.
    #[arg(long, value_name = "N", default_value_t = 30, help_heading = ON_RUN)]
    pub(super) steps: usize,
    #[command(flatten)]
    #[serde(flatten)]
    pub(super) setup: Setup,
}

#[derive(Args, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) struct Predict {
    /// The pictures in this folder: .png, .pgm, .ppm, .pbm and .pnm files of any size.
    #[arg(long, value_name = "DIR", conflicts_with = "test_set", help_heading = ON_WHAT)]
    pub(super) images: Option<PathBuf>,
    /// The test set, with accuracy and confusion matrix.
    #[arg(long, help_heading = ON_WHAT)]
    pub(super) test_set: bool,
    /// Folder of the training: its --artifacts.
    #[arg(long, value_name = "DIR", default_value = RUN, help_heading = ON_TRAINED)]
    pub(super) artifacts: PathBuf,
    /// Take the checkpoint after this epoch [default: the newest complete one].
    #[arg(long, value_name = "N", help_heading = ON_TRAINED)]
    pub(super) epoch: Option<usize>,
    /// In which form to run it [default: the one that was trained].
    #[arg(long, value_enum, help_heading = ON_TRAINED)]
    pub(super) form: Option<PredictForm>,
    /// MNIST if it is found or downloaded and built-in digits otherwise, or one of the two [default:
    /// as in the training].
    #[arg(long, value_enum, help_heading = ON_DIGITS)]
    pub(super) dataset: Option<DatasetChoice>,
    /// Folder with MNIST's four IDX files, plain or .gz [default: as in the training].
    #[arg(long, value_name = "DIR", help_heading = ON_DIGITS)]
    pub(super) data_dir: Option<PathBuf>,
    /// Do not try to download MNIST.
    #[arg(long, help_heading = ON_DIGITS)]
    pub(super) no_download: bool,
    /// Test on the first N digits only [default: as in the training].
    #[arg(long, value_name = "N", help_heading = ON_DIGITS)]
    pub(super) test_limit: Option<usize>,
    /// Device [default: as in the training].
    #[arg(long, value_enum, help_heading = ON_COMPUTATION)]
    pub(super) device: Option<DeviceChoice>,
    /// CPU threads [default: one per hardware thread].
    #[arg(long, value_name = "N", help_heading = ON_COMPUTATION)]
    pub(super) threads: Option<usize>,
    /// Digits a batch; the tutorial's network normalizes by batch [default: as in the training].
    #[arg(long, value_name = "N", help_heading = ON_COMPUTATION)]
    pub(super) batch_size: Option<usize>,
    /// Draw the misclassified digits of the test set, highest loss first, to this SVG file.
    #[arg(long, value_name = "FILE", help_heading = ON_OUTPUT)]
    pub(super) mistakes: Option<PathBuf>,
    /// Write the predictions to this file.
    #[arg(long, value_name = "FILE", help_heading = ON_OUTPUT)]
    pub(super) json: Option<PathBuf>,
}
