//! Files of a run: checkpoints, logs, reports.

pub(crate) mod checkpoint;
pub(crate) mod history;
pub(crate) mod lock;
pub(crate) mod metric_log;
pub(crate) mod output;
pub(crate) mod run_file;
