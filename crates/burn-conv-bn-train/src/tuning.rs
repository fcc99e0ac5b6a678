//! Progress of autotuning, on standard error.

use std::time::Duration;

use burn_conv_bn_memory::TuningMeter;
use tempfile::{TempDir, tempdir};

use crate::print::warn;
use crate::run::terminal::is_shown;

/// Time between two lines.
const PERIOD: Duration = Duration::from_secs(5);

/// Prints until it is dropped.
#[derive(Debug)]
#[must_use = "it prints until it is dropped"]
pub struct TuningLines {
    _meter: TuningMeter,
    /// Folder of the meter's file.
    _folder: TempDir,
}

/// Prints how many kernels have been tuned so far, every few seconds in which there were some, unless a dashboard has the
/// terminal. Where nothing is tuned, as on Flex or with an earlier run's findings, it prints nothing.
///
/// To be called before a device is used: afterwards it cannot count, and is `None`.
pub fn print_tuning() -> Option<TuningLines> {
    let folder = tempdir().ok()?;
    let meter = TuningMeter::start(folder.path().join("decisions"), PERIOD, |kernels| {
        if !is_shown() {
            warn(format_args!("Tuning: {kernels} kernels so far"));
        }
    })?;
    Some(TuningLines {
        _meter: meter,
        _folder: folder,
    })
}
