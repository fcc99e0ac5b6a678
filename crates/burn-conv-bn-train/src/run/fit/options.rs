use std::path::PathBuf;

use burn::train::Interrupter;

/// How a run is carried out, besides what it computes.
#[derive(Clone)]
pub(crate) struct RunOptions {
    /// Where logs and checkpoints go.
    pub(crate) directory: PathBuf,
    /// Whether an earlier run in the directory may be removed.
    pub(crate) overwrite: bool,
    /// Whether to write a checkpoint after every epoch. A resumed run does in any case.
    pub(crate) checkpoints: bool,
    /// Whether to resume the run in the directory from its newest complete checkpoint. Files of later
    /// epochs stay until the run has come to them again.
    pub(crate) resume: bool,
    /// Stop when the test loss has not improved for so many epochs.
    pub(crate) patience: Option<usize>,
    /// Show Burn's dashboard if standard input and output are a terminal that can show it.
    pub(crate) dashboard: bool,
    /// Contents of [`RUN_FILE`](crate::persist::run_file::RUN_FILE) in the directory, written before the first step.
    pub(crate) run_file: Option<Vec<u8>>,
    /// Stops the run after the batch that is running.
    pub(crate) interrupter: Interrupter,
}
