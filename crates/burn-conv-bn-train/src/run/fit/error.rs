//! Why a training failed.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use burn::store::RecordError;
use burn::tensor::{Device, FloatDType};
use burn::train::TrainingError;
use burn_conv_bn_files::OutputError;

use crate::persist::checkpoint::{Damaged, listed};
use crate::print::PrintError;

/// Why a training failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum FitError {
    /// An option has a value that makes no sense.
    #[error("{0} must be at least 1")]
    Zero(&'static str),
    /// There are no digits to train or to test on.
    #[error("the {0} set is empty")]
    NoData(&'static str),
    /// The model is not on an autodiff device.
    #[error("the model is on {0:?}, which does not track gradients; use `device.autodiff()`")]
    NoAutodiff(Device),
    /// The directory cannot be written to, or has no room for a training's files.
    #[error("cannot write to the directory {}: {source}", .path.display())]
    Directory {
        /// What could not be written.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// The directory holds another run, which has not been asked to be removed or resumed.
    #[error("the directory {} already holds a run; resume it, overwrite it or use another directory", .path.display())]
    DirectoryInUse {
        /// The directory.
        path: PathBuf,
    },
    /// Another process trains there.
    #[error("another process is training in the directory {}", .path.display())]
    Busy {
        /// The directory.
        path: PathBuf,
    },
    /// There is no complete checkpoint to resume from.
    #[error(
        "there is no complete checkpoint to resume from in {}{}", .path.display(), listed(.damaged)
    )]
    NoCheckpoint {
        /// Where it should be.
        path: PathBuf,
        /// Those that are there and cannot be read, the newest first. They are left alone.
        damaged: Vec<Damaged>,
    },
    /// A checkpoint belongs to another model.
    #[error("cannot resume from {}: {source}", .path.display())]
    Checkpoint {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: RecordError,
    },
    /// A checkpoint's parameters have another type than the model's.
    #[error("the checkpoint is of type {found:?}, the model of type {expected:?}")]
    CheckpointType {
        /// The model's type.
        expected: FloatDType,
        /// The checkpoint's type.
        found: FloatDType,
    },
    /// Burn restores the state of its own optimizers in single precision.
    #[error(
        "cannot resume a training in double precision with {0}: Burn restores the optimizer's \
         state in single precision"
    )]
    OptimizerPrecision(&'static str),
    /// A checkpoint or a log could not be written, as on a full disk. The training was stopped;
    /// every checkpoint that was complete is as it was.
    #[error("cannot write {0} (the training has stopped; complete checkpoints are kept)")]
    Write(#[from] OutputError),
    /// Standard output took no line.
    #[error("{0}")]
    Print(#[from] PrintError),
    /// The learning rate's schedule is not valid.
    #[error("invalid learning rate: {0}")]
    Schedule(String),
    /// Burn stopped with an error.
    #[error("training failed: {0}")]
    Training(Arc<TrainingError>),
    /// Burn panicked.
    #[error("training panicked: {0}")]
    Panicked(String),
}
