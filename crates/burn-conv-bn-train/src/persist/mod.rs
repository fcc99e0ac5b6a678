//! Files of a run: checkpoints, options, reports.

pub(crate) mod checkpoint;
pub(crate) mod output;
pub(crate) mod run_file;
